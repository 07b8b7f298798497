"""Test `policy.acting`: receding-horizon execution of chunks from any policy."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from imagewam_cli.data.types import Float32Array, Observation
from imagewam_cli.policy.acting import ChunkPolicy, RandomPolicy

SOMETHING = Observation(images={}, state=np.zeros(1, np.float32), instruction="")


class Counting(ChunkPolicy):
    """A policy whose n-th chunk is n.0, n.1, n.2, ..."""

    def __init__(self, execute: int, horizon: int = 5) -> None:
        self.execute, self.horizon, self.plans = execute, horizon, 0

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        self.plans += 1
        steps = self.plans + 0.1 * np.arange(self.horizon)
        return np.tile(steps[None, :, None], (len(observations), 1, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("execute", "expected"),
    [
        (1, [1.0, 2.0, 3.0, 4.0, 5.0]),
        (2, [1.0, 1.1, 2.0, 2.1, 3.0]),
        (5, [1.0, 1.1, 1.2, 1.3, 1.4]),
        (9, [1.0, 1.1, 1.2, 1.3, 1.4, 2.0]),  # a chunk has only five actions
    ],
)
def test_each_chunk_is_executed_for_the_configured_number_of_actions(execute: int, expected: list[float]) -> None:
    policy = Counting(execute)
    acted = [float(policy.act(SOMETHING)[0]) for _ in expected]
    np.testing.assert_allclose(acted, expected, rtol=1e-6)


def test_reset_discards_the_current_chunk() -> None:
    policy = Counting(4)
    first = [float(policy.act(SOMETHING)[0]) for _ in range(2)]
    policy.reset()
    np.testing.assert_allclose([*first, float(policy.act(SOMETHING)[0])], [1.0, 1.1, 2.0], rtol=1e-6)


def test_two_policies_of_one_class_do_not_share_a_chunk() -> None:
    one, two = Counting(3), Counting(3)
    one.act(SOMETHING)
    assert two.act(SOMETHING)[0] == 1.0
    assert float(one.act(SOMETHING)[0]) == pytest.approx(1.1)


def test_another_instruction_is_planned_at_once() -> None:
    policy, other = Counting(4), dataclasses.replace(SOMETHING, instruction="stop")
    acted = [float(policy.act(o)[0]) for o in (SOMETHING, SOMETHING, other, other, SOMETHING)]
    np.testing.assert_allclose(acted, [1.0, 1.1, 2.0, 2.1, 3.0], rtol=1e-6)


def test_sessions_of_one_policy_have_plans_of_their_own() -> None:
    policy = Counting(3)
    one, two = policy.session(), policy.session()
    acted = [float(robot.act(SOMETHING)[0]) for robot in (one, two, policy, one, two)]
    np.testing.assert_allclose(acted, [1.0, 2.0, 3.0, 1.1, 2.1], rtol=1e-6)
    one.reset()
    np.testing.assert_allclose([float(robot.act(SOMETHING)[0]) for robot in (one, two)], [4.0, 2.2], rtol=1e-6)


def test_the_plan_of_another_thread_is_not_continued() -> None:
    """Threads that share a policy may drive different robots."""
    policy = Counting(3)
    assert policy.act(SOMETHING)[0] == 1.0
    with ThreadPoolExecutor(1) as pool, pytest.warns(RuntimeWarning, match=r"use one `policy.session\(\)` per robot"):
        assert pool.submit(policy.act, SOMETHING).result()[0] == 2.0
    assert policy.act(SOMETHING)[0] == 3.0
    assert float(policy.act(SOMETHING)[0]) == pytest.approx(3.1)


def test_a_session_may_change_threads() -> None:
    session = Counting(3).session()
    session.act(SOMETHING)
    with ThreadPoolExecutor(1) as pool:
        assert float(pool.submit(session.act, SOMETHING).result()[0]) == pytest.approx(1.1)


def test_a_plan_does_not_outlive_an_error() -> None:
    class Failing(Counting):
        def chunks(self, observations: Sequence[Observation]) -> Float32Array:
            if observations[0].instruction == "fail":
                raise RuntimeError("no plan")
            return super().chunks(observations)

    policy = Failing(4)
    policy.act(SOMETHING)
    with pytest.raises(RuntimeError, match="no plan"):
        policy.act(dataclasses.replace(SOMETHING, instruction="fail"))
    assert policy.act(SOMETHING)[0] == 2.0


def test_a_policy_that_executes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="execute must be at least 1, got 0"):
        Counting(0).act(SOMETHING)


def test_a_policy_is_copied_and_pickled_without_its_plan() -> None:
    policy = Counting(3)
    policy.act(SOMETHING)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.act(SOMETHING)[0] == 2.0
    assert float(policy.act(SOMETHING)[0]) == pytest.approx(1.1)


def test_random_actions_are_repeated_and_bounded() -> None:
    chunks = RandomPolicy(3, seed=1).chunks([SOMETHING] * 4)
    assert chunks.shape == (4, RandomPolicy.execute, 3)
    assert (np.abs(chunks) <= 1).all()
    assert (chunks == chunks[:, :1]).all()
    assert len(np.unique(chunks[:, 0, 0])) == 4


def test_random_actions_depend_only_on_the_seed() -> None:
    one, two, other = (RandomPolicy(2, seed=seed).chunks([SOMETHING]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
