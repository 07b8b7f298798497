"""Find the episodes that a run did not train on, from the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from imagewam_cli.config import load_yaml
from imagewam_cli.data.splits import split_episodes
from imagewam_cli.data.types import Dataset
from imagewam_cli.errors import RunError
from imagewam_cli.kvcache.format.provenance import Provenance
from imagewam_cli.training.recipe import TrainRecipe
from imagewam_cli.workspace import RUN_MARKER


def held_out_episodes(policy: Path, dataset: Dataset) -> tuple[int, ...]:
    """Return the validation episodes of a policy's run, ascending.

    Returns no episode if they are unknown: the policy folder is not inside a run, the run used another dataset, or its
    cache did not hold all rows of the dataset.

    policy: the policy folder of a run.

    Raises:
        RunError: the run's files are damaged.
    """
    marker, recipe_file = policy.parent / RUN_MARKER, policy.parent / "config.yaml"
    if not (marker.is_file() and recipe_file.is_file()):
        return ()
    try:
        run = json.loads(marker.read_text(encoding="utf-8"))
        identity, stride, rows = str(run["dataset"]), int(run["stride"]), int(run["rows"])
        variants = int(run.get("variants", 1))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{marker} is damaged: {error}", "train the policy again") from None
    episodes = dataset.episodes()
    every = variants * sum(-(-e.length // stride) for e in episodes)
    trained_on, here = Provenance(dataset=identity), Provenance(dataset=dataset.info.identity)
    if trained_on.differences(here) or rows != every:
        return ()
    recipe = load_yaml(recipe_file, TrainRecipe)
    _, held_out = split_episodes((e.index for e in episodes), recipe.validation_fraction, recipe.seed)
    return held_out
