"""Select the processes that build a cache: the options, and the producer of shards that they choose."""

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
    from imagewam_cli.cli.editor_options import EditorSetup
    from imagewam_cli.kvcache.building.shard_builder import ShardProducer
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings
    from imagewam_cli.kvcache.building.workers.pool import Workers
    from imagewam_cli.kvcache.building.workers.worker import BuildJob
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
        "by default 1, or one per GPU with --engine ray.",
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
class WorkerOptions:
    """The values of --workers, --engine and --threads."""

    workers: int | None
    engine: EngineName
    threads: int | None

    def require_valid(self, *, plan: bool) -> None:
        """Check the values. plan: whether nothing is built.

        Raises:
            UsageError: a number is below 1, or --workers or --engine is combined with a plan.
        """
        from imagewam_cli.errors import UsageError

        require_at_least_one(**{k: v for k in ("workers", "threads") if (v := getattr(self, k)) is not None})
        if plan and (self.workers is not None or self.engine is not EngineName.processes):
            raise UsageError("--workers and --engine have no effect on a plan", "omit them")

    @property
    def in_process(self) -> bool:
        """Whether this process builds the cache itself, without workers."""
        return self.engine is EngineName.processes and (self.workers or 1) == 1


@contextmanager
def open_producer(
    options: WorkerOptions, chosen: EditorSetup, out: Location, codec: str, build: BuildSettings
) -> Iterator[ShardProducer]:
    """Yield the producer of the shards of `out`: an editor in this process, or a pool of workers.

    Raises:
        ImagewamError: the editor cannot be loaded, or the workers cannot be started.
    """
    import torch

    from imagewam_cli.data.dataset_files import DatasetFiles
    from imagewam_cli.kvcache.building.shard_builder import ShardBuilder
    from imagewam_cli.kvcache.building.workers.pool import WorkerPool
    from imagewam_cli.registry import Registry

    if options.in_process:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        yield ShardBuilder(chosen.dataset, chosen.load(), out, Registry.installed().codecs.load(codec), build)
        return
    job = _job(chosen.with_measured_layers(), out, codec, build)
    with _silent_stdout() if options.engine is EngineName.ray else nullcontext():
        workers = _workers(options, job)
        output.say(f"loading the editor in {workers.count} workers")
        files = DatasetFiles.of(chosen.dataset, chosen.settings.cameras)
        with WorkerPool(
            workers,
            out=out,
            identity=chosen.dataset.info.identity,
            content=None if files is None else files.digest,
            on_news=output.say,
        ) as pool:
            yield pool


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Discard the messages that Ray prints to stdout when an actor dies: stdout is for the result."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _workers(options: WorkerOptions, job: BuildJob) -> Workers:
    import torch

    from imagewam_cli.kvcache.building.workers.processes import ProcessWorkers
    from imagewam_cli.kvcache.building.workers.ray import RayWorkers

    if options.engine is EngineName.ray:
        return RayWorkers(
            job,
            address=os.environ.get("RAY_ADDRESS") or None,
            gpus=job.hardware.device.startswith("cuda"),
            count=options.workers,
            threads=options.threads,
        )
    count = options.workers or 1
    return ProcessWorkers(job, count, options.threads or max(1, torch.get_num_threads() // count))


def _job(chosen: EditorSetup, out: Location, codec: str, build: BuildSettings) -> BuildJob:
    from imagewam_cli.data.episodes import EpisodeSelection
    from imagewam_cli.kvcache.building.workers.worker import BuildJob

    return BuildJob(
        dataset=chosen.path.resolve(),
        keys=chosen.dataset.info.keys,
        editor=chosen.kind.entry.name,
        prefix=chosen.settings,
        weights=None if chosen.weights is None else chosen.weights.resolve(),
        hardware=chosen.hardware,
        out=out.resolve() if isinstance(out, Path) else out,
        codec=codec,
        settings=build,
        episodes=EpisodeSelection.of(chosen.dataset.info.selected),
    )
