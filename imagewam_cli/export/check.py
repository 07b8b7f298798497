"""Compare ONNX files with torch: each graph separately, then the whole export, from raw pictures to actions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime import InferenceSession

from imagewam_cli.data.types import Observation
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.policy.loading import live_prefix, prefix_arrays
from imagewam_cli.policy.policy import Policy
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.runtime.export_folder import ExportFolder
from imagewam_cli.runtime.onnx_policy import OnnxPolicy, run, session

Array = npt.NDArray[Any]


def measure(folder: Path, policy: Policy, observations: Sequence[Observation]) -> dict[str, float]:
    """Measure the maximum absolute difference from torch of each check, on all rows as one batch and on single rows.

    prefix: K and V of `prefix.onnx`, if it exists; step: velocities on torch's prefix at every noise level; loop:
    chunks on torch's prefix; chunk: `OnnxPolicy.chunks` from raw observations, in normalized actions, so the error
    does not depend on the robot's units.
    """
    has_prefix = (folder / "prefix.onnx").exists()
    exported = OnnxPolicy.load(ExportFolder.open(folder), encode=None if has_prefix else live_prefix(policy.editor))
    step = session(folder / exported.description["files"]["step"])
    scale = policy.parts.action_normalizer.scale
    worst: dict[str, float] = {}
    for rows in (list(observations), *([o] for o in observations)):
        prefix = policy.prefix(rows)
        arrays = prefix_arrays(prefix, policy.expert.config.layers)
        if has_prefix:
            _keep(worst, "prefix", _difference(exported.prefix(rows), arrays))
        for mine, theirs in _velocities(step, policy, rows, prefix):
            _keep(worst, "step", _max_abs(mine - theirs))
        chunk = exported.normalized_chunks(arrays, exported.normalized_state(rows))
        _keep(worst, "loop", _max_abs(chunk - _chunk(policy, rows, prefix)))
        _keep(worst, "chunk", _max_abs((exported.chunks(rows) - policy.chunks(rows)) * scale))
    return worst


def _velocities(
    step: InferenceSession, policy: Policy, rows: Sequence[Observation], prefix: PrefixKV
) -> Iterator[tuple[Array, Array]]:
    """Yield the velocities (onnxruntime's, torch's) of the policy's noise at each noise level of its loop."""
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
    """Return torch's normalized chunk, from the loop that training and evaluation use."""
    config = policy.parts.config
    noise, state = policy.initial_noise(len(rows)), policy.normalized_state(rows)
    with torch.no_grad():
        chunk = integrate(policy.expert, noise, state, prefix, FlowSchedule(shift=config.shift), config.inference_steps)
    return chunk.numpy()


def _difference(mine: Mapping[str, Array], theirs: dict[str, Array]) -> float:
    """Return the maximum difference over the tensors of a prefix; infinite if names, shapes or masks differ."""
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in theirs):
        return float("inf")
    if "valid" in theirs and not np.array_equal(mine["valid"], theirs["valid"]):
        return float("inf")
    return max(_max_abs(mine[name] - theirs[name]) for name in theirs if name != "valid")


def _max_abs(difference: Array) -> float:
    return float(np.abs(difference).max())


def _keep(worst: dict[str, float], check: str, error: float) -> None:
    """Keep the maximum error of a check; NaN stays NaN."""
    worst[check] = float(np.maximum(worst.get(check, 0.0), error))
