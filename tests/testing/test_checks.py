"""Each contract check finds an editor that breaks its promise, and reports how to fix it."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import Editor, PrefixGraph, WeightsIdentity
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.text import Prompt, Text
from imagewam_cli.errors import UsageError
from imagewam_cli.expert import blocks
from imagewam_cli.kvcache.building.shard_plan import BuildPlan
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec
from imagewam_cli.registry import Registry
from imagewam_cli.testing import consumer_checks, spec_checks, value_checks
from imagewam_cli.testing.checks import CHECKS, Check, examine
from imagewam_cli.testing.subject import ContractError, NotApplicable, Subject
from imagewam_tiny.editor import TinyEditor

_IN_OWN_PROCESS = "IMAGEWAM_TEST_OWN_PROCESS"


class Sound(TinyEditor):
    """Keep every promise, on the weights folder that the test passes instead of the embedded one."""

    embedded = None

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        return self.spoil(super().encode(images, instructions))

    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        return prefix


class LosesAToken(Sound):
    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        return each(prefix, lambda x: x[:, 1:])


class LeavesPadding(Sound):
    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        return each(prefix, lambda x: x + 1)


class MisdescribesHeads(Sound):
    @classmethod
    def describe(cls, settings: PrefixOptions) -> KVSpec | None:
        spec = super().describe(settings)
        assert spec is not None
        layers = tuple(dataclasses.replace(layer, heads=layer.heads + 1) for layer in spec.layers)
        return dataclasses.replace(spec, layers=layers)


class DrawsNoise(Sound):
    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        return each(prefix, lambda x: x + 1e-6 * torch.randn_like(x) * (x != 0))


class MixesRows(Sound):
    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        return each(prefix, lambda x: x + 1e-3 * (x - x.mean(dim=0, keepdim=True)) * (x != 0))


class SeesPadding(Sound):
    def run(self, pictures: Tensor, text: Text) -> None:
        super().run(pictures, dataclasses.replace(text, valid=torch.ones_like(text.valid)))


class IgnoresThePicture(Sound):
    def run(self, pictures: Tensor, text: Text) -> None:
        super().run(torch.zeros_like(pictures), text)


class IgnoresTheInstruction(Sound):
    def text_tokens(self, prompt: str) -> int:
        return super().text_tokens("always this")

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        return super().embed("always this", picture)


class EncodesEmptyText(Sound):
    """Encode text of the right length whose states are all zero."""

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        return Prompt(states=torch.zeros_like(super().embed(prompt, picture).states))


class TrimsEverySecondCall(Sound):
    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        self.calls = getattr(self, "calls", 0) + 1
        return self._shorter(prefix) if self.calls % 2 else prefix

    def _shorter(self, prefix: PrefixKV) -> PrefixKV:
        assert prefix.valid is not None
        return dataclasses.replace(each(prefix, lambda x: x[:, 1:]), valid=prefix.valid[:, 1:])


class SeesTheFirstCamera(Sound):
    def run(self, pictures: Tensor, text: Text) -> None:
        width = pictures.shape[-1] // len(self.settings.cameras)
        super().run(torch.cat([pictures[..., :width], torch.zeros_like(pictures[..., width:])], dim=-1), text)


class SeesOneSeparateCamera(SeesTheFirstCamera):
    """See only the first camera, but only with the camera layout "separate"."""

    def run(self, pictures: Tensor, text: Text) -> None:
        run = super().run if self.settings.camera_layout == "separate" else super(SeesTheFirstCamera, self).run
        run(pictures, text)


class IgnoresTheTimestep(Sound):
    def run(self, pictures: Tensor, text: Text) -> None:
        requested = self.settings
        self.settings = dataclasses.replace(requested, timestep=0.25)
        super().run(pictures, text)
        self.settings = requested


class IgnoresBlankImages(Sound):
    def _picture(self, images: Mapping[str, UInt8Image]) -> UInt8Image:
        return next(iter(images.values()))


class _ChangesSettings(Sound):
    """Load with other settings than requested: those that `changed` returns."""

    @classmethod
    def load(cls, settings: PrefixOptions, **options: Any) -> Any:
        return super().load(cls.changed(settings), **options)

    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return settings


class IgnoresRandomWeights(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, random_weights=False)


class LoadsTheDefaultTimestep(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, timestep=None)


class RefusesTimesteps(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        if settings.timestep is not None:
            raise UsageError("the timestep is 0")
        return settings


class AcceptsAnySegment(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        known = tuple(s for s in settings.segments or () if s in {"text", "reference"})
        return dataclasses.replace(settings, segments=known or None)


class HasNoPrefix(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        if settings.mode is not None:
            raise UsageError(f"mode {settings.mode!r} is not available")
        return settings


class AcceptsDenoise(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, mode="prefix")


class RoundsTheSize(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        height, width = settings.image_size or (64, 64)
        return dataclasses.replace(settings, image_size=(height // 16 * 16, width // 16 * 16))


class IgnoresPool(_ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, pool=1)


class PoolsOnlyTheSpec(Sound):
    def keep_segments(self, recorded: Mapping[str, LayerKV], text_valid: Tensor) -> PrefixKV:
        requested = self.settings
        self.settings = dataclasses.replace(requested, pool=1)
        unpooled = super().keep_segments(recorded, text_valid)
        self.settings = requested
        return unpooled


class HasUnknownPositions(Sound):
    """Describe tokens without their positions."""

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixOptions, text: int) -> tuple[LayerSpec, ...]:
        return tuple(
            dataclasses.replace(layer, segments=tuple(dataclasses.replace(s, positions=None) for s in layer.segments))
            for layer in super().attention_layers(denoiser, settings, text)
        )


class DiffersByChoice(Sound):
    """Compute other numbers when only some layers or segments are kept."""

    def spoil(self, prefix: PrefixKV) -> PrefixKV:
        whole = self.settings.layers == "all" and len(self.settings.segments or ()) == 2
        return prefix if whole else each(prefix, lambda x: 1.0001 * x)


class DescribesOtherRopeAxes(Sound):
    @classmethod
    def rope(cls, denoiser: Any) -> RopeSpec:
        return dataclasses.replace(super().rope(denoiser), axes=(2, 2, 2, 2))


class _Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        valid, *values = self.inner(*inputs)
        return valid, *(2 * x for x in values)


class ExportsAnotherGraph(Sound):
    def prefix_graph(self) -> PrefixGraph:
        graph = super().prefix_graph()
        return dataclasses.replace(graph, module=_Doubled(graph.module))


def each(prefix: PrefixKV, change: Callable[[Tensor], Tensor]) -> PrefixKV:
    return PrefixKV(tuple(LayerKV(change(kv.k), change(kv.v)) for kv in prefix.layers), prefix.valid)


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

    class Counted(_ChangesSettings):
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


class NoPipeline(Editor):
    """Wrap an editor without being a `DiffusersEditor`, and keep only the reference by default."""

    inner: Sound

    @classmethod
    def load(cls, settings: PrefixOptions, **options: Any) -> Any:
        editor = cls()
        chosen = settings.segments or ("reference",)
        editor.inner = cls.sound().bound_to(cls.entry).load(dataclasses.replace(settings, segments=chosen), **options)
        editor.settings = editor.inner.settings
        return editor

    @classmethod
    def sound(cls) -> type[Sound]:
        return Sound

    @property
    def spec(self) -> KVSpec:
        return self.inner.spec

    @property
    def weights(self) -> WeightsIdentity:
        return self.inner.weights

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        return self.inner.encode(images, instructions)


class NoPipelineThatSeesPadding(NoPipeline):
    @classmethod
    def sound(cls) -> type[Sound]:
        return SeesPadding


class NoPipelineThatSeesOneCamera(NoPipeline):
    @classmethod
    def sound(cls) -> type[Sound]:
        return SeesOneSeparateCamera


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
