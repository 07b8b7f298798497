"""Flow matching: noise levels, loss weights and the Euler grid, independent of any model.

t = 1 is noise, t = 0 is data. With shift s the noise level of a uniform u is phi(u) = s u / (1 + (s - 1) u).
Source: arXiv 2606.19531 and its published scheduler (1000 steps, shift 5 for training and inference).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Noise levels, their loss weights and the Euler grid, for one shift."""

    shift: float = 5.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def level(self, u: Tensor) -> Tensor:
        """Map uniform numbers u in [0, 1] to noise levels phi(u) of the same shape."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `count` noise levels for training, float32 (count,)."""
        return self.level(torch.rand(count, generator=generator, dtype=torch.float32))

    def weight(self, t: Tensor) -> Tensor:
        """Return the loss weights of noise levels t: a bell around t = 0.5 with mean 1 over sampled levels."""
        low, mean = _weight_constants(self.shift)
        return (_bell(t * TRAIN_STEPS) - low) / (mean + 1e-10)

    def grid(self, steps: int) -> Tensor:
        """Return the noise levels, from 1 down to 0, of `steps` Euler steps: float32 (steps + 1,)."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return self.level(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32))


def add_noise(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) data + t noise, for t (B,) and data (B, ...)."""
    t = t.view(-1, *([1] * (data.ndim - 1))).to(data.dtype)
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return the training target d x_t / d t = noise - data."""
    return noise - data


def _bell(tau: Tensor) -> Tensor:
    return torch.exp(-2 * ((tau - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)


@functools.cache
def _weight_constants(shift: float) -> tuple[float, float]:
    """Return the bell's minimum, and its mean above that, over the grid phi(k / 1000), k = 1..1000."""
    u = torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    bell = _bell(TRAIN_STEPS * shift * u / (1 + (shift - 1) * u))
    low = float(bell.min())
    mean = float((bell - low).mean())
    if not math.isfinite(mean) or mean <= 0:
        raise ValueError(f"shift {shift} leaves no range of noise levels")
    return low, mean
