"""Editors that each break one promise of the contract, on the small `tiny` of the tests. `Sound` keeps them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import Editor, PrefixGraph, WeightsIdentity
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.editors.text import Prompt, Text
from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec
from imagewam_tiny.editor import TinyEditor


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


class ChangesSettings(Sound):
    """Load with other settings than requested: those that `changed` returns."""

    @classmethod
    def load(cls, settings: PrefixOptions, **options: Any) -> Any:
        return super().load(cls.changed(settings), **options)

    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return settings


class IgnoresRandomWeights(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, random_weights=False)


class LoadsTheDefaultTimestep(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, timestep=None)


class RefusesTimesteps(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        if settings.timestep is not None:
            raise UsageError("the timestep is 0")
        return settings


class AcceptsAnySegment(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        known = tuple(s for s in settings.segments or () if s in {"text", "reference"})
        return dataclasses.replace(settings, segments=known or None)


class HasNoPrefix(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        if settings.mode is not None:
            raise UsageError(f"mode {settings.mode!r} is not available")
        return settings


class AcceptsDenoise(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        return dataclasses.replace(settings, mode="prefix")


class RoundsTheSize(ChangesSettings):
    @classmethod
    def changed(cls, settings: PrefixOptions) -> PrefixOptions:
        height, width = settings.image_size or (64, 64)
        return dataclasses.replace(settings, image_size=(height // 16 * 16, width // 16 * 16))


class IgnoresPool(ChangesSettings):
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
