"""Describe a policy for `imagewam info`: a bundle, the policy of a run, or an ONNX export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagewam_cli.policy.bundle import BundleParts


def describe_bundle(path: Path) -> dict[str, Any]:
    """Describe a policy folder as JSON values. Raises: RunError: it is damaged."""
    from imagewam_cli.config import to_dict
    from imagewam_cli.files import file_sizes
    from imagewam_cli.policy.bundle import read_bundle

    parts, sizes = read_bundle(path), file_sizes(path)
    return {
        "kind": "policy",
        "editor": parts.editor.name,
        **to_dict(parts.config),
        **_normalization(parts),
        "fingerprint": dict(parts.editor.fingerprint),
        "bytes": sum(sizes.values()),
        "files": dict(sizes),
    }


def describe_run_policy(run: Path) -> dict[str, Any]:
    """Describe the size of a run, how its policy normalizes, and the policy; None before the run is finished."""
    from imagewam_cli.policy.bundle import POLICY, read_bundle
    from imagewam_cli.workspace import folder_size

    folder = run / "policy"
    finished = (folder / POLICY).exists()
    normalized = _normalization(read_bundle(folder)) if finished else {}
    return {**normalized, "bytes": folder_size(run), "policy": describe_bundle(folder) if finished else None}


def describe_export(path: Path) -> dict[str, Any]:
    """Describe an ONNX export as JSON values. "damage" compares sizes only: loading the export reads every byte.

    Raises:
        RunError: its description is missing or damaged.
    """
    from imagewam_cli.files import file_sizes
    from imagewam_cli.policy.acting import own_errors
    from imagewam_cli.policy.loading import unscaled_actions
    from imagewam_cli.runtime.export_folder import MIN_ONNXRUNTIME, ExportFolder

    with own_errors():
        export = ExportFolder.open(path)
    description, sizes, listed = export.description, file_sizes(path), export.file_checksums
    damages = {name: export.damage(name, content=False) for name in listed}
    minimum, action = description.get(MIN_ONNXRUNTIME), description["action"]
    # an older export has no key `constant`
    constants = zip(action["names"], action.get("constant", [None] * len(action["names"])), strict=True)
    return {
        "kind": "onnx export",
        "editor": description["editor"]["name"],
        "needs_editor": description["prefix"] is None,
        "onnxruntime": None if minimum is None else f">={minimum}",
        "cameras": description["cameras"],
        "state_names": description["state"]["names"],
        "action_names": action["names"],
        "constant_actions": {name: value for name, value in constants if value is not None},
        "unscaled_actions": unscaled_actions(description),
        "fps": description["fps"],
        "horizon": description["horizon"],
        "execute": description["execute"],
        "errors": description.get("errors"),
        "damage": [f"{name} {damage}" for name, damage in damages.items() if damage is not None],
        "notes": list(export.notes),
        "fingerprint": description["editor"]["fingerprint"],
        "bytes": sum(sizes.values()),
        "files": dict(sizes),
        "sha256": {name: entry["sha256"] for name, entry in listed.items()},
    }


def _normalization(parts: BundleParts) -> dict[str, Any]:
    """Describe how a policy normalizes: modes, constant dimensions, and what an older rule does badly."""
    from imagewam_cli.data.dimensions import constant_values, unscaled_names
    from imagewam_cli.policy.bundle import inherited_faults

    config, state, action = parts.config, parts.state_normalizer, parts.action_normalizer
    return {
        "normalize_state": state.mode,
        "normalize_action": action.mode,
        "constant_states": constant_values(config.state_names, state),
        "constant_actions": constant_values(config.action_names, action),
        "unscaled_actions": unscaled_names(config.action_names, action),
        "normalization_faults": inherited_faults(parts),
    }
