"""Describe an ONNX export in `onnx.json`: everything that a runtime needs besides the graphs.

`runtime.export_folder` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagewam_cli.config import to_dict
from imagewam_cli.data.dimensions import unscaled_names
from imagewam_cli.data.normalization import CLAMP, Normalizer
from imagewam_cli.editors.contract import PrefixGraph
from imagewam_cli.policy.bundle import BundleParts
from imagewam_cli.runtime.export_folder import MIN_ONNXRUNTIME, VERSION

_ERASING = 2.0**300


def describe(
    parts: BundleParts,
    prefix: PrefixGraph | None,
    *,
    files: Mapping[str, str],
    opset: int,
    min_onnxruntime: str,
    levels: Sequence[float],
) -> dict[str, Any]:
    """Return the content of `onnx.json`, except the measured errors and the checksums.

    levels: noise levels of the loop; min_onnxruntime: oldest version of onnxruntime that reads the graphs.
    """
    config = parts.config
    clamp = None if parts.state_normalizer.mode == "identity" else CLAMP
    return {
        "version": VERSION,
        "files": dict(files),
        "opset": opset,
        MIN_ONNXRUNTIME: min_onnxruntime,
        "editor": {"name": parts.editor.name, "fingerprint": dict(parts.editor.fingerprint)},
        "cameras": config.cameras,
        "keys": None if config.keys is None else to_dict(config.keys),
        "horizon": config.horizon,
        "execute": config.execute,
        "fps": config.fps,
        "inference_steps": config.inference_steps,
        "levels": list(levels),
        "noise_seed": config.noise_seed,
        "state": {"names": config.state_names, **_forward(parts.state_normalizer), "clamp": clamp},
        "action": {
            "names": config.action_names,
            **_backward(parts.action_normalizer),
            "unscaled": unscaled_names(config.action_names, parts.action_normalizer),
        },
        "prefix": None if prefix is None else prefix_inputs(prefix),
        "training": None if parts.training is None else to_dict(parts.training),
    }


def prefix_inputs(graph: PrefixGraph) -> dict[str, Any]:
    """Describe how to make the inputs of `prefix.onnx` from pictures and instructions."""
    height, width = graph.image_size
    return {
        "cameras": graph.cameras,
        "height": height,
        "width": width,
        "resize": "bilinear",
        "grey": graph.grey,
        "before": graph.before,
        "after": graph.after,
        "pad_id": graph.pad_id,
        "max_tokens": graph.max_tokens,
        "pad_to": graph.pad_to,
    }


def _forward(normalizer: Normalizer) -> dict[str, Any]:
    """Return scale and offset of: normalized = value * scale + offset. Constant dimensions are multiplied by 0."""
    moving = ~normalizer.constant
    return {"scale": (normalizer.scale * moving).tolist(), "offset": (normalizer.offset * moving).tolist()}


def _backward(normalizer: Normalizer) -> dict[str, Any]:
    """Return scale and offset of: value = (normalized - offset) / scale.

    A constant dimension has a scale so large that nothing is left of the normalized value, and of its constant
    everything, because the scale is a power of two. A copy of `policy.py` from before the key `constant` therefore
    returns the constant too.
    """
    constant, constants = normalizer.constant, normalizer.constants
    scale = np.where(constant, _ERASING, normalizer.scale)
    described: dict[str, Any] = {
        "scale": scale.tolist(),
        "offset": np.where(constant, -constants * _ERASING, normalizer.offset).tolist(),
    }
    if constant.any():
        described["constant"] = [float(c) if fixed else None for c, fixed in zip(constants, constant, strict=True)]
    if normalizer.dtype is np.float64:
        described["dtype"] = "float64"
    return described
