"""Whether the ONNX files say what torch says: every graph alone, then everything from raw picture to action."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imagewam_cli.data.types import Observation
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.policy.loading import live_prefix, prefix_arrays
from imagewam_cli.policy.policy import Policy
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.runtime.onnx_policy import OnnxPolicy, run, session

Array = npt.NDArray[Any]


def measure(folder: Path, policy: Policy, observations: Sequence[Observation]) -> dict[str, float]:
    """Greatest absolute difference from torch, check by check, over the rows all at once and one by one.

    prefix: K and V of `prefix.onnx` (only where there is one); step: velocities on torch's prefix at every noise level;
    loop: chunks on torch's prefix; chunk: `OnnxPolicy.chunks` from raw observations. The last is measured in normalised
    actions, so that it does not depend on the robot's units.
    """
    has_prefix = (folder / "prefix.onnx").exists()
    exported = OnnxPolicy.load(folder, encode=None if has_prefix else live_prefix(policy.editor))
    step = session(folder / exported.description["files"]["step"])
    scale = policy.parts.action_normalizer.scale
    worst: dict[str, float] = {}
    for rows in (list(observations), *([o] for o in observations)):
        prefix = policy.prefix(rows)
        arrays = prefix_arrays(prefix, policy.expert.config.layers)
        if has_prefix:
            _keep(worst, "prefix", _difference(exported.prefix(rows), arrays))
        for mine, theirs in _velocities(step, policy, rows, prefix):
            _keep(worst, "step", _greatest(mine - theirs))
        chunk = exported.normalized_chunks(arrays, exported.normalized_state(rows))
        _keep(worst, "loop", _greatest(chunk - _chunk(policy, rows, prefix)))
        _keep(worst, "chunk", _greatest((exported.chunks(rows) - policy.chunks(rows)) * scale))
    return worst


def _velocities(
    step: Any, policy: Policy, rows: Sequence[Observation], prefix: PrefixKV
) -> Iterator[tuple[Array, Array]]:
    """(onnxruntime's, torch's) velocity of the policy's noise at each noise level of its loop."""
    config = policy.parts.config
    noise, state = policy.initial_noise(len(rows)), policy.normalized_state(rows)
    for level in FlowSchedule(shift=config.shift).grid(config.inference_steps)[:-1]:
        t = level.expand(len(rows)).contiguous()
        with torch.no_grad():
            expected = policy.expert(noise, t, state, prefix)
        arrays = prefix_arrays(prefix, policy.expert.config.layers)
        feeds = {"noisy_actions": noise.numpy(), "t": t.numpy(), "state": state.numpy(), **arrays}
        yield run(step, feeds)["velocity"], expected.numpy()


def _chunk(policy: Policy, rows: Sequence[Observation], prefix: PrefixKV) -> Array:
    """Torch's normalised chunk, by the loop that training and evaluation use."""
    config = policy.parts.config
    noise, state = policy.initial_noise(len(rows)), policy.normalized_state(rows)
    with torch.no_grad():
        chunk = integrate(policy.expert, noise, state, prefix, FlowSchedule(shift=config.shift), config.inference_steps)
    return chunk.numpy()


def _difference(mine: Any, theirs: dict[str, Array]) -> float:
    """Over all tensors of a prefix; another name, shape or mask is infinitely far."""
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in theirs):
        return float("inf")
    if "valid" in theirs and not np.array_equal(mine["valid"], theirs["valid"]):
        return float("inf")
    return max(_greatest(mine[name] - theirs[name]) for name in theirs if name != "valid")


def _greatest(difference: Array) -> float:
    return float(np.abs(difference).max())


def _keep(worst: dict[str, float], check: str, error: float) -> None:
    """The greater of what was measured; NaN stays NaN."""
    worst[check] = float(np.maximum(worst.get(check, 0.0), error))
