"""Closed-loop success: how many scenes of a simulator a policy solves, per split and kind of task.

`evaluate_in_simulator` rolls out episodes and summarizes them; `summarize` takes episodes rolled out elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from imagewam_cli.errors import UnknownNameError, UsageError
from imagewam_cli.evaluation.statistics import Rate
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.matching import matched_policy
from imagewam_cli.sim.environment import Environment, interface_of
from imagewam_cli.sim.rollout import Episode, roll_out


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a group of episodes. mean_steps: mean length of the successful ones; None if there are none."""

    success: Rate
    mean_steps: float | None


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """Results of one split: of all its episodes, and per kind of task (sorted by name)."""

    total: Outcome
    kinds: Mapping[str, Outcome]


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """An episode without its pictures. given: the instruction shown to the policy."""

    seed: int
    split: str
    kind: str
    instruction: str
    given: str
    success: bool
    steps: int


@dataclass(frozen=True, kw_only=True)
class ClosedLoopResult:
    """Results per split, in the order of evaluation, and every episode.

    `config.to_dict` converts the result to JSON-ready values, and `config.from_dict` reads them back.
    """

    splits: Mapping[str, SplitResult]
    episodes: tuple[EpisodeRecord, ...]


def summarize(episodes: Sequence[Episode]) -> ClosedLoopResult:
    """Count successes per split, and per kind of task within each split."""
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
    cameras: Mapping[str, str] | None = None,
    batch: int = 25,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> tuple[ClosedLoopResult, list[Episode]]:
    """Roll out scenes seed .. seed + episodes - 1 of each split and summarize them.

    policy: None for the environment's scripted demonstrator.
    other_instructions: give the policy the instruction of the next scene whose instruction differs (cyclically), but
        score it by the scene's own goal. A policy that ignores instructions keeps its success rate; one that
        follows them loses it.
    cameras: camera of the environment -> camera of the policy, where their names differ.
    max_steps: limit on the steps of an episode; None: the environment's limit.
    keep_frames: number of scenes, from the first, whose `Episode.frames` keep every picture of the first camera, for
        contact sheets and videos.
    batch: number of scenes that run side by side.

    Raises:
        UsageError: `episodes`, `max_steps`, `batch` or `policy.execute` is below 1, or all scenes have the same
            instruction although `other_instructions` is set.
        UnknownNameError: the environment has no such split.
        RunError: the policy and the environment differ in cameras, names or rate; see `policy.matching`.
    """
    execute = None if policy is None else policy.execute
    for name, value in (("episodes", episodes), ("max_steps", max_steps), ("batch", batch), ("execute", execute)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not splits:
        raise UsageError("no split to evaluate on", "name at least one split")
    scenes = make_env()
    for split in splits:
        if split not in scenes.splits:
            raise UnknownNameError("split", split, scenes.splits)
    interface = interface_of(scenes)
    if policy is not None:
        policy = matched_policy(policy, interface, cameras)
    seeds = range(seed, seed + episodes)
    replaced = {split: _others(scenes, seeds, split) for split in splits} if other_instructions else {}
    rolled: list[Episode] = []
    for split in dict.fromkeys(splits):
        rolled += roll_out(
            make_env,
            policy,
            seeds,
            split,
            max_steps=max_steps,
            keep_frames=keep_frames - len(rolled),
            instruction_of=replaced[split].__getitem__ if other_instructions else None,
            batch=batch,
            on_episode=on_episode,
        )
    return summarize(rolled), rolled


def _others(env: Environment, seeds: Sequence[int], split: str) -> dict[int, str]:
    """Return seed -> the instruction of the next scene (cyclically) whose instruction differs."""
    own = [env.reset(seed, split).instruction for seed in seeds]
    if len(set(own)) < 2:
        raise UsageError(
            f"the {len(own)} scenes of split {split!r} all have the instruction {own[0]!r}",
            "evaluate more episodes, so that instructions can be exchanged",
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
