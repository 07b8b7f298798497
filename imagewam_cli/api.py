"""The Python API: each step from a dataset to a policy as one function. Import it as `import imagewam_cli as iw`.

Paths may be strings. The functions raise `ImagewamError`s, with the same hints that the command line prints.
`progress=True` draws a progress bar on stderr. The functions call the same classes as the command line; import those
classes for anything that is missing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imagewam_cli.config import from_dict, to_dict
from imagewam_cli.data import formats
from imagewam_cli.data.episodes import EpisodeSelection
from imagewam_cli.data.types import Dataset, KeyMap
from imagewam_cli.editors import installed
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.files import expanded
from imagewam_cli.kvcache.building import build
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.location import location
from imagewam_cli.policy import loading
from imagewam_cli.progress import progress
from imagewam_cli.registry import Registry
from imagewam_cli.training.metrics import read_metrics
from imagewam_cli.training.objective import Validation
from imagewam_cli.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from imagewam_cli.evaluation.closed_loop import ClosedLoopResult
    from imagewam_cli.evaluation.open_loop import OpenLoopResult
    from imagewam_cli.export import ExportReport
    from imagewam_cli.policy.acting import ChunkPolicy
    from imagewam_cli.policy.loading import ExportedPolicy
    from imagewam_cli.policy.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run."""

    folder: Path
    validation: Validation | None
    """Errors on held-out episodes; None if no episode was held out."""

    def metrics(self) -> list[dict[str, float]]:
        """Return the records of metrics.jsonl, one for each logged step."""
        return read_metrics(self.folder / "metrics.jsonl")


def open_dataset(
    path: str | Path,
    *,
    state_key: str = KeyMap.state,
    action_key: str = KeyMap.action,
    instruction_key: str | None = None,
    cameras: Sequence[str] = (),
    only_episodes: str | Iterable[int] | None = None,
    exclude_episodes: str | Iterable[int] | None = None,
) -> Dataset:
    """Open a dataset folder. Only metadata is read.

    Args:
        state_key, action_key: the dataset's features that hold the state and the action, several separated by commas;
            the state "none": train on pictures alone.
        instruction_key: the feature that holds the instruction, as text or as an index into the tasks; None: the task
            of each frame.
        cameras: the cameras to use, in order; empty: all of them.
        only_episodes, exclude_episodes: numbers, or a text such as "0-9,12". The others are not read.

    Raises:
        DatasetError: the folder holds no dataset, its metadata is damaged, or a feature, camera or episode does not
            exist.
        UsageError: state and action share a feature, or the choice of episodes is not a list of numbers and ranges.
    """
    keys = KeyMap(state=state_key, action=action_key, instruction=instruction_key, cameras=tuple(cameras))
    return formats.open_dataset(path, keys, EpisodeSelection.of(only_episodes, exclude_episodes))


def record(
    out: str | Path, *, env: str = "tabletop", episodes: int = 200, seed: int = 0, progress: bool = False
) -> Dataset:
    """Record scripted demonstrations of a simulator as a LeRobot v3.0 dataset, and open it.

    Raises:
        UsageError: `out` is not empty, or `episodes` is below 1.
        UnknownNameError: no environment has this name.
    """
    from imagewam_cli.sim.environment import load_environment
    from imagewam_cli.sim.record import record as record_demonstrations

    make = load_environment(env)
    with _bar(progress, episodes, "episode") as advance:
        record_demonstrations(make(), Path(out), episodes, seed=seed, on_episode=lambda: advance(1))
    return open_dataset(out)


def load_editor(
    name: str = "tiny",
    *,
    dataset: Dataset | None = None,
    options: PrefixOptions | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    hardware: Hardware | None = None,
) -> Editor:
    """Load an installed editor, ready to encode.

    Args:
        dataset: the dataset that it will encode; needed for `build_cache`. Its cameras are used unless the options name
            others, and its instructions are encoded immediately, so that text encoders can be freed. None: the editor
            accepts any instruction.
        weights: a diffusers folder instead of the embedded or downloaded weights.
        hardware: device, offloading and compilation together, instead of `device`.

    Raises:
        UnknownNameError: no editor has this name.
        EditorError: the weights are missing or have the wrong shapes.
        UsageError: the editor does not have an option, or this machine does not have the device.
    """
    chosen = options or PrefixOptions()
    if dataset is not None and not chosen.cameras:
        chosen = dataclasses.replace(chosen, cameras=tuple(dataset.info.cameras))
    return installed.load_editor(
        name,
        chosen,
        instructions=() if dataset is None else instructions_of(dataset),
        weights=_path(weights),
        hardware=hardware or Hardware(device=device),
    )


