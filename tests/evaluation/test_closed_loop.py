"""Test success counts, and evaluation in a simulator whose results are known."""

from __future__ import annotations

import json

import pytest

from imagewam_cli.cli.tables import closed_loop_table
from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.errors import UnknownNameError, UsageError
from imagewam_cli.evaluation.closed_loop import ClosedLoopResult, evaluate_in_simulator, summarize
from imagewam_cli.evaluation.statistics import Rate
from tests.support.scripted_policies import Deaf, Line, Obedient, episode

EPISODES = [
    episode(True, 30, seed=0, split="test", kind="place"),
    episode(True, 40, seed=1, split="test", kind="beside"),
    episode(False, 100, seed=2, split="test", kind="place"),
    episode(True, 33, seed=3, split="test", kind="place"),
    episode(False, 100, seed=0, split="heldout", kind="place"),
]


def test_successes_are_counted_per_split_and_kind() -> None:
    result = summarize(EPISODES)
    assert list(result.splits) == ["test", "heldout"]
    test, heldout = result.splits["test"], result.splits["heldout"]
    assert test.total.success == Rate.of(3, 4)
    assert test.total.mean_steps == pytest.approx((30 + 40 + 33) / 3)
    assert list(test.kinds) == ["beside", "place"]
    assert test.kinds["place"].success == Rate.of(2, 3)
    assert test.kinds["place"].mean_steps == 31.5
    assert test.kinds["beside"].success == Rate.of(1, 1)
    assert heldout.total.success == Rate.of(0, 1)
    assert heldout.total.mean_steps is None


def test_every_episode_is_listed_without_its_frames() -> None:
    records = to_dict(summarize(EPISODES))["episodes"]
    assert len(records) == 5
    assert records[2] == {
        "seed": 2,
        "split": "test",
        "kind": "place",
        "instruction": "put the red block on the blue zone",
        "given": "put the red block on the blue zone",
        "success": False,
        "steps": 100,
    }


def test_the_result_is_json_and_can_be_read_back() -> None:
    result = summarize(EPISODES)
    assert from_dict(ClosedLoopResult, json.loads(dump_json(to_dict(result)))) == result


def test_no_episodes_give_an_empty_result() -> None:
    assert summarize([]) == ClosedLoopResult(splits={}, episodes=())


def test_the_table_lists_success_rates() -> None:
    assert closed_loop_table(summarize(EPISODES)).splitlines() == [
        "split    kind    success     rate   95 % interval  steps",
        "test     all         3/4   75.0 %   30.1 - 95.4 %   34.3",
        "         beside      1/1  100.0 %  20.7 - 100.0 %   40.0",
        "         place       2/3   66.7 %   20.8 - 93.9 %   31.5",
        "heldout  all         0/1    0.0 %    0.0 - 79.3 %      -",
    ]


def test_scenes_of_each_split_are_run() -> None:
    seen: list[int] = []
    result, episodes = evaluate_in_simulator(
        Line, Obedient(), episodes=3, splits=["test", "far"], seed=4, on_episode=lambda e: seen.append(e.seed)
    )
    assert [(e.split, e.seed) for e in episodes] == [(s, n) for s in ("test", "far") for n in (4, 5, 6)]
    assert seen == [4, 5, 6, 4, 5, 6]
    assert result == summarize(episodes)
    assert result.splits["test"].total.success == Rate.of(3, 3)
    assert result.splits["far"].total.mean_steps == 5
    assert all(e.given == e.instruction for e in episodes)


def test_the_demonstrator_runs_without_a_policy() -> None:
    result, _ = evaluate_in_simulator(Line, None, episodes=2, splits=["test"])
    assert result.splits["test"].total.success == Rate.of(2, 2)


def test_fewer_steps_than_the_task_needs_are_a_failure() -> None:
    result, _ = evaluate_in_simulator(Line, None, episodes=2, splits=["test"], max_steps=2)
    assert result.splits["test"].total.success == Rate.of(0, 2)
    assert [e.steps for e in result.episodes] == [2, 2]


def test_frames_are_kept_on_request() -> None:
    _, episodes = evaluate_in_simulator(Line, None, episodes=1, splits=["test"], keep_frames=9)
    assert len(episodes[0].frames) == 4  # before the first step and after each of three


def test_with_other_instructions_success_is_still_judged_by_the_scenes_own_goal() -> None:
    policy = Obedient()
    result, episodes = evaluate_in_simulator(Line, policy, episodes=4, splits=["test"], other_instructions=True)
    assert [e.instruction for e in episodes] == ["go left", "go right", "go left", "go right"]
    assert [e.given for e in episodes] == ["go right", "go left", "go right", "go left"]
    assert policy.instructions[:4] == [e.given for e in episodes]
    assert result.splits["test"].total.success == Rate.of(0, 4)


def test_a_policy_that_ignores_instructions_keeps_its_success_rate() -> None:
    rates = [
        evaluate_in_simulator(Line, Deaf(), episodes=4, splits=["test"], other_instructions=other)[0]
        for other in (False, True)
    ]
    assert [r.splits["test"].total.success for r in rates] == [Rate.of(2, 4), Rate.of(2, 4)]


class MostlyLeft(Line):
    """An environment in which only scenes 0 and 3 ask the policy to go left."""

    def reset(self, seed, split):  # type: ignore[no-untyped-def]
        return super().reset(0 if seed in (0, 3) else 1, split)


def test_the_other_instruction_is_the_next_different_one_with_wrap_around() -> None:
    _, episodes = evaluate_in_simulator(MostlyLeft, Obedient(), episodes=6, splits=["test"], other_instructions=True)
    assert [(e.instruction, e.given) for e in episodes] == [
        ("go left", "go right"),
        ("go right", "go left"),  # from scene 3, because scene 2 has the same instruction
        ("go right", "go left"),
        ("go left", "go right"),
        ("go right", "go left"),  # from scene 0
        ("go right", "go left"),
    ]


def test_other_instructions_need_scenes_that_differ() -> None:
    with pytest.raises(UsageError, match="all have the instruction 'go left'"):
        evaluate_in_simulator(Line, Obedient(), episodes=1, splits=["test"], other_instructions=True)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown split 'tets'") as caught:
        evaluate_in_simulator(Line, None, episodes=1, splits=["tets"])
    assert caught.value.hint == "did you mean 'test'?"


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"max_steps": 0}, {"batch": 0}, {"splits": []}])
def test_numbers_below_one_are_refused(wrong: dict[str, object]) -> None:
    arguments = {"episodes": 1, "splits": ["test"]} | wrong
    with pytest.raises(UsageError):
        evaluate_in_simulator(Line, None, **arguments)  # type: ignore[arg-type]


def test_a_policy_that_executes_no_action_is_refused() -> None:
    policy = Obedient()
    policy.execute = 0
    with pytest.raises(UsageError, match="execute must be at least 1, got 0"):
        evaluate_in_simulator(Line, policy, episodes=1, splits=["test"])
