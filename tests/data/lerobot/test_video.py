"""Test reading an mp4 in one pass: the frames it yields, and the errors for broken files."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from imagewam_cli.data.lerobot.metadata import Episode
from imagewam_cli.data.lerobot.video import VideoCamera
from imagewam_cli.data.lerobot.video_files import VideoCut
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import DatasetError
from tests.support.recordings import decode_mp4, encode_mp4, picture

SIZE = (32, 48)


def episode(index: int, length: int) -> Episode:
    return Episode(index=index, length=length, first_row=0, tasks=(), data_file=Path(), videos={})


def cut(path: Path, first_frame: int, *, ends_file: bool = False) -> VideoCut:
    return VideoCut(path=path, first_frame=first_frame, ends_file=ends_file)


def read(
    cut: VideoCut, length: int, *, size: tuple[int, int] = SIZE, index: int = 0, stride: int = 1
) -> list[UInt8Image]:
    """Return the frames of one episode, decoded by a new camera."""
    return list(VideoCamera("cam", size, {index: cut}).frames(episode(index, length), stride))


@pytest.fixture(scope="module", params=["libx264", "libsvtav1"])
def mp4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of nine frames: an episode of 4, a gap of 1, and an episode of 4."""
    path = tmp_path_factory.mktemp("video") / f"{request.param}.mp4"
    encode_mp4(path, np.stack([picture(SIZE, 0, frame, 0) for frame in range(9)]), request.param)
    return path


def test_episodes_are_cut_by_frame_number(mp4: Path) -> None:
    expected = decode_mp4(mp4)
    camera = VideoCamera("cam", SIZE, {0: cut(mp4, 0), 1: cut(mp4, 5, ends_file=True)})
    first = list(camera.frames(episode(0, 4), 1))
    second = list(camera.frames(episode(1, 4), 1))
    np.testing.assert_array_equal(np.stack(first), expected[:4])
    np.testing.assert_array_equal(np.stack(second), expected[5:])
    assert first[0].dtype == np.uint8
    assert first[0].flags.c_contiguous


def test_a_stride_skips_frames_within_one_pass(mp4: Path) -> None:
    frames = read(cut(mp4, 0, ends_file=True), 9, stride=4)
    np.testing.assert_array_equal(np.stack(frames), decode_mp4(mp4)[::4])


def test_a_width_that_the_decoder_pads_gives_a_contiguous_array(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    encode_mp4(path, np.full((2, 50, 90, 3), 77, np.uint8))
    frame, _ = read(cut(path, 0, ends_file=True), 2, size=(50, 90))
    assert frame.flags.c_contiguous
    assert frame.shape == (50, 90, 3)
    np.testing.assert_array_equal(frame, decode_mp4(path)[0])


def test_the_file_is_opened_once_and_closed_after_its_last_episode(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[av.container.InputContainer] = []
    real_open = av.open
    monkeypatch.setattr(av, "open", lambda *args: opened.append(real_open(*args)) or opened[-1])
    camera = VideoCamera("cam", SIZE, {0: cut(mp4, 0), 1: cut(mp4, 5, ends_file=True)})
    for index in (0, 1):
        list(camera.frames(episode(index, 4), 1))
    assert len(opened) == 1
    with pytest.raises(AssertionError, match="not open"):
        next(opened[0].decode(video=0))


def test_episodes_in_reverse_file_order_are_read_correctly(mp4: Path) -> None:
    expected = decode_mp4(mp4)
    camera = VideoCamera("cam", SIZE, {0: cut(mp4, 5), 1: cut(mp4, 0)})
    later = list(camera.frames(episode(0, 4), 1))
    earlier = list(camera.frames(episode(1, 4), 1))
    np.testing.assert_array_equal(np.stack(later + earlier), np.concatenate([expected[5:], expected[:4]]))


def test_a_video_that_ends_early_is_refused_with_file_and_episode(mp4: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{mp4.name}, episode 3: the video ends after 4 of 6 frames"):
        read(cut(mp4, 5), 6, index=3)


def test_a_span_after_the_end_of_the_video_is_refused(mp4: Path) -> None:
    with pytest.raises(DatasetError, match="episode 3: the video ends after 0 of 2 frames"):
        read(cut(mp4, 40), 2, index=3)


def test_the_end_is_checked_even_if_the_stride_skips_it(mp4: Path) -> None:
    with pytest.raises(DatasetError, match="ends after 9 of 10 frames"):
        read(cut(mp4, 0), 10, stride=5)


def test_a_video_with_extra_frames_is_refused(mp4: Path) -> None:
    with pytest.raises(DatasetError, match="episode 0: the video continues after the 8 frames of its last episode"):
        read(cut(mp4, 0, ends_file=True), 8)


def test_frames_of_another_size_are_refused(mp4: Path) -> None:
    with pytest.raises(DatasetError, match=r"frames are 32x48 \(height x width\), but meta/info.json declares 48x32"):
        read(cut(mp4, 0), 9, size=(48, 32))


@pytest.mark.parametrize("content", [b"", b"this is no video at all", None])
def test_files_that_are_not_videos_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"bad\.mp4, episode 7: the (file|video) (is empty|is missing|holds only)"):
        read(cut(path, 0), 1, index=7)


def test_a_file_with_only_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DatasetError, match=r"sound\.mp4 has no video stream"):
        read(cut(path, 0), 1)
