"""Small datasets whose features have the names, types and shapes that other projects give them.

| style | state and action | instruction |
|---|---|---|
| `lerobot` | `observation.state`, `action` | the task |
| `libero` (openpi) | `state`, `actions`, pictures without a prefix | the task |
| `groot` (GR00T) | `observation.state`, `action` | an index into the tasks; the task is an environment |
| `droid` (openpi) | two features of state, `actions` | a text column; the task is empty |
| `agibot` (AgiBot World) | many features of state and action, of shapes [n], [2, n] and [1] | the task |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.feature_sets import LENGTHS, Column, write_features

TOTAL = sum(LENGTHS)
SIZE = (48, 64)
ARM = ["j0", "j1", "j2"]


@dataclass(frozen=True, kw_only=True)
class KeyStyle:
    """One style: what is written, the options that read it, and what a policy of it must know."""

    columns: Mapping[str, Column]
    cameras: Sequence[str]
    tasks: Sequence[str]
    options: Sequence[str] = ()
    state_names: Sequence[str]
    action_names: Sequence[str]
    instructions: Sequence[str]

    def write(self, root: Path) -> Path:
        return write_features(
            root, self.columns, cameras=dict.fromkeys(self.cameras, SIZE), tasks=self.tasks, lengths=LENGTHS
        )


STYLES: Mapping[str, KeyStyle] = {
    "lerobot": KeyStyle(
        columns={
            "observation.state": Column(shape=[3], names=ARM),
            "action": Column(shape=[2], names={"motors": ["x", "y"]}),
        },
        cameras=["observation.images.top"],
        tasks=["push the red cube", "open the drawer"],
        state_names=ARM,
        action_names=["x", "y"],
        instructions=["push the red cube", "open the drawer"],
    ),
    "libero": KeyStyle(
        columns={"state": Column(shape=[4], names=["state"]), "actions": Column(shape=[3], names=["actions"])},
        cameras=["image", "wrist_image"],
        tasks=["put the bowl on the plate"],
        options=["--state-key", "state", "--action-key", "actions"],
        state_names=["state_0", "state_1", "state_2", "state_3"],
        action_names=["actions_0", "actions_1", "actions_2"],
        instructions=["put the bowl on the plate"],
    ),
    "groot": KeyStyle(
        columns={
            "observation.state": Column(dtype="float64", shape=[3], names=ARM),
            "action": Column(dtype="float64", shape=[3], names=ARM),
            "annotation.human.action.task_description": Column(dtype="int64", values=[1] * 6 + [2] * (TOTAL - 6)),
            "annotation.human.validity": Column(dtype="int64", values=[3] * TOTAL),
            "next.reward": Column(),
        },
        cameras=["observation.images.ego_view"],
        tasks=["PnPFromTrayToPot", "pick the cup from the tray", "put the cup into the pot", "valid"],
        options=["--instruction-key", "annotation.human.action.task_description"],
        state_names=ARM,
        action_names=ARM,
        instructions=["pick the cup from the tray", "put the cup into the pot"],
    ),
    "droid": KeyStyle(
        columns={
            "joint_position": Column(shape=[3], names=["joint_position"]),
            "gripper_position": Column(shape=[1], names=["gripper_position"]),
            "actions": Column(shape=[4], names=["actions"]),
            "language_instruction": Column(dtype="string", values=["put the pen in the cup"] * TOTAL),
        },
        cameras=["exterior_image_1_left", "wrist_image_left"],
        tasks=[""],
        options=[
            "--state-key",
            "joint_position,gripper_position",
            "--action-key",
            "actions",
            "--instruction-key",
            "language_instruction",
        ],
        state_names=["joint_position_0", "joint_position_1", "joint_position_2", "gripper_position"],
        action_names=["actions_0", "actions_1", "actions_2", "actions_3"],
        instructions=["put the pen in the cup"],
    ),
    "agibot": KeyStyle(
        columns={
            "observation.states.joint.position": Column(shape=[3], names=ARM),
            "observation.states.end.position": Column(shape=[2, 2], names={"motors": ["lx", "ly", "rx", "ry"]}),
            "observation.states.effector.position": Column(shape=[1]),
            "actions.joint.position": Column(shape=[3], names=ARM),
            "actions.effector.position": Column(shape=[1]),
        },
        cameras=["observation.images.head", "observation.images.hand_left"],
        tasks=["pickup items in the supermarket"],
        options=[
            "--state-key",
            "observation.states.joint.position,observation.states.end.position,observation.states.effector.position",
            "--action-key",
            "actions.joint.position,actions.effector.position",
        ],
        state_names=[*ARM, "lx", "ly", "rx", "ry", "observation.states.effector.position_0"],
        action_names=[*ARM, "actions.effector.position_0"],
        instructions=["pickup items in the supermarket"],
    ),
}
