"""One training run in one folder.

    config.yaml          the resolved recipe         run.json       dataset, fingerprint, cache if there is one
    dataset_files.json   the dataset's files, by size and ends
    metrics.jsonl        one line per log step       result.json    the final validation
    checkpoints/         the last two                policy/        the averaged weights as a policy bundle

Noise and data order depend on (seed, step) only. So weights, optimizer moments and a step number make a checkpoint, and
a resumed run gives the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.data.dataset_files import DatasetFiles, changes_text
from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.data.types import KeyMap
from imagewam_cli.errors import ConfigError, NonFiniteLossError, RunError, UsageError, warn
from imagewam_cli.expert.checkpoint import save_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.initialization import initialize
from imagewam_cli.expert.model import ActionExpert, ExpertConfig, parameter_count
from imagewam_cli.files import PARTIAL, write_atomically
from imagewam_cli.kvcache.format.manifest import DATASET_FILES, settings_of
from imagewam_cli.kvcache.format.provenance import ALL, CONTENT, Difference, Provenance
from imagewam_cli.lock import LOCK
from imagewam_cli.policy.bundle import (
    NORMALIZATION,
    BundleParts,
    EditorReference,
    PolicyConfig,
    TrainingRecord,
    read_bundle,
    write_bundle,
)
from imagewam_cli.training.checkpoint import load_checkpoint, save_checkpoint
from imagewam_cli.training.data import Batch, ExpertData, TimedBatches, new_split, older_split, warn_of_split
from imagewam_cli.training.metrics import MetricLog
from imagewam_cli.training.objective import Validation, flow_loss, validate
from imagewam_cli.training.optimizer import ExpertOptimizer
from imagewam_cli.training.prefixes import PrefixSource, SourceInfo
from imagewam_cli.training.recipe import TrainRecipe
from imagewam_cli.training.run_folder import (
    CHECKPOINTS,
    POLICY,
    RESULT,
    RunRecord,
    delete_run,
    locked_run,
    open_record,
    split_entry,
)
from imagewam_cli.workspace import RUN_MARKER

_STEP_SEEDS = 1_000_003
"""Distance between the noise seeds of consecutive run seeds, so that runs of fewer steps never share noise."""
_OTHER_RUN = "choose another folder with --out, or start over with --fresh"
_COMPARED = ("rows", "precision", "shards")
"""Keys of run.json to compare, besides the provenance of the prefixes. Variants follow from rows, dataset
and stride; where the data was stored does not matter."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Cost of a run. seconds: estimated from a few real steps on this machine."""

    parameters: int
    rows: int
    validation_rows: int
    steps: int
    epochs: float
    memory_bytes: int
    """Weights, gradients, moments, average and one batch of prefix KV; activations come on top."""
    scratch_bytes: int
    """Temporary disk space during the run."""
    seconds: float


