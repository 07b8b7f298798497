"""`data.episodes`: the numbers that the options take, and the chosen episodes as a dataset of any format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from imagewam_cli.data.episodes import ALL_EPISODES, EpisodeSelection, SelectedDataset, episodes_text
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Dataset
from imagewam_cli.errors import DatasetError, UsageError
from imagewam_cli.testing.dataset import MemoryDataset


def chosen(count: int, only: str | None = None, exclude: str | None = None) -> list[int]:
    return list(EpisodeSelection.of(only, exclude).choose(range(count), Path("set")))


@pytest.mark.parametrize(
    ("only", "exclude", "expected"),
    [
        (None, None, [0, 1, 2, 3, 4, 5]),
        ("0-2,5", None, [0, 1, 2, 5]),
        (" 5 , 1 - 2 ", None, [1, 2, 5]),
        (None, "3", [0, 1, 2, 4, 5]),
        ("0-4", "1,3-4", [0, 2]),
    ],
)
def test_lists_and_ranges(only: str | None, exclude: str | None, expected: list[int]) -> None:
    assert chosen(6, only, exclude) == expected


@pytest.mark.parametrize("episodes", [[0, 1, 2, 5], [3], [0, 2, 4]])
def test_a_text_names_the_episodes_that_it_was_made_of(episodes: list[int]) -> None:
    assert chosen(6, episodes_text(episodes)) == episodes


def test_numbers_are_taken_instead_of_a_text() -> None:
    assert EpisodeSelection.of([2, 0, 1], range(1)) == EpisodeSelection.of("0-2", "0")
    assert EpisodeSelection.of() == ALL_EPISODES


@pytest.mark.parametrize(
    ("only", "exclude", "message"),
    [
        ("", None, "--only-episodes must look like 0-9,12, got ''"),
        ("1,,2", None, "must look like"),
        ("-3", None, "must look like"),
        ("1.5", None, "must look like"),
        (None, "first", "--exclude-episodes must look like 0-9,12, got 'first'"),
        ("9-0", None, "the range 9-0 is reversed"),
        ("0-3,3", None, "lists episode 3 twice"),
        ("0-3", "5", "--exclude-episodes names episode 5, which is not among those of --only-episodes 0-3"),
        ("0-3", "0-3", "--exclude-episodes leaves no episode of --only-episodes 0-3"),
    ],
)
def test_nonsense_is_refused(only: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EpisodeSelection.of(only, exclude)


@pytest.mark.parametrize(
    ("only", "exclude", "message"),
    [
        ("0-6", None, "set has no episode 6, which --only-episodes names"),
        (None, "1000000000000", "has no episode 1000000000000, which --exclude-episodes names"),
        ("0-1000000000000", None, "has no episode 6"),
        (None, "0-5", "--exclude-episodes leaves no episode of set"),
    ],
)
def test_episodes_that_do_not_exist_are_refused(only: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        chosen(6, only, exclude)
    assert caught.value.hint == "it has 6 episodes: 0-5"


def facts(dataset: Dataset) -> list[tuple[int, int, int]]:
    return [(row.row, row.episode, row.frame) for row in dataset.rows(images=False)]


class TestAnyFormat:
    def test_rows_are_counted_within_the_chosen_episodes(self) -> None:
        dataset = SelectedDataset(MemoryDataset([2, 3, 1, 2]), EpisodeSelection.of("1,3"))
        assert facts(dataset) == [(0, 1, 0), (1, 1, 1), (2, 1, 2), (3, 3, 0), (4, 3, 1)]
        assert [(e.index, e.length, e.first_row) for e in dataset.episodes()] == [(1, 3, 0), (3, 2, 3)]
        assert [row.row for row in dataset.rows(episodes=[3], images=False)] == [3, 4]

    def test_totals_count_the_chosen_episodes(self) -> None:
        whole = MemoryDataset([2, 3, 1, 2])
        info = SelectedDataset(whole, EpisodeSelection.of(exclude="0,2")).info
        assert (info.total_episodes, info.total_rows, info.selected) == (2, 5, "1,3")
        assert info.identity == whole.info.identity

    def test_choosing_every_episode_is_choosing_nothing(self) -> None:
        whole = MemoryDataset([2, 3])
        assert SelectedDataset(whole, EpisodeSelection.of("0-1")).info == whole.info

    def test_an_episode_that_was_left_out_cannot_be_read(self) -> None:
        dataset = SelectedDataset(MemoryDataset([2, 3]), EpisodeSelection.of("1"))
        with pytest.raises(DatasetError, match="no episode 0 among the chosen ones"):
            list(dataset.rows(episodes=[0]))

    def test_only_chosen_episodes_are_decoded(self) -> None:
        whole = MemoryDataset([2, 3, 1])
        list(SelectedDataset(whole, EpisodeSelection.of("2")).rows())
        assert whole.streams == [(2,)]


class TestLeRobot:
    @pytest.mark.parametrize("fixture", ["v30", "v30_pictures", "v21"])
    def test_chosen_rows_are_those_of_the_whole_set(self, fixture: str, request: pytest.FixtureRequest) -> None:
        root = request.getfixturevalue(fixture)
        some = open_dataset(root, episodes=EpisodeSelection.of(exclude="1"))
        every = {(row.episode, row.frame): row for row in open_dataset(root).rows()}
        assert some.info.selected == "0,2"
        assert some.info.total_rows == 9
        for number, row in enumerate(some.rows()):
            same = every[row.episode, row.frame]
            assert (row.row, row.instruction) == (number, same.instruction)
            assert (row.state == same.state).all()
            assert all((row.images[camera] == same.images[camera]).all() for camera in same.images)

    def test_files_of_excluded_episodes_may_be_missing(self, v21: Path, tmp_path: Path) -> None:
        root = tmp_path / "set"
        shutil.copytree(v21, root)
        for file in root.glob("**/episode_000001.*"):
            file.unlink()
        dataset = open_dataset(root, episodes=EpisodeSelection.of(exclude="1"))
        assert len(list(dataset.rows())) == 9
