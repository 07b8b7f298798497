"""Every number of a training run. Defaults suit the embedded demonstration on two cores; a YAML file overrides any of
them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from imagewam_cli.data.normalization import NormalizationMode


@dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """Shape of the expert and of what it predicts."""

    horizon: int = 10
    """Steps in an action chunk."""
    hidden: int = 192
    mlp_ratio: float = 2.0
    blocks_per_layer: int = 1
    """Where few layers were kept, more blocks beside each keep the expert deep."""
    places: bool = True
    """Values say where in the picture they come from; published experts do not."""
    use_prefix: bool = True
    init: Literal["none", "published", "repaired"] = "none"
    """The blocks' first weights from the editor's, resized; see `imagewam_cli.expert.initialization`."""

    def __post_init__(self) -> None:
        _require(self.horizon >= 1, f"expert.horizon must be at least 1, got {self.horizon}")
        _require(self.hidden >= 1, f"expert.hidden must be at least 1, got {self.hidden}")
        _require(self.mlp_ratio > 0, f"expert.mlp_ratio must be positive, got {self.mlp_ratio}")
        _require(self.blocks_per_layer >= 1, f"expert.blocks_per_layer must be at least 1, got {self.blocks_per_layer}")


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """Flow matching: the schedule's shift, Euler steps when acting, and draws per row."""

    shift: float = 2.0
    """Published: 5."""
    inference_steps: int = 10
    draws: int = 2
    """Independent (noise, t) draws per loaded prefix."""

    def __post_init__(self) -> None:
        _require(self.shift > 0, f"flow.shift must be positive, got {self.shift}")
        _require(self.inference_steps >= 1, f"flow.inference_steps must be at least 1, got {self.inference_steps}")
        _require(self.draws >= 1, f"flow.draws must be at least 1, got {self.draws}")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """How weights change. warmup_fraction: of the steps; final_fraction: of the learning rate, where it ends; ema: what
    the averaged weights keep of themselves in a step."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: for the matrices of the blocks, AdamW for the rest. Published: adamw."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.995

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.clip_norm > 0, f"optimizer.clip_norm must be positive, got {self.clip_norm}")
        _require(0 <= self.ema < 1, f"optimizer.ema must lie in [0, 1), got {self.ema}")
        for name in ("warmup_fraction", "final_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe:
    """How the trained policy acts."""

    execute: int = 5
    """Actions carried out before the next look at the scene."""
    noise_seed: int = 42


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Everything that decides a run's numbers, besides its prefixes; `config.yaml` of a run."""

    steps: int = 1500
    batch: int = 64
    seed: int = 0
    validation_fraction: float = 0.1
    validation_rows: int = 128
    episodes: int | None = None
    """Use only the first N training episodes."""
    shuffle: Literal["rows", "shards"] = "rows"
    """rows: all rows of an epoch among each other. shards: those of four shards at a time, which a cache larger than
    memory needs, or each row is read from the disk by itself."""
    normalize_action: NormalizationMode = "min_max"
    normalize_state: NormalizationMode = "min_max"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products; weights and sums stay float32. auto: bfloat16 where the processor has it."""
    log_every: int = 20
    validate_every: int = 250
    save_every: int = 250
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
        _require(0.0 <= fraction < 1.0, f"validation_fraction must lie in [0, 1), got {fraction}")
        _require(
            1 <= self.policy.execute <= self.expert.horizon,
            f"policy.execute {self.policy.execute} must lie between 1 and the horizon {self.expert.horizon}",
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over `warmup_fraction` of the steps, then cosine down to `final_fraction`."""
        o = self.optimizer
        warmup = max(1, round(o.warmup_fraction * self.steps))
        if step < warmup:
            return o.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        return o.learning_rate * (o.final_fraction + (1 - o.final_fraction) * 0.5 * (1 + math.cos(math.pi * share)))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
