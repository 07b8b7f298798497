"""The editor under test, what it is shown, and how two prefixes are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editor import Editor, PrefixKV, PrefixSettings
from imagewam_cli.hardware import Hardware
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.kvcache.spec import KVSpec, Mode, Segment
from imagewam_cli.registry import Registry

SHORT = "go left"
LONG = "put the red block on the blue zone"
OTHER = "lift it up"
CAMERA = "top"
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far apart two orders of one sum may end, relative to the largest number."""


class ContractError(AssertionError):
    """An editor breaks a promise; `fix` tells its author where to look."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message}\nto fix: {fix}")
        self.message, self.fix = message, fix


class NotApplicable(Exception):  # noqa: N818 - not an error: the check says nothing about this editor
    """The promise does not concern this editor; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An editor in one of its modes, loaded as each check needs it."""

    entry: EditorEntry
    kind: type[Editor]
    mode: Mode
    weights: Path | None = None
    """A pipeline folder instead of what came with the plugin or was fetched."""
    image_size: tuple[int, int] | None = None
    """(height, width) of the picture; None: the editor's own."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    kept: int = 16
    """Editors that stay loaded from check to check."""
    loaded: dict[tuple[PrefixSettings, tuple[str, ...]], Editor] = field(default_factory=dict, repr=False)

    def settings(self, **changes: Any) -> PrefixSettings:
        """What the editor is loaded with; `changes` by the names of `PrefixSettings`."""
        chosen: dict[str, Any] = {
            "mode": self.mode,
            "cameras": (CAMERA,),
            "image_size": self.image_size,
            "compute_dtype": self.compute_dtype,
        }
        return PrefixSettings(**(chosen | changes))

    def load(self, instructions: Sequence[str] = (), **changes: Any) -> Editor:
        """The editor, perhaps one that was loaded like this before."""
        key = (self.settings(**changes), tuple(instructions))
        editor = self.loaded.pop(key, None)
        if editor is None:
            while len(self.loaded) >= self.kept:
                del self.loaded[next(iter(self.loaded))]
            editor = self.load_anew(instructions, **changes)
        self.loaded[key] = editor
        return editor

    def load_anew(self, instructions: Sequence[str] = (), **changes: Any) -> Editor:
        return self.kind.load(
            self.entry,
            self.settings(**changes),
            instructions=instructions,
            weights=self.weights,
            hardware=Hardware(device=self.device),
        )

    def segments(self) -> tuple[Segment, ...]:
        """Every kind of tokens that this mode has, kept by default or not."""
        defaults = getattr(self.kind, "defaults", None)
        if defaults is not None:
            return cast(tuple[Segment, ...], defaults.modes[self.mode].has)
        layers = self.load().spec.layers
        return tuple(dict.fromkeys(segment.name for layer in layers for segment in layer.segments))

    def camera_layouts(self) -> tuple[str | None, ...]:
        """Those of the editor; None stands for its only one."""
        defaults = getattr(self.kind, "defaults", None)
        return (None,) if defaults is None else tuple(defaults.camera_layouts)

    def pictures(self, count: int, seed: int = 0, cameras: Sequence[str] = (CAMERA,)) -> list[dict[str, UInt8Image]]:
        """Rows of noise at the size that the editor sees."""
        height, width = self.load().spec.image_size
        rng = np.random.default_rng(seed)
        return [
            {camera: rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for camera in cameras}
            for _ in range(count)
        ]


def subjects(name: str, **options: Any) -> list[Subject]:
    """The installed editor `name`, once per mode. options: of `Subject`.

    Raises:
        UnknownNameError: no plugin has it.
        PluginError: its code cannot be imported.
    """
    editors = Registry.installed().editors
    entry, kind = editors.get(name), editors.load(name)
    return [Subject(entry=entry, kind=kind, mode=cast(Mode, mode), **options) for mode in entry.modes]


def counting_tokens(prefix: PrefixKV, spec: KVSpec, row: int) -> dict[str, Tensor]:
    """ "K of LAYER", "V of LAYER" -> the row's tokens (tokens, H, D) without those that are padding."""
    found = {}
    for layer, kv in zip(spec.layers, prefix.layers, strict=True):
        for part, values in (("K", kv.k), ("V", kv.v)):
            masked = layer.holds_text and prefix.valid is not None
            found[f"{part} of {layer.name}"] = values[row][prefix.valid[row]] if masked else values[row]  # type: ignore[index]
    return found


def require(truth: bool, message: str, fix: str) -> None:
    """
    Raises:
        ContractError: it is not so.
    """
    if not truth:
        raise ContractError(message, fix)


def require_equal(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, fix: str, *, rounding: bool = False
) -> None:
    """The same tensors under the same names, bit by bit; rounding: as far as the dtype of the editor can tell.

    Raises:
        ContractError: names the first that differs, and by how much.
    """
    require(given.keys() == expected.keys(), f"{what}: layers {sorted(given)} instead of {sorted(expected)}", fix)
    for name, wanted in expected.items():
        found = given[name]
        require(found.shape == wanted.shape, f"{what}: {name} is {_shape(found)}, not {_shape(wanted)}", fix)
        gap = largest_gap(found, wanted)
        allowed = _ROUNDING[wanted.dtype] * max(1.0, _largest(wanted)) if rounding else 0.0
        require(gap <= allowed, f"{what}: {name} differs by up to {gap:.2g}, allowed is {allowed:.2g}", fix)


def require_different(given: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str, fix: str) -> None:
    """
    Raises:
        ContractError: nothing differs by more than rounding.
    """
    for name, values in given.items():
        if other[name].shape != values.shape:
            return
        if largest_gap(values, other[name]) > 10 * torch.finfo(values.dtype).eps * _largest(values):
            return
    raise ContractError(what, fix)


def largest_gap(given: Tensor, expected: Tensor) -> float:
    return _largest(given.double() - expected.double())


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _shape(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape)
