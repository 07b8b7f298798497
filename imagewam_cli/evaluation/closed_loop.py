"""Closed-loop success: how many scenes of a simulator a policy solves, per split and kind of task.

`summarize` counts episodes that were rolled out anywhere; `evaluate_in_simulator` rolls them out first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from imagewam_cli.errors import UnknownNameError, UsageError
from imagewam_cli.evaluation.statistics import Rate
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.sim.environment import Environment
from imagewam_cli.sim.rollout import Episode, roll_out


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a group of episodes. mean_steps: of the successful ones, None where there are none."""

    success: Rate
    mean_steps: float | None


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """One split: all its episodes, and apart by kind of task (sorted by name)."""

    total: Outcome
    kinds: Mapping[str, Outcome]


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """An episode without its pictures. `given`: the instruction that the policy read."""

    seed: int
    split: str
    kind: str
    instruction: str
    given: str
    success: bool
    steps: int


@dataclass(frozen=True, kw_only=True)
class ClosedLoopResult:
    """Results per split, in the order in which the splits were run, and every single episode.

    `config.to_dict` makes plain JSON-able values of it, `config.from_dict` reads them back.
    """

    splits: Mapping[str, SplitResult]
    episodes: tuple[EpisodeRecord, ...]


def summarize(episodes: Sequence[Episode]) -> ClosedLoopResult:
    """Count successes per split and, inside, per kind of task."""
    splits = {}
    for split in dict.fromkeys(e.split for e in episodes):
        members = [e for e in episodes if e.split == split]
        kinds = {kind: _outcome([e for e in members if e.kind == kind]) for kind in sorted({e.kind for e in members})}
        splits[split] = SplitResult(total=_outcome(members), kinds=kinds)
    return ClosedLoopResult(splits=splits, episodes=tuple(_record(e) for e in episodes))


def evaluate_in_simulator(
    make_env: Callable[[], Environment],
    policy: ChunkPolicy | None,
    *,
    episodes: int,
    splits: Sequence[str],
    seed: int = 0,
    max_steps: int | None = None,
    keep_frames: int = 0,
    other_instructions: bool = False,
    batch: int = 25,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> tuple[ClosedLoopResult, list[Episode]]:
    """Roll out scenes seed .. seed + episodes - 1 of each split; `policy` None: the environment's scripted expert.

    other_instructions: tell the policy the instruction of the next scene that has another one (the last scenes take
        the first ones'), and judge by the scene's own goal. A policy that ignores what it is told keeps its success
        rate, one that listens loses it.
    max_steps: fewer than the environment allows; None: as many as it allows.
    keep_frames: of how many scenes, from the first, every picture of the first camera is kept in `Episode.frames`, for
        contact sheets and videos.
    batch: scenes that run side by side.

    Raises:
        UsageError: fewer than one episode, step, scene at a time or action per plan (`policy.execute`), or no two
            instructions that differ.
        UnknownNameError: the environment has no such split.
    """
    execute = None if policy is None else policy.execute
    for name, value in (("episodes", episodes), ("max_steps", max_steps), ("batch", batch), ("execute", execute)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}", f"pass at least 1 as {name}")
    if not splits:
        raise UsageError("no split to evaluate on", "name at least one")
    scenes = make_env()
    for split in splits:
        if split not in scenes.splits:
            raise UnknownNameError("split", split, scenes.splits)
    seeds = range(seed, seed + episodes)
    told = {split: _others(scenes, seeds, split) for split in splits} if other_instructions else {}
    rolled: list[Episode] = []
    for split in dict.fromkeys(splits):
        rolled += roll_out(
            make_env,
            policy,
            seeds,
            split,
            max_steps=max_steps,
            keep_frames=keep_frames - len(rolled),
            instruction_of=told[split].__getitem__ if other_instructions else None,
            batch=batch,
            on_episode=on_episode,
        )
    return summarize(rolled), rolled


def _others(env: Environment, seeds: Sequence[int], split: str) -> dict[int, str]:
    """seed -> instruction of the next scene, cyclically, whose instruction is another."""
    own = [env.reset(seed, split).instruction for seed in seeds]
    if len(set(own)) < 2:
        raise UsageError(
            f"the {len(own)} scenes of split {split!r} all have the instruction {own[0]!r}",
            "other instructions need two scenes that differ: evaluate more episodes",
        )
    others = {}
    for i, seed in enumerate(seeds):
        following = own[i + 1 :] + own[:i]
        others[seed] = next(instruction for instruction in following if instruction != own[i])
    return others


def _outcome(episodes: Sequence[Episode]) -> Outcome:
    steps = [e.steps for e in episodes if e.success]
    return Outcome(success=Rate.of(len(steps), len(episodes)), mean_steps=sum(steps) / len(steps) if steps else None)


def _record(episode: Episode) -> EpisodeRecord:
    return EpisodeRecord(
        seed=episode.seed,
        split=episode.split,
        kind=episode.kind,
        instruction=episode.instruction,
        given=episode.given,
        success=episode.success,
        steps=episode.steps,
    )
