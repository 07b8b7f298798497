"""Each contract check finds an editor that breaks its promise, and reports how to fix it."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.text import Text
from imagewam_cli.errors import UsageError
from imagewam_cli.expert import blocks
from imagewam_cli.kvcache.building.shard_plan import BuildPlan
from imagewam_cli.registry import Registry
from imagewam_cli.testing import consumer_checks, spec_checks, value_checks
from imagewam_cli.testing.checks import CHECKS, Check, examine
from imagewam_cli.testing.subject import ContractError, NotApplicable, Subject
from tests.support.faulty_editors import (
    AcceptsAnySegment,
    AcceptsDenoise,
    ChangesSettings,
    DescribesOtherRopeAxes,
    DiffersByChoice,
    DrawsNoise,
    EncodesEmptyText,
    ExportsAnotherGraph,
    HasNoPrefix,
    HasUnknownPositions,
    IgnoresBlankImages,
    IgnoresPool,
    IgnoresRandomWeights,
    IgnoresTheInstruction,
    IgnoresThePicture,
    IgnoresTheTimestep,
    LeavesPadding,
    LoadsTheDefaultTimestep,
    LosesAToken,
    MisdescribesHeads,
    MixesRows,
    NoPipeline,
    NoPipelineThatSeesOneCamera,
    NoPipelineThatSeesPadding,
    PoolsOnlyTheSpec,
    RefusesTimesteps,
    RoundsTheSize,
    SeesOneSeparateCamera,
    SeesPadding,
    SeesTheFirstCamera,
    Sound,
    TrimsEverySecondCall,
)

_IN_OWN_PROCESS = "IMAGEWAM_TEST_OWN_PROCESS"


@pytest.fixture
def subject_of(tiny_weights: Path) -> Callable[[type[Sound]], Subject]:
    entry = Registry.installed().editors.get("tiny")
    with_separate = dataclasses.replace(entry.defaults, camera_layouts=("tile", "separate", "head-over-wrists"))

    def subject(kind: type[Sound]) -> Subject:
        # An editor that fails only with separate cameras must offer that layout; `tiny` does not.
        separates = issubclass(kind, (SeesOneSeparateCamera, NoPipelineThatSeesOneCamera))
        bound = kind.bound_to(dataclasses.replace(entry, defaults=with_separate) if separates else entry)
        return Subject(kind=bound, mode="prefix", weights=tiny_weights, image_size=(64, 64))

    return subject


def test_a_sound_editor_passes_every_check(subject_of: Callable[[type[Sound]], Subject]) -> None:
    results = {finding.check: finding.result for finding in examine(subject_of(Sound))}
    assert results == {check.__name__: "kept" for check in CHECKS}


BROKEN = [
    (spec_checks.modes_of_the_entry_load, HasNoPrefix, "the entry names mode prefix, but .* 'prefix' is not available"),
    (spec_checks.unknown_choices_are_refused, AcceptsDenoise, "mode denoise is accepted, but the entry"),
    (spec_checks.shapes_are_those_of_the_spec, LosesAToken, r"the spec declares \(2, "),
    (spec_checks.shapes_are_those_of_the_spec, LeavesPadding, "not zero where `valid` is False"),
    (spec_checks.pooled_shapes_are_those_of_the_spec, IgnoresPool, "with `pool` 2 the spec of"),
    (spec_checks.pooled_shapes_are_those_of_the_spec, PoolsOnlyTheSpec, r"the spec declares \(2, "),
    (spec_checks.description_is_the_spec, MisdescribesHeads, r"described layers: .*heads=3"),
    (value_checks.same_input_gives_the_same_bits, DrawsNoise, "encoded twice: K of .* differs by up to"),
    (value_checks.a_batch_is_its_rows, MixesRows, "row 0 of a batch of 3"),
    (value_checks.padding_changes_nothing, SeesPadding, "padded to the length of"),
    (
        value_checks.another_picture_changes_the_prefix,
        IgnoresThePicture,
        "two different noise pictures give the same prefix",
    ),
    (value_checks.every_camera_changes_the_prefix, SeesTheFirstCamera, "layout tile: two pictures of camera 'right'"),
    (
        value_checks.every_camera_changes_the_prefix,
        SeesOneSeparateCamera,
        "layout separate: two pictures of camera",
    ),
    (
        value_checks.another_timestep_changes_the_prefix,
        IgnoresTheTimestep,
        "the timesteps 0.5 and .* give the same prefix",
    ),
    (
        value_checks.another_timestep_changes_the_prefix,
        LoadsTheDefaultTimestep,
        "requested timestep 0.5, but the spec has",
    ),
    (
        value_checks.another_instruction_changes_the_prefix,
        IgnoresTheInstruction,
        "give the same prefix: the instruction",
    ),
    (value_checks.another_instruction_changes_the_prefix, EncodesEmptyText, "give the same prefix: the instruction"),
    (value_checks.another_instruction_changes_the_prefix, TrimsEverySecondCall, "which cannot be compared"),
    (value_checks.a_blank_picture_hides_everything, IgnoresBlankImages, "with `blank_images`, two pictures"),
    (value_checks.a_blank_picture_hides_everything, IgnoresThePicture, "`blank_images` does nothing"),
    (value_checks.random_weights_change_the_prefix, IgnoresRandomWeights, "gives the prefix of the trained weights"),
    (spec_checks.segments_are_slices, DiffersByChoice, "with only `segments` text"),
    (spec_checks.layers_are_slices, DiffersByChoice, "with `layers` every:2"),
    (spec_checks.prefix_mode_has_no_target, AcceptsAnySegment, "`segments` target is accepted"),
    (spec_checks.unknown_choices_are_refused, AcceptsAnySegment, "`segments` sky is accepted"),
    (spec_checks.wrong_size_is_refused, RoundsTheSize, r"\(65, 64\) is accepted, but the spec has \(64, 64\)"),
    (consumer_checks.a_cache_gives_back_what_was_encoded, DrawsNoise, "row 0 of the cache"),
    (consumer_checks.expert_attends_jointly, DescribesOtherRopeAxes, "rope axes"),
    (consumer_checks.graph_equals_encode, ExportsAnotherGraph, "the graph, compared with `encode`"),
]


@pytest.mark.parametrize(
    ("check", "kind", "message"), BROKEN, ids=[f"{kind.__name__}-{check.__name__}" for check, kind, _ in BROKEN]
)
def test_a_broken_promise_is_found(
    subject_of: Callable[[type[Sound]], Subject], check: Check, kind: type[Sound], message: str
) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        check(subject_of(kind))
    assert f"to fix: {caught.value.fix}" in str(caught.value)


def test_a_mode_that_does_not_load_is_not_checked_further(subject_of: Callable[[type[Sound]], Subject]) -> None:
    assert [finding.check for finding in examine(subject_of(HasNoPrefix))] == ["modes_of_the_entry_load"]


def test_an_error_in_every_mode_is_not_reported_as_a_missing_mode(subject_of: Callable[[type[Sound]], Subject]) -> None:
    given = dataclasses.replace(subject_of(Sound), image_size=(65, 64))
    with pytest.raises(UsageError, match="image size 65x64"):
        spec_checks.mode_refusal(given)


def test_every_check_can_fail() -> None:
    assert {check for check, _, _ in BROKEN} == set(CHECKS)


def test_the_timestep_check_skips_editors_that_refuse_timesteps(
    subject_of: Callable[[type[Sound]], Subject],
) -> None:
    with pytest.raises(NotApplicable, match="the timestep is 0"):
        value_checks.another_timestep_changes_the_prefix(subject_of(RefusesTimesteps))


def test_the_pooling_check_skips_an_editor_with_unknown_positions(
    subject_of: Callable[[type[Sound]], Subject],
) -> None:
    with pytest.raises(NotApplicable, match="reference tokens cannot be pooled: their keys are rotated"):
        spec_checks.pooled_shapes_are_those_of_the_spec(subject_of(HasUnknownPositions))


@pytest.mark.parametrize("change", [{"compute_dtype": "bfloat16"}, {"device": "cuda"}])
def test_the_graph_check_runs_on_the_cpu_in_float32(
    subject_of: Callable[[type[Sound]], Subject], change: dict[str, Any]
) -> None:
    consumer_checks.graph_equals_encode(dataclasses.replace(subject_of(Sound), **change))
    with pytest.raises(ContractError, match="the graph, compared with `encode`"):
        consumer_checks.graph_equals_encode(dataclasses.replace(subject_of(ExportsAnotherGraph), **change))


@pytest.mark.slow
def test_a_subject_that_keeps_one_editor_holds_one_at_a_time() -> None:
    """Runs the next test in its own process, where no traceback of an earlier test keeps an editor alive."""
    node = f"{__file__}::test_editors_alive_at_once"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", node]
    done = subprocess.run(command, env=os.environ | {_IN_OWN_PROCESS: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("."), "it was skipped"


@pytest.mark.skipif(_IN_OWN_PROCESS not in os.environ, reason="run by the test above")
def test_editors_alive_at_once(subject_of: Callable[[type[Sound]], Subject]) -> None:
    alive: weakref.WeakSet[Sound] = weakref.WeakSet()
    counts: list[int] = []

    class Counted(Sound):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            alive.add(self)
            counts.append(len(alive))

    subject = dataclasses.replace(subject_of(Counted), kept=1)
    gc.freeze()  # faster: skips older objects in the collection after each editor
    try:
        assert {finding.result for finding in examine(subject)} == {"kept"}
        assert max(counts) == 1
        subject.clear()
        assert not alive
    finally:
        gc.unfreeze()


def test_the_default_image_size_is_read_from_one_load(subject_of: Callable[[type[Sound]], Subject]) -> None:
    loads: list[PrefixOptions] = []

    class Counted(ChangesSettings):
        @classmethod
        def changed(cls, settings: PrefixOptions) -> PrefixOptions:
            loads.append(settings)
            return settings

    given = subject_of(Counted)
    assert given.pictures(1)[0]["top"].shape == (64, 64, 3)
    assert not loads
    without_size = dataclasses.replace(given, image_size=None, kept=1)
    height, width = Registry.installed().editors.get("tiny").defaults.camera_size
    for _ in range(2):
        assert without_size.pictures(1)[0]["top"].shape == (height, width, 3)
        without_size.clear()
    assert len(loads) == 1


def test_an_editor_without_a_pipeline_passes_the_same_checks(subject_of: Callable[[type[Editor]], Subject]) -> None:
    results = {finding.check: finding.result for finding in examine(subject_of(NoPipeline))}
    optional = {"description_is_the_spec", "graph_equals_encode"}
    assert results == {c.__name__: "not applicable" if c.__name__ in optional else "kept" for c in CHECKS}
    assert subject_of(NoPipeline).segments() == ("text", "reference")  # also what the default does not keep
    with pytest.raises(ContractError, match="padded to the length of"):
        value_checks.padding_changes_nothing(subject_of(NoPipelineThatSeesPadding))
    with pytest.raises(ContractError, match="camera_layout separate"):
        value_checks.every_camera_changes_the_prefix(subject_of(NoPipelineThatSeesOneCamera))


def test_an_expert_that_ignores_the_padding_mask_is_found(
    subject_of: Callable[[type[Sound]], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = blocks.joint_attention
    monkeypatch.setattr(blocks, "joint_attention", lambda q, k, v, prefix, valid: original(q, k, v, prefix, None))
    with pytest.raises(ContractError, match="the expert's attention"):
        consumer_checks.expert_attends_jointly(subject_of(Sound))


def test_a_shard_of_another_size_than_planned_is_found(
    subject_of: Callable[[type[Sound]], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = consumer_checks.plan_build

    def larger(*arguments: Any) -> BuildPlan:
        plan = original(*arguments)
        return dataclasses.replace(plan, bytes_per_row=plan.bytes_per_row + 1)

    monkeypatch.setattr(consumer_checks, "plan_build", larger)
    with pytest.raises(ContractError, match=r"bytes, but the plan declares"):
        consumer_checks.a_cache_gives_back_what_was_encoded(subject_of(Sound))


def test_an_exception_in_a_plugin_is_reported_with_file_and_line(subject_of: Callable[[type[Sound]], Subject]) -> None:
    class Raises(Sound):
        def run(self, pictures: Tensor, text: Text) -> None:
            raise RuntimeError("boom")

    finding = next(f for f in examine(subject_of(Raises)) if f.result == "broken")
    assert (finding.result, finding.message) == ("broken", "RuntimeError: boom")
    assert str(finding.fix).startswith(f"see {__file__}:")
