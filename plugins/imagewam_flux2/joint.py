"""The published joint step: the editor learns the future picture, the expert the actions, in one forward of both.

Text and reference attend to each other, the target to them and itself, the actions to text, reference and themselves,
never to the target. So the forward splits without loss: the prefix once, then target and actions, each on its keys and
values. The whole editor sequence is modulated with the target's noise level. No gradient is stopped: the action loss
reaches the editor through K and V. Source: arXiv 2606.19531 and its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.expert.flow import FlowSchedule, add_noise, velocity
from imagewam_cli.expert.model import ActionExpert, masked_flow_loss
from imagewam_cli.plugin import PrefixKV, Text
from imagewam_flux2.tokens import REFERENCE_T, FluxTokens, image_ids

VIDEO_WEIGHT, ACTION_WEIGHT = 0.5, 1.0


@dataclass(frozen=True, kw_only=True)
class JointBatch:
    """B rows with their noise. Noise levels in [0, 1], (B,)."""

    text: Text
    """With the state's token, where there is one."""
    reference: Tensor
    """Tokens of the current picture, (B, R, C)."""
    target: Tensor
    """Tokens of the future picture, (B, R, C)."""
    grid: tuple[int, int]
    """(rows, columns) of either."""
    actions: Tensor
    """Normalised chunks, (B, T, A)."""
    is_pad: Tensor
    """bool (B, T): steps beyond the episode's end."""
    dim_is_pad: Tensor | None = None
    """bool (B, A): dimensions that the robot does not have."""
    video_noise: Tensor
    action_noise: Tensor
    video_t: Tensor
    action_t: Tensor


@dataclass(frozen=True, kw_only=True)
class JointStep:
    """Velocities (B, R, C) and (B, T, A), and the losses before their weights."""

    video_velocity: Tensor
    action_velocity: Tensor
    video_loss: Tensor
    action_loss: Tensor

    @property
    def loss(self) -> Tensor:
        """What is minimised."""
        return VIDEO_WEIGHT * self.video_loss + ACTION_WEIGHT * self.action_loss


def joint_step(tokens: FluxTokens, expert: ActionExpert, batch: JointBatch, schedule: FlowSchedule) -> JointStep:
    """One forward of editor and expert, with gradients."""
    ids = image_ids(*batch.grid, t=REFERENCE_T)
    prefix = tokens.prefix(batch.text, batch.reference, ids, timestep=batch.video_t, grad=True)
    noisy_target = add_noise(batch.target, batch.video_noise, batch.video_t)
    video = tokens.target_velocity(prefix, noisy_target, batch.video_t, batch.grid)
    noisy_actions = add_noise(batch.actions, batch.action_noise, batch.action_t)
    seen = PrefixKV(tuple(prefix.layers.values()), prefix.valid)
    action = expert(noisy_actions, batch.action_t, None, seen)
    return JointStep(
        video_velocity=video,
        action_velocity=action,
        video_loss=video_flow_loss(video, velocity(batch.target, batch.video_noise), schedule.weight(batch.video_t)),
        action_loss=masked_flow_loss(
            action,
            velocity(batch.actions, batch.action_noise),
            batch.is_pad,
            schedule.weight(batch.action_t),
            batch.dim_is_pad,
        ),
    )


def video_flow_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error over tokens and channels (B, R, C), times the weight (B,), then the mean. Float32 inside."""
    error = F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2))
    return torch.mean(error * weight)