class Trainer:
    """Train one run: construct a Trainer, then call `train`."""

    def __init__(
        self, source: PrefixSource, recipe: TrainRecipe, editor_weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """editor_weights: by released names; required if the recipe starts from them (`expert.init`).

        Raises:
            UsageError: there are no rows, or the required weights are missing.
        """
        if source.info.rows == 0:
            raise UsageError(f"{source.info.location} has no rows to train on")
        self.source, self.recipe = source, recipe
        self.data = ExpertData(source, recipe)
        self.schedule = FlowSchedule(shift=recipe.flow.shift)
        spec = source.info.spec
        self.config = ExpertConfig(
            layers=spec.layers,
            rope=spec.rope,
            action_dim=self.data.action_dim,
            state_dim=self.data.state_dim,
            horizon=recipe.expert.horizon,
            hidden=recipe.expert.hidden,
            mlp_ratio=recipe.expert.mlp_ratio,
            blocks_per_layer=recipe.expert.blocks_per_layer,
            places=recipe.expert.places and any(layer.holds_pictures for layer in spec.layers),
            use_prefix=recipe.expert.use_prefix,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.expert = ActionExpert(self.config)
            if recipe.expert.init != "none":
                if editor_weights is None:
                    raise UsageError(f"expert.init {recipe.expert.init!r} needs the editor's weights")
                initialize(self.expert, editor_weights, recipe.expert.init)
        self.average = {name: p.detach().clone() for name, p in self.expert.named_parameters()}
        self.optimizer = ExpertOptimizer(self.expert, recipe.optimizer)
        self._bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and _has_bfloat16())
        self._validation: list[Batch] | None = None
        self.record: RunRecord | None = None
        """The run that is trained; None before `train`."""

    def train(
        self,
        folder: Path,
        *,
        fresh: bool = False,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    ) -> Validation | None:
        """Train into `folder`, resuming from its newest checkpoint. Return the final validation, None without held-out
        episodes.

        fresh: delete the run that is in the folder and start over.

        Raises:
            UsageError: the folder holds something that is not a run.
            RunError: the folder holds a run of another recipe or of other prefixes, or another process trains there.
            NonFiniteLossError: the loss or its gradient is not finite; names the dataset rows of the batch. The last
            checkpoint stays.
        """
        with locked_run(folder):
            if fresh:
                delete_run(folder)
            record = self._open(folder, fresh)
            split = record.split or older_split(self.source, self.recipe)
            if split != self.data.split:
                self.data = ExpertData(self.source, self.recipe, split)
            return self._train(record, on_step)

    def _train(self, record: RunRecord, on_step: Callable[[int, dict[str, float]], None]) -> Validation | None:
        """Train into the folder, which is open and locked."""
        recipe, folder = self.recipe, record.folder
        first = load_checkpoint(folder / CHECKPOINTS, self.expert, self.average, self.optimizer)
        if first > 0 and (folder / POLICY / NORMALIZATION).exists():
            self.data.keep_normalizers(read_bundle(folder / POLICY))
        for note in self.data.notes():
            warn(note)
        self.record = record = record.begin(first)
        validation: Validation | None = None
        needed = self.data.rows_needed(first, recipe.steps)
        with MetricLog(folder, first) as log, self.source.prepare(needed, folder):
            started = time.monotonic()
            on_step(first, {})
            batches = TimedBatches(self.data.batches(first, recipe.steps))
            for step, batch in enumerate(batches, start=first):
                loss = self.step(step, batch)
                done = step + 1
                values: dict[str, float] = {}
                if done % recipe.log_every == 0 or done == recipe.steps:
                    seconds = (time.monotonic() - started) / (done - first)
                    values = {
                        "loss": loss,
                        "learning_rate": record.learning_rate(step),
                        "seconds_per_step": seconds,
                        "wait_seconds_per_step": batches.seconds / (done - first),
                    }
                if done % recipe.validate_every == 0 or done == recipe.steps:
                    validation = self.validate()
                    if validation is not None:
                        values |= {f"validation_{k}": v for k, v in asdict(validation).items()}
                if values:
                    log.add(done, **values)
                if done % recipe.save_every == 0 or done == recipe.steps:
                    self._write_policy(folder / POLICY)  # first, so that every run that looks finished has it
                    save_checkpoint(folder / CHECKPOINTS, done, self.expert, self.average, self.optimizer)
                on_step(done, values)
            if validation is None:
                validation = self.validate()
        write_atomically(folder / RESULT, dump_json(_result(validation, recipe.steps)).encode())
        return validation

    def step(self, step: int, batch: Batch) -> float:
        """Take one optimizer step and return the loss."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * _STEP_SEEDS + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            loss = flow_loss(self.expert, batch, self.schedule, recipe.flow.draws, generator)
        _require_finite("loss", loss.detach(), step, batch)
        self.optimizer.set_rate((self.record or recipe).learning_rate(step))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.expert.parameters(), recipe.optimizer.clip_norm)
        _require_finite("gradient's norm", norm, step, batch)
        self.optimizer.step()
        # at first the average follows the weights, so that the initial weights do not dominate it
        decay = min(recipe.optimizer.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.expert.parameters()), 1 - decay)
        return float(loss.detach())

    def validate(self) -> Validation | None:
        """Validate the averaged weights on held-out episodes; None if there are none."""
        if len(self.data.validation_rows) == 0:
            return None
        if self._validation is None:
            rows, size = self.data.validation_rows, self.recipe.batch
            self._validation = [self.data.batch(rows[i : i + size]) for i in range(0, len(rows), size)]
        trained = {k: p.detach().clone() for k, p in self.expert.named_parameters()}
        self.expert.load_state_dict(self.average)
        flow = self.recipe.flow
        result = validate(
            self.expert,
            self._validation,
            self.schedule,
            steps=flow.inference_steps,
            noise_seed=self.recipe.policy.noise_seed,
        )
        self.expert.load_state_dict(trained)
        return result

    def dry_run(self, measured_steps: int = 3) -> DryRun:
        """Estimate memory and time from a few real steps; writes no run."""
        for note in self.data.notes():
            warn(note)
        needed = self.data.rows_needed(0, measured_steps, validation=False)
        with self.source.prepare(needed, Path(tempfile.gettempdir())):
            started = time.monotonic()
            for step, batch in enumerate(self.data.batches(0, measured_steps)):
                if step == 1:
                    started = time.monotonic()  # the first step warms up
                self.step(step, batch)
            per_step = (time.monotonic() - started) / max(1, measured_steps - 1)
        parameters = parameter_count(self.expert)
        prefix = self.source.info.spec.bytes_per_row(4) * self.recipe.batch
        return DryRun(
            parameters=parameters,
            rows=len(self.data.train_rows),
            validation_rows=len(self.data.validation_rows),
            steps=self.recipe.steps,
            epochs=self.recipe.steps * self.recipe.batch / len(self.data.train_rows),
            memory_bytes=parameters * 4 * 5 + 2 * prefix,
            scratch_bytes=self.source.scratch_bytes(len(self.data.rows_needed(0, self.recipe.steps))),
            seconds=per_step * self.recipe.steps,
        )

    def _open(self, folder: Path, fresh: bool) -> RunRecord:
        """Create the run in its folder, or check that an existing one belongs to this run."""
        identity = _identity(self.source.info) | {"precision": "bfloat16" if self._bfloat16 else "float32"}
        if self.recipe.shuffle == "shards":  # the order then depends on how the cache is split into shards
            identity["shards"] = hashlib.sha256(str(self.source.shard_rows).encode()).hexdigest()[:16]
        if (folder / RUN_MARKER).exists():
            _require_same_prefixes(folder, identity, self.source)
        elif not fresh and any(path.name not in (LOCK, f"{RUN_MARKER}{PARTIAL}") for path in folder.iterdir()):
            raise UsageError(f"{folder} holds something that is not a run", "choose an empty folder with --out")
        else:
            split = new_split(self.source, self.recipe)
            warn_of_split(self.source, self.recipe, split)
            marker = identity | split_entry(split)
            write_atomically(folder / RUN_MARKER, dump_json(marker).encode())
            if (files := self.source.dataset_files()) is not None:
                write_atomically(folder / DATASET_FILES, files.to_bytes())
        return open_record(folder, self.recipe)

    def _write_policy(self, folder: Path) -> None:
        info, recipe = self.source.info, self.recipe
        save_expert(folder, self.config, self.average)
        if not (folder / SAMPLES).exists() and (samples := self.source.samples()) is not None:
            write_atomically(folder / SAMPLES, samples)
        write_bundle(
            folder,
            BundleParts(
                config=PolicyConfig(
                    horizon=recipe.expert.horizon,
                    execute=recipe.policy.execute,
                    inference_steps=recipe.flow.inference_steps,
                    shift=recipe.flow.shift,
                    noise_seed=recipe.policy.noise_seed,
                    fps=info.dataset.fps,
                    cameras=info.spec.cameras,
                    state_names=info.dataset.state_names,
                    action_names=info.dataset.action_names,
                    keys=info.dataset.keys,
                ),
                editor=editor_reference(info),
                state_normalizer=self.data.state_normalizer,
                action_normalizer=self.data.action_normalizer,
                training=TrainingRecord(dataset=info.dataset.identity, **self.data.split.to_dict()),
            ),
        )


def editor_reference(info: SourceInfo) -> EditorReference:
    """Return the reference to the editor that computed the prefixes."""
    return EditorReference(
        name=str(info.fingerprint["editor"]),
        settings=settings_of(info.fingerprint),
        spec=info.spec,
        fingerprint=info.fingerprint,
    )


def _has_bfloat16() -> bool:
    """Return True if the CPU multiplies bfloat16 in hardware; otherwise bfloat16 is slower than float32."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known()) if known is not None else False


def _identity(info: SourceInfo) -> dict[str, object]:
    """Return the description of the prefixes that `run.json` stores."""
    return {
        info.kind: info.location,
        "fingerprint": info.digest,
        "editor": info.fingerprint.get("editor"),
        "dataset": info.dataset.identity[:16],
        "content": None if info.dataset.content is None else info.dataset.content[:16],
        "table": info.table_checksum[:16],
        "codec": info.codec,
        "keys": to_dict(info.dataset.keys),
        "selected": info.dataset.selected,
        "stride": info.dataset.stride,
        "variants": info.dataset.augmentation.variants,
        "rows": info.rows,
    }


def _provenance(identity: Mapping[str, Any]) -> Provenance:
    """Return the provenance of the prefixes that `run.json` describes."""
    return Provenance(
        dataset=str(identity["dataset"]),
        content=identity.get("content"),
        keys=from_dict(KeyMap, identity["keys"], source=RUN_MARKER) if "keys" in identity else None,
        selected=str(identity.get("selected") or ALL),  # before episodes could be chosen, all were read
        stride=int(identity["stride"]),
        codec=str(identity["codec"]),
        editor=str(identity["editor"]),
        digest=str(identity["fingerprint"]),
        table=str(identity["table"]),
    )


def _require_same_prefixes(folder: Path, identity: dict[str, object], source: PrefixSource) -> None:
    """Check that the run in `folder` was started with the same prefixes and precision. The cache or dataset may have
    moved."""
    try:
        there = json.loads((folder / RUN_MARKER).read_text(encoding="utf-8"))
        before = _provenance(there)
    except KeyError as error:
        raise RunError(f"{folder / RUN_MARKER} lacks the key {error}", "start over with --fresh") from None
    except (ValueError, TypeError, ConfigError) as error:
        raise RunError(f"{folder / RUN_MARKER} is damaged: {error}", "start over with --fresh") from None
    own = (Difference(key, there.get(key), identity[key]) for key in _COMPARED if key in identity)
    here = _provenance(identity)
    for found in (*before.differences(here), *(d for d in own if d.there != d.here)):
        if found.what == CONTENT:
            what = f"was trained on other files of the dataset: {_changed_files(folder, source)}"
        else:
            what = f"differs in its {found.what}: {found.there}, but this run has {found.here}"
        raise RunError(f"{folder} holds a run that {what}", _OTHER_RUN)
    if unrecorded := before.unrecorded(here):
        warn(
            f"{folder} was begun by an older imagewam, which did not record the {' and the '.join(unrecorded)}: "
            "they are not compared; a run in another folder records them"
        )


def _changed_files(folder: Path, source: PrefixSource) -> str:
    """Name the files of the dataset that differ from those of the run in `folder`."""
    try:
        there = DatasetFiles.from_bytes((folder / DATASET_FILES).read_bytes())
    except (OSError, ValueError):
        there = None
    return changes_text(there, source.dataset_files())


def _require_finite(what: str, value: Tensor, step: int, batch: Batch) -> None:
    if not bool(torch.isfinite(value)):
        rows = ", ".join(str(r) for r in batch.row)
        raise NonFiniteLossError(
            f"the {what} is {float(value)} at step {step + 1}; rows of the batch: {rows}",
            "look at these rows of the dataset, or lower optimizer.learning_rate; the last checkpoint is kept",
        )


def _result(validation: Validation | None, steps: int) -> dict[str, object]:
    if validation is None:
        return {"steps": steps, "validation": None}
    return {"steps": steps, "validation": asdict(validation) | {"ratio_to_constant": validation.ratio}}
