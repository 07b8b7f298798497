"""Robot settings that a checkpoint does not contain: cameras, image size, normalization, names, action transforms.

Source: arXiv 2606.19531, its data and evaluation code for LIBERO and RoboTwin.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagewam_cli.data.normalization import NormalizationMode
from imagewam_cli.errors import UnknownNameError
from imagewam_cli.policy.action_transforms import ActionTransform, GripperSign

PROMPT = "A video recorded from a robot's point of view executing the following instruction: {instruction}"


@dataclass(frozen=True, kw_only=True)
class Robot:
    """The robot of one benchmark.

    image_size: (height, width) of all cameras in one picture; normalization: mode for state and action.
    """

    cameras: tuple[str, ...]
    camera_layout: str
    image_size: tuple[int, int]
    normalization: NormalizationMode
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_transforms: tuple[ActionTransform, ...]
    horizon: int
    execute: int
    fps: float
    """Nominal control rate in Hz, for information only."""


_JOINTS = tuple(f"{arm}_{part}" for arm in ("left", "right") for part in (*map(str, range(1, 7)), "gripper"))

ROBOTS = {
    "libero": Robot(
        cameras=("image", "wrist_image"),
        camera_layout="tile",
        image_size=(224, 448),
        normalization="min_max",
        state_names=("x", "y", "z", "rx", "ry", "rz", "finger_1", "finger_2"),
        action_names=("x", "y", "z", "rx", "ry", "rz", "gripper"),
        action_transforms=(GripperSign(["gripper"]),),
        horizon=16,
        execute=12,
        fps=20.0,
    ),
    "robotwin": Robot(
        cameras=("cam_high", "left_wrist", "right_wrist"),
        camera_layout="head-over-wrists",
        image_size=(288, 256),
        normalization="mean_std",
        state_names=_JOINTS,
        action_names=_JOINTS,
        action_transforms=(),
        horizon=16,
        execute=16,
        fps=30.0,
    ),
}


def robot_preset(name: str) -> Robot:
    """Return the robot preset called `name`.

    Raises:
        UnknownNameError: there is no such preset; the error suggests the nearest.
    """
    if name not in ROBOTS:
        raise UnknownNameError("robot", name, ROBOTS)
    return ROBOTS[name]
