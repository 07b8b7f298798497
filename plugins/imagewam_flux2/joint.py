"""The published joint training step: the editor learns the future picture and the expert the actions, in one
forward pass.

Text and reference attend to each other. The target attends to them and to itself, and the actions attend to text,
reference and themselves, never to the target. The forward pass can therefore be split without changing the result:
first the prefix, then target and actions, each attending to the prefix's keys and values. The whole editor sequence is
modulated with the target's noise level. No gradient is stopped: the action loss reaches the editor through K and V.

Source: arXiv 2606.19531 and its code.
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
    """B rows with their noise. Noise levels `video_t` and `action_t` are (B,) in [0, 1]."""

    text: Text
    """Text states, with the token of the robot state if the policy has one."""
    reference: Tensor
    """Tokens of the current picture, (B, R, C)."""
    target: Tensor
    """Tokens of the future picture, (B, R, C)."""
    grid: tuple[int, int]
    """Numbers of (rows, columns) of `reference` and of `target`."""
    actions: Tensor
    """Normalized chunks, (B, T, A)."""
    is_pad: Tensor
    """bool (B, T), True at steps after the end of the episode."""
    dim_is_pad: Tensor | None = None
    """bool (B, A), True at dimensions that the robot does not have."""
    video_noise: Tensor
    action_noise: Tensor
    video_t: Tensor
    action_t: Tensor


@dataclass(frozen=True, kw_only=True)
class JointStep:
    """Predicted velocities of pictures (B, R, C) and actions (B, T, A), and the unweighted losses."""

    video_velocity: Tensor
    action_velocity: Tensor
    video_loss: Tensor
    action_loss: Tensor

    @property
    def loss(self) -> Tensor:
        """Weighted sum that training minimizes."""
        return VIDEO_WEIGHT * self.video_loss + ACTION_WEIGHT * self.action_loss


def joint_step(tokens: FluxTokens, expert: ActionExpert, batch: JointBatch, schedule: FlowSchedule) -> JointStep:
    """Run one forward pass of editor and expert, with gradients."""
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
    """Return the mean over rows of weight (B,) times squared error, itself a mean over (R, C). Computed in float32."""
    error = F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2))
    return torch.mean(error * weight)
