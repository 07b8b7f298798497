"""Compare open-loop errors with a plain computation over the same recording."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from imagewam_cli.cli.tables import open_loop_table
from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.data.types import Dataset, Float32Array, Observation, Row
from imagewam_cli.errors import DatasetError, RunError, UsageError
from imagewam_cli.evaluation.open_loop import OpenLoopResult, open_loop
from imagewam_cli.policy.acting import ChunkPolicy

HORIZON = 12
PLANNED = 16
STRIDE = 5


def plan(state: Float32Array) -> Float32Array:
    """Return a chunk (PLANNED, 3) that depends on the state and the step."""
    return np.stack([0.5 - state + 0.02 * step for step in range(PLANNED)]).astype(np.float32)


class StatePolicy(ChunkPolicy):
    """Plan `plan(state)` and remember the observations."""

    execute = 4

    def __init__(self) -> None:
        self.calls: list[list[Observation]] = []

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        self.calls.append(list(observations))
        return np.stack([plan(o.state) for o in observations])


class FixedPolicy(ChunkPolicy):
    """Plan the same chunk every time."""

    execute = 4

    def __init__(self, chunk: Any) -> None:
        self.chunk = np.asarray(chunk)

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        return np.stack([self.chunk] * len(observations))


def recorded(dataset: Dataset) -> dict[int, list[Row]]:
    episodes: dict[int, list[Row]] = {}
    for row in dataset.rows():
        episodes.setdefault(row.episode, []).append(row)
    return episodes


def test_every_number_equals_a_plain_computation(demonstrations: Dataset) -> None:
    """Collect all differences in loops over episodes, frames, steps and dimensions."""
    pairs: list[list[list[tuple[float, float]]]] = [[[] for _ in range(3)] for _ in range(HORIZON)]
    by_episode: dict[int, list[float]] = {}
    rows = 0
    for index, frames in recorded(demonstrations).items():
        for start in range(0, len(frames), STRIDE):
            rows += 1
            chunk = plan(frames[start].state)
            for step in range(min(HORIZON, len(frames) - start)):
                for i in range(3):
                    truth = float(frames[start + step].action[i])
                    pairs[step][i].append((float(chunk[step, i]), truth))
                    by_episode.setdefault(index, []).append(float(chunk[step, i]) - truth)

    result = open_loop(StatePolicy(), demonstrations, horizon=HORIZON, stride=STRIDE, batch=4)

    everything = np.concatenate([np.array(p) for step in pairs for p in step])
    constants = np.concatenate([np.full(len(p), np.mean([t for _, t in p])) for step in pairs for p in step])
    difference, constant_difference = everything[:, 0] - everything[:, 1], constants - everything[:, 1]
    assert (result.rows, result.episodes, result.horizon, result.stride) == (rows, 3, HORIZON, STRIDE)
    assert result.action_names == ("dx", "dy", "grip")
    assert result.policy.mean_absolute == pytest.approx(np.abs(difference).mean())
    assert result.policy.mean_squared == result.mean_squared_error == pytest.approx((difference**2).mean())
    assert result.constant.mean_absolute == pytest.approx(np.abs(constant_difference).mean())
    assert result.constant.mean_squared == pytest.approx((constant_difference**2).mean())
    assert result.ratio_to_constant == pytest.approx((difference**2).mean() / (constant_difference**2).mean())
    for step in range(HORIZON):
        for i in range(3):
            planned, truth = np.array(pairs[step][i]).T
            assert result.policy.absolute[step][i] == pytest.approx(np.abs(planned - truth).mean())
            assert result.policy.squared[step][i] == pytest.approx(((planned - truth) ** 2).mean())
            assert result.constant.absolute[step][i] == pytest.approx(np.abs(truth.mean() - truth).mean())
            assert result.constant.squared[step][i] == pytest.approx(truth.var())
    for i, error in enumerate(result.per_action):
        planned, truth = np.concatenate([np.array(step[i]) for step in pairs]).T
        constant = np.concatenate([np.full(len(step[i]), np.mean([t for _, t in step[i]])) for step in pairs])
        assert error.name == result.action_names[i]
        assert error.policy == pytest.approx(np.abs(planned - truth).mean())
        assert error.constant == pytest.approx(np.abs(constant - truth).mean())
        assert error.ratio == pytest.approx(((planned - truth) ** 2).sum() / ((constant - truth) ** 2).sum())
    for episode in result.per_episode:
        values = np.array(by_episode[episode.episode])
        assert episode.mean_absolute == pytest.approx(np.abs(values).mean())
        assert episode.mean_squared == pytest.approx((values**2).mean())
    assert sum(e.rows for e in result.per_episode) == rows


def test_the_policy_gets_images_state_and_instruction_in_batches(demonstrations: Dataset) -> None:
    policy = StatePolicy()
    finished: list[int] = []
    open_loop(policy, demonstrations, horizon=HORIZON, stride=STRIDE, batch=4, on_rows=finished.append)
    expected = [row for frames in recorded(demonstrations).values() for row in frames[::STRIDE]]
    seen = [o for call in policy.calls for o in call]
    assert [len(call) for call in policy.calls] == finished
    assert set(finished[:-1]) == {4}
    assert len(seen) == len(expected)
    for observation, row in zip(seen, expected, strict=True):
        assert observation.instruction == row.instruction
        assert observation.state.tolist() == row.state.tolist()
        assert np.array_equal(observation.images["top"], row.images["top"])


def test_the_batch_size_does_not_change_the_result(demonstrations: Dataset) -> None:
    one, many = (open_loop(StatePolicy(), demonstrations, horizon=HORIZON, batch=batch) for batch in (1, 100))
    assert one == many


def test_the_best_constant_chunk_has_ratio_one(demonstrations: Dataset) -> None:
    chunks = [
        np.array([row.action for row in frames[start : start + HORIZON]])
        for frames in recorded(demonstrations).values()
        for start in range(0, len(frames), STRIDE)
    ]
    mean = [np.mean([c[step] for c in chunks if step < len(c)], axis=0, dtype=np.float64) for step in range(HORIZON)]
    result = open_loop(FixedPolicy(mean), demonstrations, horizon=HORIZON, stride=STRIDE)
    assert result.ratio_to_constant == pytest.approx(1.0)
    assert [e.ratio for e in result.per_action] == pytest.approx([1.0, 1.0, 1.0])
    worse = open_loop(FixedPolicy(np.array(mean) + 0.1), demonstrations, horizon=HORIZON, stride=STRIDE)
    assert worse.ratio_to_constant > 1


def test_repeating_the_recording_has_no_error(demonstrations: Dataset) -> None:
    episodes = recorded(demonstrations)

    class Recorded(ChunkPolicy):
        execute = 1

        def chunks(self, observations: Sequence[Observation]) -> Float32Array:
            return np.stack([self._chunk(o) for o in observations])

        def _chunk(self, observation: Observation) -> Float32Array:
            for frames in episodes.values():
                for start, row in enumerate(frames):
                    if row.instruction == observation.instruction and np.array_equal(row.state, observation.state):
                        actions = [r.action for r in frames[start : start + HORIZON]]
                        # Actions planned after the end of the episode are not compared, so any value will do.
                        return np.concatenate([actions, np.full((HORIZON - len(actions), 3), 1e6, np.float32)])
            raise AssertionError("no such row")

    result = open_loop(Recorded(), demonstrations, horizon=HORIZON, stride=STRIDE)
    assert result.policy.mean_absolute == result.ratio_to_constant == 0


def test_only_the_given_episodes_are_evaluated(demonstrations: Dataset) -> None:
    whole = open_loop(StatePolicy(), demonstrations, horizon=HORIZON)
    part = open_loop(StatePolicy(), demonstrations, horizon=HORIZON, episodes=[2, 0])
    assert [e.episode for e in part.per_episode] == [0, 2]
    assert part.episodes == 2
    assert part.per_episode == (whole.per_episode[0], whole.per_episode[2])


def test_steps_longer_than_every_episode_are_omitted(demonstrations: Dataset) -> None:
    longest = max(e.length for e in demonstrations.episodes())
    result = open_loop(FixedPolicy(np.zeros((200, 3))), demonstrations, horizon=200)
    assert result.horizon == len(result.policy.absolute) == longest


def test_the_result_is_json_and_can_be_read_back(demonstrations: Dataset) -> None:
    result = open_loop(StatePolicy(), demonstrations, horizon=3)
    assert from_dict(OpenLoopResult, json.loads(dump_json(to_dict(result)))) == result


def test_the_table_has_a_line_per_joint(demonstrations: Dataset) -> None:
    result = open_loop(StatePolicy(), demonstrations, horizon=3)
    lines = open_loop_table(result).splitlines()
    assert [line.split()[0] for line in lines] == ["action", "dx", "dy", "grip", "all"]
    assert lines[-1].split()[1:] == [
        f"{result.policy.mean_absolute:.4g}",
        f"{result.constant.mean_absolute:.4g}",
        f"{result.ratio_to_constant:.3f}",
    ]


class Streamed:
    """A dataset that counts the pictures it returns."""

    def __init__(self, dataset: Dataset) -> None:
        self.info, self.episodes, self._dataset, self.given = dataset.info, dataset.episodes, dataset, 0

    def rows(self, *, images: bool = True, **arguments: Any) -> Iterator[Row]:
        for row in self._dataset.rows(images=images, **arguments):
            self.given += images
            yield row


def test_images_are_read_batch_by_batch(demonstrations: Dataset) -> None:
    dataset = Streamed(demonstrations)

    class Counting(StatePolicy):
        def chunks(self, observations: Sequence[Observation]) -> Float32Array:
            planned = sum(len(call) for call in self.calls)
            assert dataset.given <= planned + 4
            return super().chunks(observations)

    open_loop(Counting(), dataset, horizon=HORIZON, stride=STRIDE, batch=4)
    assert dataset.given == sum(-(-e.length // STRIDE) for e in dataset.episodes())


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"stride": 0}, {"batch": 0}, {"episodes": []}])
def test_numbers_below_one_are_refused(demonstrations: Dataset, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        open_loop(StatePolicy(), demonstrations, **({"horizon": 4} | wrong))


def test_an_unknown_episode_is_refused(demonstrations: Dataset) -> None:
    with pytest.raises(DatasetError, match="no episode 7"):
        open_loop(StatePolicy(), demonstrations, horizon=4, episodes=[7])


def test_a_policy_with_too_short_chunks_is_refused(demonstrations: Dataset) -> None:
    with pytest.raises(UsageError, match="plans 16 steps, fewer than the horizon 17"):
        open_loop(StatePolicy(), demonstrations, horizon=17)


def test_a_policy_with_another_action_dimension_is_refused(demonstrations: Dataset) -> None:
    with pytest.raises(DatasetError, match="3 action dimensions: dx, dy, grip"):
        open_loop(FixedPolicy(np.zeros((16, 7))), demonstrations, horizon=4)


def test_a_plan_that_is_not_finite_names_the_frame(demonstrations: Dataset) -> None:
    with pytest.raises(RunError, match="episode 0, frame 0"):
        open_loop(FixedPolicy(np.full((16, 3), np.nan)), demonstrations, horizon=4)
