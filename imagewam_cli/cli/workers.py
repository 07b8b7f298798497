"""How many processes compute a cache, and where: the options, and the maker of shards that they come to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.help import COMPUTE
from imagewam_cli.cli.options import require_at_least_one
from imagewam_cli.cli.output import output

if TYPE_CHECKING:
    from imagewam_cli.cli.editor_options import ChosenEditor
    from imagewam_cli.kvcache.building.shard_builder import ShardMaker
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings
    from imagewam_cli.kvcache.building.workers.pool import Workers
    from imagewam_cli.kvcache.building.workers.worker import BuildRecipe
    from imagewam_cli.kvcache.storage.location import Location


class EngineName(StrEnum):
    processes = "processes"
    ray = "ray"


WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Number of worker processes, each with an editor, spread over the GPUs; "
        "by default 1, and one for each GPU with --engine ray.",
        rich_help_panel=COMPUTE,
    ),
]
EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="Run the workers on this machine, or on the Ray cluster at RAY_ADDRESS.",
        rich_help_panel=COMPUTE,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="CPU threads of each worker; by default all cores divided by --workers. "
        "On the CPU, the bytes of a cache depend on this number.",
        rich_help_panel=COMPUTE,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Hiring:
    """The three options together."""

    workers: int | None
    engine: EngineName
    threads: int | None

    def require_sound(self, *, plan: bool) -> None:
        """
        Raises:
            UsageError: a number below 1, or workers where nothing is built.
        """
        from imagewam_cli.errors import UsageError

        require_at_least_one(**{k: v for k in ("workers", "threads") if (v := getattr(self, k)) is not None})
        if plan and (self.workers is not None or self.engine is not EngineName.processes):
            raise UsageError("--workers and --engine have no effect on a plan", "leave them out")

    @property
    def alone(self) -> bool:
        """Whether this process computes by itself."""
        return self.engine is EngineName.processes and (self.workers or 1) == 1


@contextmanager
def opened_maker(
    hiring: Hiring, chosen: ChosenEditor, out: Location, codec: str, build: BuildSettings
) -> Iterator[ShardMaker]:
    """What makes the shards of `out`: the editor, loaded here, or workers that load it.

    Raises:
        ImagewamError: as loading the editor and starting the workers do.
    """
    import torch

    from imagewam_cli.kvcache.building.shard_builder import ShardBuilder
    from imagewam_cli.kvcache.building.workers.pool import Crew
    from imagewam_cli.registry import Registry

    if hiring.alone:
        if hiring.threads is not None:
            torch.set_num_threads(hiring.threads)
        yield ShardBuilder(chosen.dataset, chosen.load(), out, Registry.installed().codecs.load(codec), build)
        return
    recipe = _recipe(chosen.settled(), out, codec, build)
    with _silent_stdout() if hiring.engine is EngineName.ray else nullcontext():
        workers = _workers(hiring, recipe)
        output.say(f"loading the editor in {workers.count} workers")
        with Crew(workers, out=out, identity=chosen.dataset.info.identity, on_news=output.say) as crew:
            yield crew


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Ray prints there when an actor dies; it is for the result."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _workers(hiring: Hiring, recipe: BuildRecipe) -> Workers:
    import torch

    from imagewam_cli.kvcache.building.workers.processes import ProcessWorkers
    from imagewam_cli.kvcache.building.workers.ray import RayWorkers

    if hiring.engine is EngineName.ray:
        return RayWorkers(
            recipe,
            address=os.environ.get("RAY_ADDRESS") or None,
            gpus=recipe.hardware.device.startswith("cuda"),
            count=hiring.workers,
            threads=hiring.threads,
        )
    count = hiring.workers or 1
    return ProcessWorkers(recipe, count, hiring.threads or max(1, torch.get_num_threads() // count))


def _recipe(chosen: ChosenEditor, out: Location, codec: str, build: BuildSettings) -> BuildRecipe:
    from imagewam_cli.kvcache.building.workers.worker import BuildRecipe

    return BuildRecipe(
        dataset=chosen.path.resolve(),
        keys=chosen.dataset.info.keys,
        editor=chosen.kind.entry.name,
        prefix=chosen.settings,
        weights=None if chosen.weights is None else chosen.weights.resolve(),
        hardware=chosen.hardware,
        out=out.resolve() if isinstance(out, Path) else out,
        codec=codec,
        settings=build,
    )
