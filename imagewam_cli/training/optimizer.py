"""Optimize the matrices of the expert's blocks with Muon and everything else with AdamW, or everything with AdamW.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalizes the momentum of a matrix, so every direction advances equally
and a small expert learns more in few steps. Its update is scaled to the root mean square of AdamW's, so both use the
same learning rate. Published experts use AdamW alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagewam_cli.training.recipe import OptimizerRecipe

_MOMENTUM = 0.95


class ExpertOptimizer:
    """Both optimizers behind one interface. Their state is stored by parameter name, for checkpoints."""

    def __init__(self, model: nn.Module, recipe: OptimizerRecipe) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [n for n, p in self._parameters.items() if recipe.name == "muon" and p.ndim == 2 and "blocks." in n]
        others = [n for n in self._parameters if n not in matrices]
        rate, decay = recipe.learning_rate, recipe.weight_decay
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([self._parameters[n] for n in others], lr=rate, betas=recipe.betas, weight_decay=decay)
        ]
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    [self._parameters[n] for n in matrices],
                    lr=rate,
                    weight_decay=decay,
                    momentum=_MOMENTUM,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self._part_of = {n: self._parts[n in matrices] for n in self._parameters}

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next steps."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        """Delete the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for part in self._parts:
            part.step()

    def state(self) -> dict[str, Tensor]:
        """Return the moments, and AdamW's step counts, by `PARAMETER/KEY`."""
        return {
            f"{name}/{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._part_of[name].state[parameter].items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned.

        Raises:
            KeyError: a parameter is missing, or is not the model's.
        """
        missing = self._parameters.keys() - {path.rpartition("/")[0] for path in state}
        if missing:
            raise KeyError(f"no optimizer state for {min(missing)}")
        for part in self._parts:
            part.state.clear()
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            self._part_of[name].state[self._parameters[name]][key] = value