def build_cache(
    dataset: Dataset,
    editor: Editor,
    out: str | Path,
    *,
    codec: str = "bf16",
    stride: int = 1,
    batch: int = 16,
    shard_mb: float = 256.0,
    progress: bool = False,
) -> CacheReader:
    """Compute and store the editor's prefix keys and values over a dataset, then open the cache.

        cache = iw.build_cache(data, editor, "caches/mine", codec="pca1", stride=10)
        prefix = cache.read([0, 1])  # prefix.layers[i].k and .v: float32 (rows, tokens, heads, head size)

    An interrupted build resumes.

    Args:
        dataset: the dataset to encode.
        editor: load it with `dataset=dataset`, so that its text segment is long enough for every instruction.
        out: a folder, or a URL that fsspec supports, such as s3://bucket/mine.
        codec: encoding of the numbers: fp32, bf16, fp16, fp8, int8, int4, pca2, pca1 (a sixteenth of the size of bf16),
            pca0.5, or the name of a plugin's codec.
        stride: store every `stride`-th frame.
        batch: rows per forward pass.
        shard_mb: approximate size of a shard, in MB.

    Raises:
        CacheError: `out` holds a different cache, another process is writing there, or the disk is full.
        UsageError: `out` holds something that is not a cache.
    """
    address, stored = location(str(out)), Registry.installed().codecs.load(codec)
    settings = BuildSettings(stride=stride, batch=batch, shard_mb=shard_mb)
    with _bar(progress, sum(-(-e.length // stride) for e in dataset.episodes()), "row") as advance:
        build.build_cache(dataset, editor, address, stored, settings, on_rows=advance)
    return CacheReader(address)


def open_cache(path: str | Path) -> CacheReader:
    """Open a cache at a folder or URL, to read any of its rows.

    Raises:
        CacheError: the folder holds no cache, the cache is damaged, or it has no finished shard.
    """
    return CacheReader(location(str(path)))


def train(
    cache: CacheReader | str | Path,
    out: str | Path,
    *,
    recipe: TrainRecipe | None = None,
    steps: int | None = None,
    batch: int | None = None,
    seed: int | None = None,
    weights: str | Path | None = None,
    fresh: bool = False,
    progress: bool = False,
) -> Run:
    """Train an action expert on a cache. Resumes an interrupted run in `out`, and extends one that had fewer steps.

    Args:
        recipe: settings of the run; `steps`, `batch` and `seed` override the recipe's values.
        weights: a diffusers folder of the cache's editor, for recipes that initialize the expert from the editor.
        fresh: delete the run in `out` and start over.

    Raises:
        ConfigError: the recipe has an invalid value.
        CacheError: the cache is missing or damaged.
        RunError: `out` holds a run with a different recipe or cache, or another process trains there.
        NonFiniteLossError: the loss or its gradient is not finite.
    """
    from imagewam_cli.training.initial_weights import initial_weights
    from imagewam_cli.training.loop import Trainer
    from imagewam_cli.training.prefixes import CachedPrefixes

    given = {"steps": steps, "batch": batch, "seed": seed}
    values = to_dict(recipe or TrainRecipe()) | {k: v for k, v in given.items() if v is not None}
    chosen = from_dict(TrainRecipe, values, source="recipe")
    source = CachedPrefixes(cache if isinstance(cache, CacheReader) else location(str(cache)))
    folder = expanded(out)
    trainer = Trainer(source, chosen, initial_weights(source, chosen, _path(weights)))
    with _bar(progress, chosen.steps, "step") as advance:
        done = 0

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal done
            advance(step - done)
            done = step

        validation = trainer.train(folder, fresh=fresh, on_step=on_step)
    return Run(folder=folder, validation=validation)


def load_policy(
    path: Run | str | Path, *, weights: str | Path | None = None, device: str = "cpu", hardware: Hardware | None = None
) -> Policy | ExportedPolicy:
    """Load the policy of a run, a bundle or an ONNX export, ready to act.

        policy.reset()
        action = policy.act(iw.Observation(images={"top": picture}, state=state, instruction="stack the blocks"))

    weights: a diffusers folder of the policy's editor, instead of the embedded or downloaded weights.

    Raises:
        RunError: the folder holds no policy, the policy is damaged, or the editor is not the one that it was trained
            on.
        UsageError: this machine does not have the device.
    """
    return loading.load_policy(
        _folder(path),
        hardware=hardware or Hardware(device=device),
        weights=_path(weights),
    )


def evaluate(
    policy: ChunkPolicy,
    *,
    env: str = "tabletop",
    episodes: int = 50,
    splits: Sequence[str] = (),
    seed: int = 0,
    cameras: Mapping[str, str] | None = None,
    progress: bool = False,
) -> ClosedLoopResult:
    """Run the policy in a simulator and count successes, on `episodes` scenes of each split.

    splits: names of splits; empty: all but `train`.
    cameras: camera of the simulator -> camera of the policy, where their names differ.

    Raises:
        UnknownNameError: no environment or split has this name.
        RunError: the policy and the simulator differ in cameras, names of states or actions, or rate.
    """
    from imagewam_cli.evaluation.closed_loop import evaluate_in_simulator
    from imagewam_cli.sim.environment import load_environment

    make = load_environment(env)
    chosen = tuple(splits) or tuple(split for split in make().splits if split != "train")
    with _bar(progress, episodes * len(chosen), "episode") as advance:
        result, _ = evaluate_in_simulator(
            make, policy, episodes=episodes, splits=chosen, seed=seed, cameras=cameras, on_episode=lambda _: advance(1)
        )
    return result


def open_loop(
    policy: Policy | ExportedPolicy,
    dataset: Dataset,
    *,
    episodes: int | None = None,
    held_out: bool = False,
    cameras: Mapping[str, str] | None = None,
) -> OpenLoopResult:
    """Compare the policy's action chunks with the recorded actions of a dataset.

    Args:
        episodes: use only the first `episodes` episodes; None: all.
        held_out: use only episodes that the policy was not trained on.
        cameras: camera of the dataset -> camera of the policy, where their names differ.

    Raises:
        RunError: the policy and the dataset differ in cameras, names of states or actions, or rate.
        DatasetError: the dataset is damaged, or it is unknown which episodes were held out.
    """
    from imagewam_cli.evaluation.open_loop import open_loop as compare
    from imagewam_cli.training.held_out import exposure

    every = [episode.index for episode in dataset.episodes()]
    chosen = (exposure(policy, dataset).held_out(dataset) if held_out else every)[:episodes]
    return compare(policy, dataset, horizon=policy.horizon, episodes=chosen, cameras=cameras)


def export_policy(
    run: Run | str | Path, out: str | Path, *, format: str = "onnx", weights: str | Path | None = None
) -> ExportReport:
    """Export a policy and check the export against torch on real rows.

    Args:
        format: onnx, bundle, or a plugin's format.
        weights: as in `load_policy`.

    Raises:
        ExportError: the export differs from torch, or the format cannot represent the policy.
        UsageError: `out` holds something else.
    """
    from imagewam_cli.policy.bundle import find_bundle

    exporter = Registry.installed().exporters.load(format)()
    report: ExportReport = exporter.export(find_bundle(_folder(run)), expanded(out), weights=_path(weights))
    return report


@contextmanager
def _bar(shown: bool, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar; yield the function that advances it."""
    with progress(total, unit, shown=shown) as bar:
        yield bar.update


def _folder(run: Run | str | Path) -> Path:
    return run.folder if isinstance(run, Run) else expanded(run)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else expanded(path)
