"""`imagewam train-expert`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagewam_cli.cli.editor_options import EditorOptions, editor_setup, takes_editor_options
from imagewam_cli.cli.help import ADVANCED, COMPUTE, CONDITION, INPUT, OUTPUT, RECIPE
from imagewam_cli.cli.options import (
    CacheOption,
    FormatName,
    FormatOption,
    WeightsOption,
    chosen_cache,
    from_home,
    require_at_least_one,
    require_existing,
)
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output, seconds_text
from imagewam_cli.kvcache.storage.location import name_of

if TYPE_CHECKING:
    from imagewam_cli.training.loop import DryRun
    from imagewam_cli.training.objective import Validation
    from imagewam_cli.training.prefixes import PrefixSource
    from imagewam_cli.training.recipe import TrainRecipe


class LoadName(StrEnum):
    mmap = "mmap"
    read = "read"


@takes_editor_options(only_with="--online")
def train_expert_command(
    *,
    cache: CacheOption = None,
    online: Annotated[
        bool,
        typer.Option(
            "--online",
            help="Train without a cache: the editor encodes the rows of each step.",
            rich_help_panel=INPUT,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            callback=from_home,
            help="YAML recipe; see docs/guide/training.md.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            callback=from_home,
            help="Folder of the run; by default runs/CACHE.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Number of optimizer steps.", rich_help_panel=RECIPE),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", help="Rows per step.", rich_help_panel=RECIPE)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Random seed.", rich_help_panel=RECIPE)
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="HOW",
            help="Start from the editor's weights: none, published or repaired.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    weights: WeightsOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set any value of the recipe, such as expert.horizon=8; may be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Delete the run in this folder and start over.", rich_help_panel=OUTPUT),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, memory, steps and time; train nothing.", rich_help_panel=OUTPUT
        ),
    ] = False,
    load: Annotated[
        LoadName | None,
        typer.Option(
            "--load",
            help="How to read the cache: mmap, or read (for network file systems). [default: mmap]",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    encode_batch: Annotated[
        int | None,
        typer.Option(
            "--encode-batch",
            metavar="N",
            help="Rows per forward pass of the editor. [default: 16]",
            rich_help_panel=f"{COMPUTE}{CONDITION}--online",
        ),
    ] = None,
    options: EditorOptions,
    format: FormatOption = FormatName.human,
) -> None:
    """Train an action expert on a cache.

    Run the same command again to resume an interrupted run. Without a cache, pass --online and the same editor options
    as to `imagewam cache`.

    Examples:
        imagewam train-expert --cache caches/tiny-tabletop --steps 1500
        imagewam train-expert --online --editor tiny --dataset datasets/tabletop
    """
    from imagewam_cli.errors import UsageError
    from imagewam_cli.training.initial_weights import initial_weights
    from imagewam_cli.training.loop import Trainer
    from imagewam_cli.training.run_folder import require_unlocked
    from imagewam_cli.workspace import RUNS

    _require_one_source(online, cache, options, encode_batch, load)
    if config is not None:
        require_existing("--config", config, "pass a YAML recipe; docs/guide/training.md has one")
    assignments = [*(set_ or []), *([f"expert.init={init}"] if init is not None else [])]
    recipe = _recipe(config, assignments, steps=steps, batch=batch, seed=seed)
    if weights is not None and not online and recipe.expert.init == "none":
        raise UsageError(
            "--weights has no effect on a cache with --init none: no weights of the editor are read",
            "omit --weights, or pass --init published or --init repaired",
        )
    if not dry_run:
        require_writable(out if out is not None else RUNS)
        if out is not None:
            require_unlocked(out)  # an editor may take minutes to load
    source: PrefixSource
    if online:
        source, name = _online_source(options, weights, encode_batch, dry_run)
    else:
        source, name = _cached_source(cache, load if load is not None else LoadName.mmap)
    trainer = Trainer(source, recipe, initial_weights(source, recipe, weights))
    if dry_run:
        _print_dry_run(trainer.dry_run(), format)
        return
    folder = out if out is not None else RUNS / name
    output.say(f"training {len(trainer.data.train_rows)} rows of {len(trainer.data.train_episodes)} episodes: {folder}")
    with output.progress(recipe.steps, "step") as bar:

        def advance(step: int, values: dict[str, float]) -> None:
            bar.update(step - bar.n)
            shown = {k: v for k, v in values.items() if k in ("loss", "validation_action_error")}
            if shown:
                bar.set_postfix({k.removeprefix("validation_"): f"{v:.4f}" for k, v in shown.items()}, refresh=False)

        result = trainer.train(folder, fresh=fresh, on_step=advance)
    _print_result(folder, recipe.steps, result, format)


def _require_one_source(
    online: bool, cache: str | None, options: EditorOptions, encode_batch: int | None, load: LoadName | None
) -> None:
    """Check that the options name either a cache or --online with an editor.

    Raises:
        UsageError: --online is combined with a cache option, or an editor option is given without --online.
    """
    from imagewam_cli.errors import UsageError

    if online and cache is not None:
        raise UsageError("--online trains without a cache", "omit --cache or --online")
    if online and load is not None:
        raise UsageError("--load has no effect with --online, which reads no cache", "omit --load or --online")
    given = [*options.given(), *(["--encode-batch"] if encode_batch is not None else [])]
    if given and not online:
        raise UsageError(
            f"{given[0]} has no effect without --online: it is an option of the editor, which a cache replaces "
            "(the expert itself trains on the CPU)",
            f"omit {given[0]}, or add --online",
        )


def _cached_source(cache: str | None, load: LoadName) -> tuple[PrefixSource, str]:
    """Return the prefixes of a cache and a name for the run."""
    from imagewam_cli.training.prefixes import CachedPrefixes

    address = chosen_cache(cache)
    source = CachedPrefixes(address, load.value)
    manifest = source.reader.manifest
    if not manifest.complete:
        output.say(f"{address} is unfinished: training on {manifest.rows} of {manifest.total_rows} rows")
    return source, name_of(address)


def _online_source(
    options: EditorOptions, weights: Path | None, batch: int | None, dry_run: bool
) -> tuple[PrefixSource, str]:
    """Return prefixes that an editor computes from a dataset while training, and a name for the run."""
    from imagewam_cli.training.online import OnlinePrefixes

    require_at_least_one(stride=options.stride, encode_batch=batch if batch is not None else 1)
    chosen = editor_setup(options, weights, trial="--dry-run" if dry_run else None)
    source = OnlinePrefixes(
        chosen.dataset,
        chosen.load(),
        stride=options.stride,
        batch=batch if batch is not None else 16,
        watch=_decoding,
    )
    return source, f"{chosen.name}-online"


@contextmanager
def _decoding(rows: int, size: int) -> Iterator[Callable[[int], object]]:
    """Show progress while the pictures are decoded. size: bytes of the temporary file."""
    output.say(f"decoding the pictures of {rows} rows into a temporary file of {bytes_text(size)}")
    with output.progress(rows, "row") as bar:
        yield bar.update


def _recipe(config: Path | None, assignments: list[str], **options: int | None) -> TrainRecipe:
    """Return the recipe: the YAML file, overridden by --set, overridden by the separate options.

    Raises:
        UsageError: an assignment lacks `=`.
        ConfigError: a key is unknown or a value is wrong.
    """
    import yaml

    from imagewam_cli.config import from_dict, load_yaml, option_of, to_dict
    from imagewam_cli.errors import ConfigError, UsageError, nearest
    from imagewam_cli.training.recipe import TrainRecipe

    values = to_dict(load_yaml(config, TrainRecipe) if config is not None else TrainRecipe())
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set needs KEY=VALUE, got {assignment!r}", "for example --set expert.horizon=8")
        target = values
        *parents, last = key.split(".")
        for parent in parents:
            target = target.get(parent, {}) if isinstance(target, dict) else {}
        if not isinstance(target, dict) or last not in target:
            raise ConfigError(f"--set: unknown key {key!r}", nearest(key, _dotted(values)))
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {text!r} is not a value in YAML", "put quotes around a text") from None
    given = {k: v for k, v in options.items() if v is not None}

    def typed(key: str) -> str:
        if key in given:
            return option_of(key)
        assigned = any(key.startswith(a.partition("=")[0]) for a in assignments)
        return f"--set {key}" if assigned or config is None else f"{config}: {key}"

    return from_dict(TrainRecipe, values | given, source=typed)


def _dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys of nested values as --set takes them, such as "expert.horizon"."""
    keys = []
    for key, value in values.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _print_result(folder: Path, steps: int, result: Validation | None, format: FormatName) -> None:
    """Print the validation of the last step. result: None if no episode was held out."""
    from imagewam_cli.config import to_dict

    values: dict[str, Any] = {"run": str(folder), "steps": steps, "validation": None}
    text = f"{folder}: {steps} steps; no episode was held out for validation"
    if result is not None:
        values["validation"] = to_dict(result) | {"ratio_to_constant": result.ratio}
        # if all held-out chunks are equal, the constant chunk has no error to divide by
        share = f"{100 * result.ratio:.0f} % of" if result.constant_error > 1e-9 else "compared with"
        text = (
            f"{folder}: validation action error {result.action_error:.4f}, "
            f"{share} the best constant chunk's {result.constant_error:.4f}"
        )
    output.result(values, text, format.value)


def _print_dry_run(dry: DryRun, format: FormatName) -> None:
    from imagewam_cli.config import to_dict

    scratch = f"{bytes_text(dry.scratch_bytes)} of disk for pictures while training\n" if dry.scratch_bytes else ""
    text = (
        f"{dry.parameters:,} parameters\n"
        f"{dry.rows} training rows, {dry.validation_rows} validation rows\n"
        f"{dry.steps} steps, {dry.epochs:.1f} epochs\n"
        f"{bytes_text(dry.memory_bytes)} for weights, optimizer and a batch of prefix KV, without activations\n"
        f"{scratch}"
        f"about {seconds_text(dry.seconds)} on this machine"
    )
    output.result(to_dict(dry), text, format.value)
