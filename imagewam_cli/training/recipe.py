"""Settings of a training run, read from YAML. Defaults suit the embedded demonstration on two cores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from imagewam_cli.data.normalization import NormalizationMode


@dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """Shape of the action expert and of its action chunks."""

    horizon: int = 10
    """Number of steps in an action chunk."""
    hidden: int = 192
    """Width of the expert."""
    mlp_ratio: float = 2.0
    """Width of the MLPs, relative to `hidden`."""
    blocks_per_layer: int = 1
    """Number of consecutive blocks per kept layer. More keep the expert deep if few layers were kept."""
    places: bool = True
    """Add a learned map of each picture token's coordinates to its value. Published experts do not."""
    use_prefix: bool = True
    """If False, the expert sees only the robot's state."""
    init: Literal["none", "published", "repaired"] = "none"
    """Initial weights of the blocks: random, or the editor's, resized; see `imagewam_cli.expert.initialization`."""

    def __post_init__(self) -> None:
        _require(self.horizon >= 1, f"expert.horizon must be at least 1, got {self.horizon}")
        _require(self.hidden >= 1, f"expert.hidden must be at least 1, got {self.hidden}")
        _require(self.mlp_ratio > 0, f"expert.mlp_ratio must be positive, got {self.mlp_ratio}")
        _require(self.blocks_per_layer >= 1, f"expert.blocks_per_layer must be at least 1, got {self.blocks_per_layer}")


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """Settings of flow matching."""

    shift: float = 2.0
    """Shift of the noise schedule. The published value is 5."""
    inference_steps: int = 10
    """Euler steps when acting."""
    draws: int = 2
    """Independent (noise, t) draws per row and step. They share the row's prefix."""

    def __post_init__(self) -> None:
        _require(self.shift > 0, f"flow.shift must be positive, got {self.shift}")
        _require(self.inference_steps >= 1, f"flow.inference_steps must be at least 1, got {self.inference_steps}")
        _require(self.draws >= 1, f"flow.draws must be at least 1, got {self.draws}")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """Settings of the optimizer, its learning rate, and the average of the weights."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon` uses Muon for the matrices of the blocks and AdamW for the rest; published experts use `adamw`."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_fraction: float = 0.05
    """Fraction of the steps over which the learning rate rises."""
    final_fraction: float = 0.01
    """Final learning rate, as a fraction of its peak."""
    clip_norm: float = 1.0
    """Upper bound on the norm of the gradient."""
    ema: float = 0.995
    """Decay per step of the exponential moving average of the weights."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.clip_norm > 0, f"optimizer.clip_norm must be positive, got {self.clip_norm}")
        _require(0 <= self.ema < 1, f"optimizer.ema must be in [0, 1), got {self.ema}")
        for name in ("warmup_fraction", "final_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe:
    """Settings of the trained policy when it acts."""

    execute: int = 5
    """Number of actions to execute before the next observation."""
    noise_seed: int = 42
    """Seed of the initial noise of every action chunk."""


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Everything that decides the result of a run, except its prefixes. Saved as `config.yaml` of the run."""

    steps: int = 1500
    """Number of optimizer steps."""
    batch: int = 64
    """Rows per step."""
    seed: int = 0
    validation_fraction: float = 0.1
    """Fraction of the episodes to hold out."""
    validation_rows: int = 128
    """Maximum number of held-out rows per validation."""
    episodes: int | None = None
    """Use only the first N training episodes."""
    shuffle: Literal["rows", "shards"] = "rows"
    """`rows` shuffles all rows of an epoch. `shards` shuffles four shards at a time, for caches larger than memory,
    where `rows` would read each row from disk separately."""
    normalize_action: NormalizationMode = "min_max"
    normalize_state: NormalizationMode = "min_max"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights and sums stay float32. `auto`: bfloat16 if the CPU supports it."""
    log_every: int = 20
    """Steps between records of the loss."""
    validate_every: int = 250
    """Steps between validations."""
    save_every: int = 250
    """Steps between checkpoints."""
    expert: ExpertRecipe = field(default_factory=ExpertRecipe)
    flow: FlowRecipe = field(default_factory=FlowRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    policy: PolicyRecipe = field(default_factory=PolicyRecipe)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "validate_every", "save_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "validation_rows"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.episodes is None or self.episodes >= 1, f"episodes must be at least 1, got {self.episodes}")
        fraction = self.validation_fraction
        _require(0.0 <= fraction < 1.0, f"validation_fraction must be in [0, 1), got {fraction}")
        _require(
            1 <= self.policy.execute <= self.expert.horizon,
            f"policy.execute {self.policy.execute} must be between 1 and the horizon {self.expert.horizon}",
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to `final_fraction` of the peak."""
        o = self.optimizer
        warmup = max(1, round(o.warmup_fraction * self.steps))
        if step < warmup:
            return o.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return o.learning_rate * (o.final_fraction + (1 - o.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
