"""Roll out a policy in many scenes in lockstep, so that it plans for all of them in one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from imagewam_cli.data.types import FloatArray, Observation, UInt8Image
from imagewam_cli.errors import UsageError
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.sim.environment import Environment


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One rolled-out scene.

    instruction: the scene's own; given: the one shown to the policy, which differs if `instruction_of` replaced it.
    """

    seed: int
    split: str
    kind: str
    instruction: str
    given: str
    success: bool
    steps: int
    frames: tuple[UInt8Image, ...] = field(default=(), repr=False)


def roll_out(
    make: Callable[[], Environment],
    policy: ChunkPolicy | None,
    seeds: Sequence[int],
    split: str,
    *,
    max_steps: int | None = None,
    keep_frames: int = 0,
    instruction_of: Callable[[int], str] | None = None,
    batch: int = 25,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> list[Episode]:
    """Roll out the scenes `seeds` of `split`.

    policy: None for the environment's scripted demonstrator.
    instruction_of: seed -> the instruction shown to the policy instead of the scene's own.
    max_steps: stop an episode after this many steps; None: the environment's limit.
    keep_frames: number of scenes, from the first, whose `Episode.frames` keep the first camera's pictures.

    Raises:
        UsageError: `policy.execute` is below 1.
    """
    if policy is not None and policy.execute < 1:
        raise UsageError(f"execute must be at least 1, got {policy.execute}")
    episodes: list[Episode] = []
    for i in range(0, len(seeds), batch):
        scenes = [
            _RunningScene(make(), seed, split, instruction_of, keep_frames=number < keep_frames)
            for number, seed in enumerate(seeds[i : i + batch], start=i)
        ]
        limit = scenes[0].env.max_steps if max_steps is None else max_steps
        while any(scene.running(limit) for scene in scenes):
            active = [scene for scene in scenes if scene.running(limit)]
            _plan(policy, active)
            for scene in active:
                scene.advance()
        for scene in scenes:
            episodes.append(scene.episode())
            on_episode(episodes[-1])
    return episodes


def _plan(policy: ChunkPolicy | None, scenes: list[_RunningScene]) -> None:
    """Plan new actions for every scene whose queue is empty."""
    waiting = [scene for scene in scenes if not scene.queue]
    if not waiting:
        return
    if policy is None:
        for scene in waiting:
            scene.queue = [scene.env.demonstrate()]
        return
    chunks = policy.chunks([scene.policy_observation() for scene in waiting])
    for scene, chunk in zip(waiting, chunks, strict=True):
        scene.queue = list(chunk[: policy.execute])


class _RunningScene:
    """One scene during a rollout: its environment, queued actions and kept frames."""

    def __init__(
        self,
        env: Environment,
        seed: int,
        split: str,
        instruction_of: Callable[[int], str] | None,
        *,
        keep_frames: bool,
    ) -> None:
        self.env, self.seed, self.split, self.keep_frames = env, seed, split, keep_frames
        self.observation = env.reset(seed, split)
        self.instruction = self.observation.instruction
        self.given = instruction_of(seed) if instruction_of is not None else self.instruction
        self.queue: list[FloatArray] = []
        self.frames: list[UInt8Image] = []
        self.success, self.finished, self.steps = False, False, 0
        self._keep_frame()

    def running(self, limit: int) -> bool:
        return not self.finished and self.steps < limit

    def policy_observation(self) -> Observation:
        return dataclasses.replace(self.observation, instruction=self.given)

    def advance(self) -> None:
        """Execute the next queued action."""
        result = self.env.step(np.asarray(self.queue.pop(0)))
        self.observation, self.success, self.finished = result.observation, result.success, result.finished
        self.steps += 1
        self._keep_frame()

    def episode(self) -> Episode:
        return Episode(
            seed=self.seed,
            split=self.split,
            kind=self.env.kind(),
            instruction=self.instruction,
            given=self.given,
            success=self.success,
            steps=self.steps,
            frames=tuple(self.frames),
        )

    def _keep_frame(self) -> None:
        if self.keep_frames:
            self.frames.append(next(iter(self.observation.images.values())))
