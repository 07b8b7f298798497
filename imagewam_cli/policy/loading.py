"""Load a run, a policy bundle or an ONNX export as a `ChunkPolicy`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imagewam_cli.config import from_dict
from imagewam_cli.data.types import FloatArray, KeyMap, Observation
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.errors import ConfigError, RunError, install_hint, warn
from imagewam_cli.policy.acting import ChunkPolicy, own_errors
from imagewam_cli.policy.bundle import EDITOR, EditorReference, TrainingRecord
from imagewam_cli.policy.matching import Interface
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import LayerSpec
from imagewam_cli.runtime.export_folder import ExportFolder
from imagewam_cli.runtime.observation import ObservationLike
from imagewam_cli.workspace import ONNX_MARKER

if TYPE_CHECKING:
    from imagewam_cli.policy.policy import Policy
    from imagewam_cli.runtime.onnx_policy import Encode, OnnxPolicy


def load_policy(path: Path, hardware: Hardware = CPU, weights: Path | None = None) -> Policy | ExportedPolicy:
    """Load the policy in the folder `path`: a run, a bundle, or an ONNX export.

    hardware, weights: device and weights of the live editor. An ONNX export with a prefix graph needs no editor and
    ignores them.

    Raises:
        UsageError: this machine lacks the device.
        RunError: the folder contains no policy, the policy is damaged or has a different version, or the editor is not
            the one that it was trained with.
    """
    if (path / ONNX_MARKER).exists():
        return ExportedPolicy.load(path, hardware=hardware, weights=weights)
    from imagewam_cli.policy.policy import Policy

    return Policy.load(path, hardware=hardware, weights=weights)


class ExportedPolicy(ChunkPolicy):
    """An ONNX export as a `ChunkPolicy`, with imagewam's errors."""

    def __init__(self, policy: OnnxPolicy) -> None:
        self.onnx = policy
        self.execute = policy.execute
        self.horizon = int(policy.description["horizon"])
        self.cameras: tuple[str, ...] = tuple(policy.description["cameras"])
        keys = policy.description.get("keys")
        self.keys: KeyMap | None = None if keys is None else from_dict(KeyMap, keys, source=ONNX_MARKER)

    @classmethod
    def load(cls, folder: Path, *, hardware: Hardware = CPU, weights: Path | None = None) -> ExportedPolicy:
        """Load an ONNX export. Arguments and errors are those of `load_policy`."""
        from imagewam_cli.runtime.onnx_policy import OnnxPolicy

        with own_errors():
            export = ExportFolder.open(folder)
            encode = live_prefix(_editor(folder, hardware, weights)) if export.description["prefix"] is None else None
            try:
                policy = cls(OnnxPolicy.load(export, encode=encode))
            except ModuleNotFoundError as error:
                raise RunError(f"{folder} needs {error.name}", install_hint("onnx")) from None
        for note in export.notes:
            warn(note)
        unscaled = unscaled_actions(export.description)
        if unscaled:
            warn(
                f"{folder}: action {', '.join(map(repr, unscaled))}: nearly constant in training, and not scaled by "
                "this export, so the model's error reaches the robot as it is; policies trained now return a constant "
                "exactly"
            )
        policy.folder = folder
        return policy

    @property
    def interface(self) -> Interface:
        description = self.onnx.description
        return Interface(
            what=str(self.folder or "the policy"),
            cameras=self.cameras,
            state_names=tuple(description["state"]["names"]),
            action_names=tuple(description["action"]["names"]),
            fps=float(description["fps"]),
        )

    @property
    def training(self) -> TrainingRecord | None:
        values = self.onnx.description.get("training")
        return None if values is None else from_dict(TrainingRecord, values, source=ONNX_MARKER)

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        """Plan a chunk for each observation, (B, T, A) in robot units. Errors are those of `Policy.chunks`."""
        with own_errors():
            return self.onnx.chunks(observations)

    def read(self, observations: Sequence[ObservationLike]) -> list[Observation]:
        with own_errors():
            return self.onnx.read(observations)


def unscaled_actions(description: Mapping[str, Any]) -> list[str]:
    """Return the actions that an export of an older policy shifts without scaling. description: its `onnx.json`.

    Exports made before the key `unscaled` are judged by their numbers: such a dimension has scale 1. One with scale 1
    and offset 0 is not named, because a range of [-1, 1] looks the same.
    """
    action = description["action"]
    if "unscaled" in action:
        return list(action["unscaled"])
    maps = zip(action["names"], action["scale"], action["offset"], strict=True)
    return [name for name, scale, offset in maps if scale == 1 and offset != 0]


def live_prefix(editor: Editor) -> Encode:
    """Return an encoder that runs the editor, for an `OnnxPolicy` without a prefix graph."""

    def encode(observations: Sequence[ObservationLike]) -> dict[str, npt.NDArray[Any]]:
        prefix = editor.encode([o.images for o in observations], [o.instruction for o in observations])
        return prefix_arrays(prefix, editor.spec.layers)

    return encode


def prefix_arrays(prefix: PrefixKV, layers: Sequence[LayerSpec]) -> dict[str, npt.NDArray[Any]]:
    """Convert a prefix to numpy arrays, named as in the ONNX graphs.

    `layer.{i}.k` and `layer.{i}.v`, float32 (B, P, H, D), and `valid`, bool (B, P), if a layer holds text.
    """
    import torch

    values = {}
    for i, kv in enumerate(prefix.layers):
        values[f"layer.{i}.k"] = kv.k.to("cpu", torch.float32).numpy()
        values[f"layer.{i}.v"] = kv.v.to("cpu", torch.float32).numpy()
    shapes = [values[f"layer.{i}.k"].shape[:2] for i, layer in enumerate(layers) if layer.holds_text]
    if prefix.valid is not None:
        values["valid"] = prefix.valid.cpu().numpy()
    elif shapes:
        values["valid"] = np.ones(shapes[0], dtype=np.bool_)
    return values


def _editor(folder: Path, hardware: Hardware, weights: Path | None) -> Editor:
    from imagewam_cli.policy.policy import load_policy_editor

    path = folder / EDITOR
    try:
        reference = from_dict(EditorReference, json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except FileNotFoundError:
        raise RunError(f"{path} is missing", "copy the whole export folder again") from None
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error.message}", error.hint) from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}", "copy the whole export folder again") from None
    return load_policy_editor(reference, hardware=hardware, weights=weights, bundle=folder)
