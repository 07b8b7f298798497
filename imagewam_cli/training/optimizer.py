"""Muon for the matrices of the expert's blocks, AdamW for everything else; or AdamW for all, as published.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalizes the momentum of a matrix, so that no direction of it is left
behind: the few steps of a small expert go further. Its step is scaled to the root mean square of AdamW's, so one
learning rate serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagewam_cli.training.recipe import OptimizerRecipe

_MOMENTUM = 0.95


class ExpertOptimizer:
    """One interface over both; state by parameter name, for checkpoints."""

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
        """The learning rate of the steps to come."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change the parameters by their gradients."""
        for part in self._parts:
            part.step()

    def state(self) -> dict[str, Tensor]:
        """`NAME/KEY` -> tensor: the moments, and AdamW's count of steps."""
        return {
            f"{name}/{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._part_of[name].state[parameter].items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave.

        Raises:
            KeyError: a parameter that is not the model's, or one of the model's that is missing.
        """
        missing = self._parameters.keys() - {path.rpartition("/")[0] for path in state}
        if missing:
            raise KeyError(f"no moments of {min(missing)}")
        for part in self._parts:
            part.state.clear()
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            self._part_of[name].state[self._parameters[name]][key] = value
