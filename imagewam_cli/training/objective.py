"""Compute the flow-matching loss of a batch, and the errors of a validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imagewam_cli.expert.flow import FlowSchedule, add_noise, velocity
from imagewam_cli.expert.model import ActionExpert, masked_flow_loss
from imagewam_cli.expert.sampler import initial_noise, integrate
from imagewam_cli.training.data import Batch


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Errors on held-out episodes: mean squared errors in normalized units, without padded steps."""

    loss: float
    """Flow loss at fixed noise and times."""
    action_error: float
    """Error of the sampled chunks."""
    constant_error: float
    """Error of the best constant chunk, the per-step mean of the validation chunks: the lowest
    possible error of a policy that ignores its observations."""

    @property
    def ratio(self) -> float:
        """Ratio of action_error to constant_error. Below 1, the policy beats a constant chunk."""
        return self.action_error / max(self.constant_error, 1e-12)


def flow_loss(
    expert: ActionExpert, batch: Batch, schedule: FlowSchedule, draws: int, generator: torch.Generator
) -> Tensor:
    """Return the flow loss over `draws` independent (noise, t) per row. The draws of a row are adjacent."""
    actions = batch.actions.repeat_interleave(draws, dim=0)
    noise = torch.randn(actions.shape, generator=generator)
    t = schedule.sample(len(actions), generator)
    predicted = expert(add_noise(actions, noise, t), t, batch.state.repeat_interleave(draws, dim=0), batch.prefix)
    pad = batch.is_pad.repeat_interleave(draws, dim=0)
    return masked_flow_loss(predicted, velocity(actions, noise), pad, schedule.weight(t))


def validate(
    expert: ActionExpert, batches: list[Batch], schedule: FlowSchedule, *, steps: int, noise_seed: int
) -> Validation:
    """Return the errors over all rows of `batches`. steps: Euler steps of the sampler."""
    losses, errors, counts = [], [], []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(i)  # the same noise in every validation, so losses are comparable
            losses.append(float(flow_loss(expert, batch, schedule, 1, generator)) * len(batch.actions))
            rows, horizon, dimensions = batch.actions.shape
            noise = initial_noise(rows, horizon, dimensions, seed=noise_seed)
            chunk = integrate(expert, noise, batch.state, batch.prefix, schedule, steps)
            keep = (~batch.is_pad).float()
            errors.append(float(((chunk - batch.actions).square().mean(-1) * keep).sum()))
            counts.append(float(keep.sum()))
    total = sum(len(b.actions) for b in batches)
    return Validation(
        loss=sum(losses) / total,
        action_error=sum(errors) / sum(counts),
        constant_error=_constant_error(batches),
    )


def _constant_error(batches: list[Batch]) -> float:
    actions = torch.cat([b.actions for b in batches])
    keep = (~torch.cat([b.is_pad for b in batches])).float()[..., None]
    mean = (actions * keep).sum(0) / keep.sum(0).clamp(min=1)
    return float((((actions - mean).square() * keep).mean(-1)).sum() / keep.sum())
