"""Check that lerobot reads the same frames of a recorded dataset as imagewam.

lerobot 0.6 needs Python 3.12 and pins its dependencies, so each command runs in its own environment:

    python examples/open_with_lerobot.py write DATASET frames.npz     where imagewam is installed
    python examples/open_with_lerobot.py compare DATASET frames.npz   where lerobot[dataset] is installed

If the frames differ, the second command names the first frame and key that do and exits with 1. Pixels may differ by 2
of 255, because each library decodes the video with its own FFmpeg.
"""

import sys

import numpy as np

PIXEL_TOLERANCE = 2


def write(dataset: str, frames: str) -> None:
    from pathlib import Path

    from imagewam_cli.data.formats import open_dataset

    rows = list(open_dataset(Path(dataset)).rows())
    values = {
        "observation.state": np.stack([r.state for r in rows]),
        "action": np.stack([r.action for r in rows]),
        "episode_index": np.array([r.episode for r in rows]),
        "frame_index": np.array([r.frame for r in rows]),
        "task": np.array([r.instruction for r in rows]),
    }
    for camera in rows[0].images:
        values[f"observation.images.{camera}"] = np.stack([r.images[camera] for r in rows])
    np.savez_compressed(frames, **values)
    print(f"{len(rows)} frames of {rows[-1].episode + 1} episodes written")


def compare(dataset: str, frames: str) -> None:
    import lerobot
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    expected = np.load(frames)
    theirs = LeRobotDataset("local/recorded", root=dataset, video_backend="pyav")
    count = len(expected["action"])
    if len(theirs) != count:
        sys.exit(f"lerobot reads {len(theirs)} frames, imagewam {count}")
    worst = 0
    for i in range(count):
        item = theirs[i]
        for key in expected.files:
            ours = expected[key][i]
            if key.startswith("observation.images."):
                given = (item[key].permute(1, 2, 0) * 255).round().numpy().astype(np.int16)
                difference = int(np.abs(given - ours.astype(np.int16)).max())
                worst = max(worst, difference)
                same = difference <= PIXEL_TOLERANCE
            else:
                same = item[key] == str(ours) if key == "task" else np.array_equal(np.asarray(item[key]), ours)
            if not same:
                sys.exit(f"frame {i}, {key}: lerobot reads {item[key]}, imagewam {ours}")
    print(
        f"lerobot {lerobot.__version__} reads the same {count} frames; keys {', '.join(expected.files)}; "
        f"pixels differ by at most {worst} of 255"
    )


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("write", "compare"):
        sys.exit(__doc__)
    {"write": write, "compare": compare}[sys.argv[1]](sys.argv[2], sys.argv[3])
