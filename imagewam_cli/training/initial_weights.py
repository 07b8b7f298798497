"""Weights of the editor that an expert starts from (`expert.init` of a recipe)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.errors import UsageError
from imagewam_cli.training.prefixes import PrefixSource
from imagewam_cli.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from torch import Tensor


def initial_weights(source: PrefixSource, recipe: TrainRecipe, weights: Path | None) -> dict[str, Tensor] | None:
    """Return the denoiser's weights by their released names; None if the expert starts from random weights.

    weights: a diffusers folder in place of the editor's embedded or fetched weights.

    Raises:
        UsageError: the prefixes come from an untrained editor.
        EditorError: the weights are missing or damaged.
    """
    if recipe.expert.init == "none":
        return None
    fingerprint = source.info.fingerprint
    settings = fingerprint["settings"]
    if isinstance(settings, Mapping) and settings.get("random_weights"):
        raise UsageError(
            "the prefixes come from an untrained editor, which has no weights to start from", "use --init none"
        )
    return installed_editor(str(fingerprint["editor"])).released_weights(weights)
