"""`imagewam eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.dataset_options import DatasetOptions, takes_dataset_options
from imagewam_cli.cli.help import ADVANCED, CONDITION, INPUT, OUTPUT
from imagewam_cli.cli.options import (
    CompileOption,
    DeviceOption,
    FormatName,
    FormatOption,
    OffloadOption,
    WeightsOption,
    chosen_hardware,
    existing_dataset,
    existing_policy,
    from_home,
    newest_with_notice,
    require_at_least_one,
    split_names,
)
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output
from imagewam_cli.editors.loading.hardware import Hardware

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewam_cli.policy.acting import ChunkPolicy
    from imagewam_cli.sim.environment import Environment

BASELINES = ("random", "expert")
_SHEET_EPISODES = 16


@takes_dataset_options(only_with="--dataset", of_policy=True)
def eval_command(
    *,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="FOLDER",
            help="A run, bundle or ONNX export, or the baselines random and expert; by default the newest run.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    env: Annotated[
        str | None,
        typer.Option(
            "--env",
            metavar="NAME",
            help="Simulator, by default tabletop; `imagewam plugins --hook environments` lists them.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            callback=from_home,
            help="Compare with the recorded actions of this dataset instead of running a simulator.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    episodes: Annotated[
        int,
        typer.Option(
            "--episodes",
            metavar="N",
            help="Number of scenes per split, or of episodes of the dataset.",
            rich_help_panel=INPUT,
        ),
    ] = 50,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            metavar="NAME",
            help="Split to evaluate on; repeat it for several. By default all but train.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, metavar="N", help="Seed of the first scene, by default 0.", rich_help_panel=INPUT
        ),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Score only episodes that the policy was not trained on.",
            rich_help_panel=f"{INPUT}{CONDITION}--dataset",
        ),
    ] = False,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", metavar="N", help="Maximum number of steps per episode.", rich_help_panel=ADVANCED),
    ] = None,
    execute: Annotated[
        int | None,
        typer.Option(
            "--execute",
            metavar="N",
            help="Actions to execute from each chunk before predicting the next.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    other_instructions: Annotated[
        bool,
        typer.Option(
            "--other-instructions",
            help="Ablation: give the policy the instruction of a different scene.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    video: Annotated[
        str | None,
        typer.Option(
            "--video",
            metavar="KINDS",
            help="Record the rollouts as sheet, gif or mp4; separate several with commas.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            callback=from_home,
            help="Folder for the results; by default POLICY/eval/ENV.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    compile: CompileOption = False,
    reading: DatasetOptions,
    format: FormatOption = FormatName.human,
) -> None:
    """Measure how often a policy succeeds in a simulator.

    With --dataset, measure instead how far its actions are from the recorded ones.

    Examples:
        imagewam eval --policy runs/first --episodes 50 --video sheet,gif
        imagewam eval --policy runs/first --dataset datasets/tabletop
    """
    from imagewam_cli.errors import UsageError

    given = {"episodes": episodes, "max_steps": max_steps, "execute": execute}
    require_at_least_one(**{name: value for name, value in given.items() if value is not None})
    hardware = chosen_hardware(device, offload, compile)
    name = policy if policy is not None else str(newest_with_notice("--policy", "run"))
    if name not in BASELINES:
        name = str(existing_policy("--policy", Path(name)))
    of_simulator = {
        "--env": env,
        "--split": split or None,
        "--seed": seed,
        "--max-steps": max_steps,
        "--execute": execute,
        "--other-instructions": other_instructions,
        "--video": video,
    }
    if dataset is not None:
        _refuse(of_simulator, "--dataset, which compares with recorded actions")
        _open_loop(
            name=name,
            dataset=existing_dataset(dataset),
            reading=reading,
            episodes=episodes,
            held_out=held_out,
            out=out,
            weights=weights,
            hardware=hardware,
            format=format,
        )
        return
    camera = reading.camera
    dataclasses.replace(reading, camera=None).require_unused("--dataset")
    if held_out:
        raise UsageError("--held-out has no effect without --dataset", "omit --held-out, or add --dataset")
    if name in BASELINES:
        of_policy: dict[str, object] = {
            "--weights": weights,
            "--device": device != "cpu",
            "--offload": offload != "none",
        }
        of_policy |= {"--compile": compile, "--camera": camera or None}
        if name == "expert":
            of_policy |= {"--execute": execute, "--other-instructions": other_instructions}
        _refuse(of_policy, f"the baseline {name!r}")
    _closed_loop(
        name=name,
        env=env if env is not None else "tabletop",
        camera=camera or [],
        episodes=episodes,
        split=split,
        seed=seed or 0,
        max_steps=max_steps,
        execute=execute,
        other_instructions=other_instructions,
        pictures=_pictures(video),
        out=out,
        weights=weights,
        hardware=hardware,
        format=format,
    )


def _refuse(given: Mapping[str, object], because: str) -> None:
    """Check that no option was given that has no effect. given: option -> its value.

    Raises:
        UsageError: an option was given.
    """
    from imagewam_cli.errors import UsageError

    for option, value in given.items():
        if value is not None and value is not False:
            raise UsageError(f"{option} has no effect with {because}", f"omit {option}")


def _closed_loop(
    *,
    name: str,
    env: str,
    camera: Sequence[str],
    episodes: int,
    split: list[str] | None,
    seed: int,
    max_steps: int | None,
    execute: int | None,
    other_instructions: bool,
    pictures: list[str],
    out: Path | None,
    weights: Path | None,
    hardware: Hardware,
    format: FormatName,
) -> None:
    from imagewam_cli.cli.tables import closed_loop_table
    from imagewam_cli.config import dump_json, to_dict
    from imagewam_cli.errors import UnknownNameError
    from imagewam_cli.evaluation.closed_loop import evaluate_in_simulator
    from imagewam_cli.evaluation.pictures import MAX_EPISODES, contact_sheet, write_gif, write_mp4, write_picture
    from imagewam_cli.files import write_atomically
    from imagewam_cli.policy.matching import camera_names
    from imagewam_cli.sim.environment import load_environment

    make = load_environment(env)
    known = make().splits
    for wanted in split or []:
        if wanted not in known:
            raise UnknownNameError("split", wanted, known)
    splits = tuple(split) if split else tuple(s for s in known if s != "train")
    folder = (
        out if out is not None else _results_folder(name, env + ("-other-instructions" if other_instructions else ""))
    )
    require_writable(folder)
    acting = _policy(name, make, weights, hardware)
    if execute is not None and acting is not None:
        _require_planned(execute, acting)
        acting.execute = execute
    interface = None if acting is None else acting.interface
    with _locked(folder), output.progress(episodes * len(splits), "episode") as bar:
        result, rolled = evaluate_in_simulator(
            make,
            acting,
            episodes=episodes,
            splits=splits,
            seed=seed,
            max_steps=max_steps,
            keep_frames=max(MAX_EPISODES, _SHEET_EPISODES) if pictures else 0,
            other_instructions=other_instructions,
            cameras={} if interface is None else camera_names(camera, interface),
            on_episode=lambda _episode: bar.update(),
        )
        write_atomically(folder / "result.json", dump_json(to_dict(result)).encode())
        for picture in ("sheet.png", "rollouts.gif", "rollouts.mp4"):  # those of an earlier evaluation
            (folder / picture).unlink(missing_ok=True)
        if "sheet" in pictures:
            write_picture(folder / "sheet.png", contact_sheet(rolled[:_SHEET_EPISODES]))
        if "gif" in pictures:
            write_gif(folder / "rollouts.gif", rolled)
        if "mp4" in pictures:
            write_mp4(folder / "rollouts.mp4", rolled)
    output.result(
        to_dict(result) | {"folder": str(folder)}, f"{closed_loop_table(result)}\n{folder}/result.json", format.value
    )


def _open_loop(
    *,
    name: str,
    dataset: Path,
    reading: DatasetOptions,
    episodes: int,
    held_out: bool,
    out: Path | None,
    weights: Path | None,
    hardware: Hardware,
    format: FormatName,
) -> None:
    from imagewam_cli.cli.tables import open_loop_summary, open_loop_table
    from imagewam_cli.config import dump_json, to_dict
    from imagewam_cli.errors import ImagewamError, UsageError
    from imagewam_cli.evaluation.open_loop import open_loop
    from imagewam_cli.evaluation.plots import plot_open_loop
    from imagewam_cli.files import write_atomically
    from imagewam_cli.policy.loading import load_policy
    from imagewam_cli.training.held_out import USES, exposure

    if name in BASELINES:
        raise UsageError(f"the baseline {name!r} needs a simulator", "omit --dataset, or pass a trained --policy")
    folder = out if out is not None else _results_folder(name, dataset.resolve().name)
    require_writable(folder)
    policy = load_policy(Path(name), hardware=hardware, weights=weights)
    rows, cameras = reading.open_for(policy, dataset)
    known = exposure(policy, rows)
    candidates = known.held_out(rows) if held_out else tuple(e.index for e in rows.episodes())
    with _locked(folder):
        result = open_loop(policy, rows, horizon=policy.horizon, episodes=candidates[:episodes], cameras=cameras)
        write_atomically(folder / "open_loop.json", dump_json(to_dict(result)).encode())
        (folder / "open_loop.png").unlink(missing_ok=True)
        try:
            plot_open_loop(result, folder / "open_loop.png")
        except ImagewamError as error:  # matplotlib is an extra; the numbers do not need it
            output.say(f"no plot: {error.message} ({error.hint})")
    summary = open_loop_summary(result, len(candidates))
    counts = {use.replace(" ", "_"): result.count(use) for use in USES}
    text = f"{open_loop_table(result)}\n{summary}\n{folder}/open_loop.json"
    output.result(to_dict(result) | {"training": counts, "folder": str(folder)}, text, format.value)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of the folder of the results."""
    from imagewam_cli.errors import RunError
    from imagewam_cli.lock import write_lock

    with write_lock(folder, error=RunError, hint="wait for it to end, or choose another folder with --out"):
        yield


