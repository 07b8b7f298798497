"""Test `data.splits`: splits by episode are complete, disjoint and reproducible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagewam_cli.data.splits import Split, split_episodes
from imagewam_cli.errors import UsageError


@given(
    indices=st.sets(st.integers(0, 10_000), max_size=60),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_parts_are_disjoint_and_complete(indices: set[int], fraction: float, seed: int) -> None:
    train, validation = split_episodes(indices, fraction, seed)
    assert sorted(train + validation) == sorted(indices)
    assert list(train) == sorted(train)
    assert list(validation) == sorted(validation)
    if fraction == 0 or len(indices) < 2:
        assert validation == ()
    else:
        assert 1 <= len(validation) <= len(indices) - 1
        assert abs(len(validation) - fraction * len(indices)) <= 1


def test_order_of_the_input_does_not_matter() -> None:
    assert split_episodes(range(20), 0.3, 1) == split_episodes(reversed(range(20)), 0.3, 1)


def test_the_split_is_the_same_everywhere() -> None:
    # Pinned: a run must validate on the same episodes on another machine and after an upgrade.
    assert split_episodes(range(10), 0.2, 0)[1] == (4, 7)


def test_the_seed_changes_the_split() -> None:
    assert len({split_episodes(range(50), 0.2, seed)[1] for seed in range(5)}) == 5


def test_adding_episodes_moves_few_of_the_old_ones() -> None:
    before = set(split_episodes(range(100), 0.1, 0)[1])
    after = set(split_episodes(range(110), 0.1, 0)[1])
    assert len(before - after) <= 2


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        split_episodes([0, 1], fraction, 0)


def test_an_episode_listed_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="episode 3 is listed twice"):
        split_episodes([1, 3, 3], 0.5, 0)


class TestTasks:
    def test_where_every_task_has_many_episodes_nothing_changes(self) -> None:
        for seed in range(5):
            tasks = {episode: {episode % 2} for episode in range(40)}
            assert split_episodes(range(40), 0.1, seed, tasks) == split_episodes(range(40), 0.1, seed)
            one = dict.fromkeys(range(40), ("lift",))
            assert split_episodes(range(40), 0.9, seed, one) == split_episodes(range(40), 0.9, seed)

    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("fraction", [0.1, 0.3, 0.8])
    def test_validation_spares_the_last_episode_of_every_task(self, seed: int, fraction: float) -> None:
        tasks = {episode: {f"task {episode // 3}", "shared"} for episode in range(29)}  # the last task has two
        train, validation = split_episodes(range(29), fraction, seed, tasks)
        assert sorted(train + validation) == list(range(29))
        assert {task for episode in train for task in tasks[episode]} == {t for own in tasks.values() for t in own}
        assert len(validation) == min(round(29 * fraction), 19)  # ten tasks keep one episode each

    def test_if_every_episode_is_the_only_one_of_its_task_some_are_held_out_all_the_same(self) -> None:
        tasks = {episode: {episode} for episode in range(10)}
        assert split_episodes(range(10), 0.2, 0, tasks) == split_episodes(range(10), 0.2, 0)


def test_a_split_is_written_as_ranges_and_read_again() -> None:
    split = Split(train=(0, 1, 2, 5), validation=())
    assert split.to_dict() == {"train": "0-2,5", "validation": ""}
    assert Split.from_dict(split.to_dict()) == split
