"""Test contact sheets, GIFs and MP4s: sizes, frames and success marks."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.pictures import (
    FAILURE_RGB,
    RUNNING_RGB,
    SUCCESS_RGB,
    contact_sheet,
    spaced,
    write_gif,
    write_mp4,
    write_picture,
)
from tests.support.scripted_policies import episode

WIDTH, HEIGHT = 48, 32


def count(image: Image.Image, color: tuple[int, int, int], tolerance: int = 0) -> int:
    """Count the pixels within `tolerance` of the colour."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - color).max(-1) <= tolerance).sum())


@pytest.mark.parametrize(
    ("length", "number", "expected"),
    [(9, 3, [0, 4, 8]), (2, 8, [0, 1]), (5, 1, [4]), (1, 4, [0]), (101, 5, [0, 25, 50, 75, 100])],
)
def test_frames_are_evenly_spaced_from_first_to_last(length: int, number: int, expected: list[int]) -> None:
    assert spaced(length, number) == expected


def test_a_sheet_has_a_row_per_episode_with_its_frames() -> None:
    sheet = contact_sheet([episode(True, 8), episode(False, 8)], columns=3, width=WIDTH)
    single = contact_sheet([episode(True, 8)], columns=3, width=WIDTH)
    assert sheet.width == single.width
    assert single.width >= 3 * WIDTH
    assert sheet.height > 2 * HEIGHT
    for index in range(9):
        brightness = 40 + 20 * index
        shown = index in (0, 4, 8)
        # Each shown frame appears exactly twice. The edges of text add a few grey pixels of any brightness.
        assert count(sheet, (brightness,) * 3) in (
            range(2 * WIDTH * HEIGHT, 2 * WIDTH * HEIGHT + 200) if shown else range(200)
        )


def test_success_is_green_and_failure_red() -> None:
    good, bad = contact_sheet([episode(True)], columns=2), contact_sheet([episode(False)], columns=2)
    assert count(good, SUCCESS_RGB) > 100
    assert count(good, FAILURE_RGB) == 0
    assert count(bad, FAILURE_RGB) > 100
    assert count(bad, SUCCESS_RGB) == 0


def test_the_caption_depends_on_the_instruction() -> None:
    """Different instructions give different sheets, equal instructions give equal sheets."""
    sheets = [
        contact_sheet([episode(True, instruction=text)], columns=6, width=WIDTH).tobytes()
        for text in ("push the red cube", "push the red cube", "open the drawer")
    ]
    assert sheets[0] == sheets[1] != sheets[2]


def test_fewer_frames_put_episodes_side_by_side() -> None:
    episodes = [episode(True)] * 4
    four_rows = contact_sheet(episodes, columns=4, width=WIDTH)
    two_rows = contact_sheet(episodes, columns=4, frames_per_episode=2, width=WIDTH)
    assert two_rows.height < 0.6 * four_rows.height
    assert count(two_rows, SUCCESS_RGB) == count(four_rows, SUCCESS_RGB)


def test_a_long_instruction_stays_on_the_sheet() -> None:
    text = "pick up the purple triangle and set it to the left of the orange triangle " * 4
    short, long = (contact_sheet([episode(True, instruction=t)], columns=3, width=WIDTH) for t in ("go", text))
    assert long.size == short.size


@pytest.mark.parametrize(("columns", "frames"), [(2, 3), (4, 0), (0, None)])
def test_frames_that_do_not_fit_are_refused(columns: int, frames: int | None) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        contact_sheet([episode(True)], columns=columns, frames_per_episode=frames)


def test_a_sheet_needs_episodes_of_one_shape() -> None:
    with pytest.raises(UsageError, match="no episodes"):
        contact_sheet([])
    with pytest.raises(UsageError, match="different shapes"):
        contact_sheet([episode(True), episode(True, size=(16, 16))])


def gif_frames(path: Path) -> list[tuple[Image.Image, int]]:
    """Return each frame as (RGB image, duration in milliseconds)."""
    with Image.open(path) as gif:
        frames = []
        for i in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(i)
            frames.append((gif.convert("RGB"), int(gif.info["duration"])))
    return frames


def test_a_gif_plays_episodes_side_by_side_and_holds_their_ends(tmp_path: Path) -> None:
    write_gif(tmp_path / "r.gif", [episode(True, 2), episode(False, 5)], width=WIDTH, hold=1.0)
    frames = gif_frames(tmp_path / "r.gif")
    assert len(frames) == 6
    assert [t for _, t in frames] == [100] * 5 + [1100]
    border = 2 * 4 * (WIDTH + HEIGHT + 8)  # pixels of a border 4 pixels wide around one episode
    running = [count(image, RUNNING_RGB) for image, _ in frames]
    green = [count(image, SUCCESS_RGB) for image, _ in frames]
    red = [count(image, FAILURE_RGB) for image, _ in frames]
    assert green[:2] == [0, 0]
    assert all(n == pytest.approx(border, rel=0.05) for n in green[2:])
    assert red[:5] == [0] * 5
    assert red[5] == pytest.approx(border, rel=0.05)
    assert running[0] > running[2] > running[5]
    assert count(frames[5][0], (80, 80, 80), 6) >= WIDTH * HEIGHT  # the first episode still shows its last frame
    assert count(frames[5][0], (140, 140, 140), 6) >= WIDTH * HEIGHT


def test_a_grid_holds_twelve_episodes(tmp_path: Path) -> None:
    for number in (12, 14):
        write_gif(tmp_path / f"{number}.gif", [episode(True, 1)] * number, width=WIDTH)
    assert (tmp_path / "12.gif").read_bytes() == (tmp_path / "14.gif").read_bytes()
    image, _ = gif_frames(tmp_path / "12.gif")[-1]
    assert image.width > 4 * WIDTH
    assert image.height > 3 * HEIGHT
    assert count(image, SUCCESS_RGB) == pytest.approx(12 * 8 * (WIDTH + HEIGHT + 8), rel=0.05)


def test_an_mp4_shows_the_same_grid(tmp_path: Path) -> None:
    path = tmp_path / "videos" / "r.mp4"
    write_mp4(path, [episode(True, 4), episode(False, 2)], width=WIDTH, hold=0.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 10
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5 + 5
    assert frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
    first, last = Image.fromarray(frames[0]), Image.fromarray(frames[-1])
    assert count(first, SUCCESS_RGB, 30) == count(first, FAILURE_RGB, 30) == 0
    assert count(last, SUCCESS_RGB, 30) > 300
    assert count(last, FAILURE_RGB, 30) > 300


@pytest.mark.parametrize("write", [write_gif, write_mp4])
def test_a_failure_keeps_the_existing_file(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / ("r.gif" if write is write_gif else "r.mp4")
    path.write_bytes(b"before")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("imagewam_cli.evaluation.pictures._Grid._show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, [episode(True)], width=WIDTH)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"


def test_the_suffix_of_the_file_name_decides_the_format(tmp_path: Path) -> None:
    sheet = contact_sheet([episode(True)], columns=2)
    write_picture(tmp_path / "new" / "sheet.png", sheet)
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        assert image.format == "PNG"
        assert image.tobytes() == sheet.tobytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"width": 0}, {"fps": 0}])
def test_an_impossible_grid_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        write_gif(tmp_path / "r.gif", [episode(True)], **wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