def _require_planned(execute: int, policy: ChunkPolicy) -> None:
    from imagewam_cli.errors import UsageError
    from imagewam_cli.policy.acting import RandomPolicy

    planned = policy.execute if isinstance(policy, RandomPolicy) else getattr(policy, "horizon", execute)
    if execute > planned:
        raise UsageError(f"--execute {execute}: the policy plans only {planned} actions", f"pass {planned} or fewer")


def _policy(name: str, make: Callable[[], Environment], weights: Path | None, hardware: Hardware) -> ChunkPolicy | None:
    """Return the policy; None for the scripted expert of the environment."""
    from imagewam_cli.policy.acting import RandomPolicy
    from imagewam_cli.policy.loading import load_policy

    if name == "expert":
        return None
    if name == "random":
        return RandomPolicy(len(make().action_names))
    return load_policy(Path(name), hardware=hardware, weights=weights)


def _results_folder(policy: str, what: str) -> Path:
    return Path("evals") / f"{policy}-{what}" if policy in BASELINES else Path(policy) / "eval" / what


def _pictures(text: str | None) -> list[str]:
    from imagewam_cli.errors import UnknownNameError

    kinds = list(split_names(text) or ())
    for kind in kinds:
        if kind not in ("sheet", "gif", "mp4"):
            raise UnknownNameError("kind of picture", kind, ["sheet", "gif", "mp4"])
    return kinds
