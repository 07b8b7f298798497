"""Create small datasets for the tests.

v3.0 datasets come from the project's own writer. v2.1 datasets, which it cannot write, are written here file by file
with pyarrow and PyAV, so that the reader is tested against code that it does not share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imagewam_cli.data.lerobot.writer import LeRobotWriter

FPS = 10
STATE_NAMES = ("x", "y", "grip")
ACTION_NAMES = ("dx", "dy")
CAMERAS: Mapping[str, tuple[int, int]] = {"top": (32, 48), "wrist": (32, 32)}
LENGTHS = (5, 7, 4)
INSTRUCTIONS = ("push the red cube", "open the drawer", "push the red cube")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recorded episode, which a reader must return unchanged."""

    frames: dict[str, npt.NDArray[np.uint8]]
    states: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    instruction: str


def picture(size: tuple[int, int], episode: int, frame: int, camera: int) -> npt.NDArray[np.uint8]:
    """Draw flat colour blocks that survive lossy coding and identify episode (of 4), frame (of 110), camera (of 2)."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 20 + 20 * (frame % 11)
    pixels[: height // 2, width // 2 :] = 50 + 60 * (episode % 4)
    pixels[height // 2 :, width // 2 :] = 40 + 100 * camera + 10 * (frame // 11)
    return pixels


def record(
    lengths: Sequence[int] = LENGTHS, cameras: Mapping[str, tuple[int, int]] = CAMERAS, seed: int = 0
) -> list[Recording]:
    rng = np.random.default_rng(seed)
    return [
        Recording(
            frames={
                name: np.stack([picture(size, episode, frame, camera) for frame in range(length)])
                for camera, (name, size) in enumerate(cameras.items())
            },
            states=rng.normal(size=(length, len(STATE_NAMES))).astype(np.float32),
            actions=rng.normal(size=(length, len(ACTION_NAMES))).astype(np.float32),
            instruction=INSTRUCTIONS[episode % len(INSTRUCTIONS)],
        )
        for episode, length in enumerate(lengths)
    ]


def write_v30(root: Path, recordings: Sequence[Recording], **options: Any) -> Path:
    cameras = {name: frames.shape[1:3] for name, frames in recordings[0].frames.items()}
    with LeRobotWriter(
        root,
        fps=FPS,
        robot_type="testbot",
        cameras=cameras,
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        **options,
    ) as writer:
        for recording in recordings:
            writer.add_episode(
                frames=recording.frames,
                states=recording.states,
                actions=recording.actions,
                instruction=recording.instruction,
            )
    return root


def encode_mp4(path: Path, frames: npt.NDArray[np.uint8], codec: str = "libx264") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"crf": "18", "g": "2"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decode_mp4(path: Path) -> npt.NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_v21(root: Path, recordings: Sequence[Recording]) -> Path:
    """Write a v2.1 dataset in chunks of two episodes, with plain list columns like lerobot before 0.4."""
    tasks = list(dict.fromkeys(recording.instruction for recording in recordings))
    features: dict[str, Any] = {
        f"observation.images.{name}": {
            "dtype": "video",
            # Stored as (3, H, W): a reader must look at the axis names to tell.
            "shape": [3, *frames.shape[1:3]],
            "names": ["channels", "height", "width"],
        }
        for name, frames in recordings[0].frames.items()
    }
    features["observation.state"] = {
        "dtype": "float32",
        "shape": [len(STATE_NAMES)],
        "names": {"motors": list(STATE_NAMES)},
    }
    features["action"] = {"dtype": "float32", "shape": [len(ACTION_NAMES)], "names": None}
    meta = root / "meta"
    meta.mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "testbot",
        "total_episodes": len(recordings),
        "total_frames": sum(len(recording.states) for recording in recordings),
        "total_tasks": len(tasks),
        "total_videos": len(recordings) * len(recordings[0].frames),
        "total_chunks": 1,
        "chunks_size": 2,
        "fps": float(FPS),
        "splits": {"train": f"0:{len(recordings)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
        "something_unknown": {"is": "ignored"},
    }
    (meta / "info.json").write_text(json.dumps(info))
    write_lines(meta / "tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    write_lines(
        meta / "episodes.jsonl",
        [
            {"episode_index": i, "tasks": [recording.instruction], "length": len(recording.states)}
            for i, recording in enumerate(recordings)
        ],
    )
    first_row = 0
    for index, recording in enumerate(recordings):
        length = len(recording.states)
        table = pa.table(
            {
                "observation.state": pa.array(list(recording.states), pa.list_(pa.float32())),
                "action": pa.array(list(recording.actions), pa.list_(pa.float32())),
                "timestamp": pa.array(np.arange(length) / FPS, pa.float32()),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, index),
                "index": np.arange(first_row, first_row + length),
                "task_index": np.full(length, tasks.index(recording.instruction)),
            }
        )
        path = root / f"data/chunk-{index // 2:03d}/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for name, frames in recording.frames.items():
            encode_mp4(
                root / f"videos/chunk-{index // 2:03d}/observation.images.{name}/episode_{index:06d}.mp4", frames
            )
        first_row += length
    return root


def write_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_table(path: Path, edit: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    pq.write_table(edit(pq.read_table(path)), path, **options)


def set_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def replace_video(root: Path, name: str, episode: int, camera: str = "top") -> None:
    """Encode other frames in place of an mp4 of `record`, with the same number of frames."""
    encode_mp4(root / name, 255 - record()[episode].frames[camera])
