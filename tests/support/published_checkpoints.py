"""Create a checkpoint in the published format for the small editor: random weights under published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.prefix.spec import KVSpec
from imagewam_flux2.release import Flux2Release

HIDDEN = 32


def random_state(shapes: dict[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}


def expert_config(spec: KVSpec, action_dim: int, **changes: Any) -> ExpertConfig:
    return ExpertConfig(
        layers=spec.layers, rope=spec.rope, action_dim=action_dim, state_dim=0, horizon=16, hidden=HIDDEN, **changes
    )


def checkpoint(transformer: Any, spec: KVSpec, *, state_dim: int, action_dim: int) -> dict[str, Any]:
    """Return the content for `torch.save`. The editor's weights differ slightly, as if trained."""
    state = {
        k: v + 0.02 * r for (k, v), r in zip(transformer.items(), random_state(transformer, 1).values(), strict=True)
    }
    mot: dict[str, Tensor] = {}
    for name, value in Flux2Release().to_release(state).items():
        mot[f"mixtures.video.transformer.{name}"] = value
        if name.startswith(("double_blocks", "single_blocks")):  # published under two names
            mot[f"mixtures.video.{name}"] = value
    expert = random_state(ActionExpert(expert_config(spec, action_dim)).state_dict(), 2, scale=0.2)
    mot |= {f"mixtures.action.{name}": value for name, value in expert.items()}
    width = mot["mixtures.video.transformer.txt_in.weight"].shape[1]
    generator = torch.Generator().manual_seed(3)
    proprio = {
        "weight": torch.randn(width, state_dim, generator=generator),
        "bias": torch.randn(width, generator=generator),
    }
    return {"mot": mot, "step": 7, "torch_dtype": "torch.float32", "proprio_encoder": proprio}


def statistics(path: Path, state_dim: int, action_dim: int) -> Path:
    """Write a dataset_stats.json with values between -1 and 2."""

    def field(dim: int) -> dict[str, dict[str, list[float]]]:
        low, high = [-1.0 + 0.01 * i for i in range(dim)], [2.0 - 0.02 * i for i in range(dim)]
        values = {"min": low, "max": high, "q01": low, "q99": high, "mean": [0.3] * dim, "std": [0.5] * dim}
        return {"default": {f"global_{name}": value for name, value in values.items()}}

    path.write_text(json.dumps({"state": field(state_dim), "action": field(action_dim), "num_episodes": 1}))
    return path
