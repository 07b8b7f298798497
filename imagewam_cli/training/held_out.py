"""Find out which episodes of a dataset a policy was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagewam_cli.config import load_yaml
from imagewam_cli.data.splits import split_episodes
from imagewam_cli.data.types import Dataset
from imagewam_cli.errors import DatasetError, RunError
from imagewam_cli.kvcache.format.provenance import Provenance
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.bundle import find_bundle
from imagewam_cli.training.recipe import TrainRecipe
from imagewam_cli.workspace import ONNX_MARKER, RUN_MARKER

Use = Literal["trained on", "held out", "unknown"]
USES: tuple[Use, ...] = ("trained on", "held out", "unknown")
"""What a training did with an episode. Episodes that it neither trained nor validated on are held out, too."""


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Which episodes of a dataset a policy was trained on.

    trained: the episodes that it was trained on; None if they are unknown, because the policy was trained on another
    dataset or does not record them.
    """

    trained: frozenset[int] | None
    reason: str = ""
    """Why it is unknown."""

    def use(self, episode: int) -> Use:
        """Return what the training did with an episode."""
        if self.trained is None:
            return "unknown"
        return "trained on" if episode in self.trained else "held out"

    def held_out(self, dataset: Dataset) -> tuple[int, ...]:
        """Return the episodes of the dataset that the policy was not trained on, ascending.

        Raises:
            DatasetError: they are unknown, or there are none.
        """
        if self.trained is None:
            raise DatasetError(
                f"it is unknown which episodes of {dataset.info.root} were held out: {self.reason}",
                "name episodes that were not trained on with --only-episodes",
            )
        found = tuple(sorted(e.index for e in dataset.episodes() if self.use(e.index) == "held out"))
        if not found:
            raise DatasetError(
                f"the policy was trained on every chosen episode of {dataset.info.root}",
                "train with validation_fraction above 0, or score episodes recorded since",
            )
        return found


def exposure(policy: ChunkPolicy, dataset: Dataset) -> Exposure:
    """Return which episodes of a dataset a policy was trained on.

    Raises:
        RunError: the policy's files are damaged.
    """
    record = policy.training
    if record is None:
        return _older_exposure(policy.folder, dataset)
    if _differ(record.dataset, dataset):
        return Exposure(trained=None, reason="the policy was trained on another dataset")
    return Exposure(trained=frozenset(record.split.train))


def held_out_episodes(policy: ChunkPolicy, dataset: Dataset) -> tuple[int, ...]:
    """Return the episodes that a policy was not trained on, ascending; none if they are unknown.

    Raises:
        RunError: the policy's files are damaged.
    """
    found = exposure(policy, dataset)
    return tuple(e.index for e in dataset.episodes() if found.use(e.index) == "held out")


def _older_exposure(folder: Path | None, dataset: Dataset) -> Exposure:
    """Return the exposure to a policy that does not record it: by its run, if that used all rows of the dataset."""
    unknown = Exposure(trained=None, reason="the policy does not record its training episodes")
    if folder is None or (folder / ONNX_MARKER).exists():
        return unknown
    run = find_bundle(folder).parent
    marker, recipe_file = run / RUN_MARKER, run / "config.yaml"
    if not (marker.is_file() and recipe_file.is_file()):
        return unknown
    try:
        values = json.loads(marker.read_text(encoding="utf-8"))
        identity, stride, rows = str(values["dataset"]), int(values["stride"]), int(values["rows"])
        variants = int(values.get("variants", 1))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{marker} is damaged: {error}", "train the policy again") from None
    if _differ(identity, dataset):
        return Exposure(trained=None, reason="the policy was trained on another dataset")
    episodes = dataset.episodes()
    if rows != variants * sum(-(-e.length // stride) for e in episodes):
        return unknown
    recipe = load_yaml(recipe_file, TrainRecipe)
    train, _ = split_episodes((e.index for e in episodes), recipe.validation_fraction, recipe.seed)
    return Exposure(trained=frozenset(train[: recipe.episodes]))


def _differ(identity: str, dataset: Dataset) -> bool:
    return bool(Provenance(dataset=identity).differences(Provenance(dataset=dataset.info.identity)))
