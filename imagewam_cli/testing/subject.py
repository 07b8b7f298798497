"""The editor under test, its inputs, and comparisons of two prefixes."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import KVSpec, Mode, Segment

SHORT = "go left"
LONG = "put the red block on the blue zone"
OTHER = "lift it up"
REORDERED = "put the blue block on the red zone"
"""The words of `LONG` in another order, so that the number of tokens is the same."""
CAMERA = "top"
TWO_CAMERAS = ("left", "right")
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Tolerance for two orders of summation, relative to the largest number."""


class ContractError(AssertionError):
    """An editor fails a check. `fix` states what its author has to correct."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message}\nto fix: {fix}")
        self.message, self.fix = message, fix


class NotApplicable(Exception):  # noqa: N818 - not an error: the check does not apply to this editor
    """The check does not apply to this editor. The message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An editor in one of its modes. Checks load it with the options that they need."""

    kind: type[Editor]
    """The editor's class, bound to its entry."""
    mode: Mode
    weights: Path | None = None
    """Pipeline folder, instead of the embedded or downloaded one."""
    image_size: tuple[int, int] | None = None
    """(height, width) of the picture; None: the editor's default."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    kept: int = 16
    """Maximum number of editors that stay loaded between checks."""
    loaded: dict[tuple[PrefixOptions, tuple[str, ...]], Editor] = field(default_factory=dict, repr=False)

    def options(self, **changes: Any) -> PrefixOptions:
        """Return the options that the editor is loaded with. changes: fields of `PrefixOptions`."""
        chosen: dict[str, Any] = {
            "mode": self.mode,
            "cameras": (CAMERA,),
            "image_size": self.image_size,
            "compute_dtype": self.compute_dtype,
        }
        return PrefixOptions(**(chosen | changes))

    def load(self, instructions: Sequence[str] = (), **changes: Any) -> Editor:
        """Return the editor; load it unless an editor with the same arguments is still loaded."""
        key = (self.options(**changes), tuple(instructions))
        editor = self.loaded.pop(key, None)
        if editor is None:
            editor = self.reload(instructions, **changes)
        self.loaded[key] = editor
        return editor

    def reload(self, instructions: Sequence[str] = (), **changes: Any) -> Editor:
        """Load the editor again. Older ones are freed, so that at most `kept` are loaded."""
        self._free_oldest(len(self.loaded) - self.kept + 1)
        return self.kind.load(
            self.options(**changes),
            instructions=instructions,
            weights=self.weights,
            hardware=Hardware(device=self.device),
        )

    def clear(self) -> None:
        """Free every loaded editor."""
        self._free_oldest(len(self.loaded))

    def _free_oldest(self, count: int) -> None:
        """Free the `count` least recently used editors."""
        for key in list(self.loaded)[: max(0, count)]:
            del self.loaded[key]
        if count >= 0:  # also for the last editor of an earlier check, which `loaded` no longer has
            gc.collect()  # an editor and its `TextStates` refer to each other, so reference counting cannot free them

    def on_cpu_in_float32(self) -> Subject:
        """Return the subject on the CPU in float32, where graphs are exported: this one, or a copy."""
        if (self.device, self.compute_dtype) == ("cpu", "float32"):
            return self
        self.clear()  # makes room for the copy's editors
        return dataclasses.replace(self, device="cpu", compute_dtype="float32", loaded={})

    def segments(self) -> tuple[Segment, ...]:
        """Return every kind of tokens of this mode, kept by default or not."""
        return self.kind.entry.defaults.modes[self.mode].segments

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of one camera's picture."""
        return self.image_size or self.load().spec.image_size

    def with_two_cameras(self, instructions: Sequence[str] = (), **changes: Any) -> Iterator[dict[str, Any]]:
        """Yield `changes` with two cameras, for each camera layout that accepts two.

        Raises:
            UsageError: the default layout does not accept two cameras.
        """
        height, width = self.size
        default, *others = self.kind.entry.defaults.camera_layouts
        two = changes | {"cameras": TWO_CAMERAS, "image_size": (height, 2 * width)}
        yield two | {"camera_layout": default}
        for layout in others:
            if self._takes(instructions, two | {"camera_layout": layout}):
                yield two | {"camera_layout": layout}

    def _takes(self, instructions: Sequence[str], changes: Mapping[str, Any]) -> bool:
        try:
            self.load(instructions, **changes)
        except UsageError:
            return False
        return True

    def pictures(self, count: int, seed: int = 0, cameras: Sequence[str] = (CAMERA,)) -> list[dict[str, UInt8Image]]:
        """Return rows of noise pictures at the editor's input size."""
        height, width = self.size
        rng = np.random.default_rng(seed)
        return [
            {camera: rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for camera in cameras}
            for _ in range(count)
        ]


def subjects(name: str, **options: Any) -> list[Subject]:
    """Return the installed editor `name` in each of its modes. options: fields of `Subject`.

    Raises:
        UnknownNameError, PluginError: as `installed_editor`.
    """
    kind = installed_editor(name)
    return [Subject(kind=kind, mode=mode, **options) for mode in kind.entry.modes]


def valid_tokens_of(prefix: PrefixKV, spec: KVSpec, row: int) -> dict[str, Tensor]:
    """Return "K of LAYER" and "V of LAYER" -> the row's tokens (tokens, H, D), without padding."""
    tokens: dict[str, Tensor] = {}
    for layer, kv in zip(spec.layers, prefix.layers, strict=True):
        for part, values in (("K", kv.k), ("V", kv.v)):
            masked = prefix.valid is not None and layer.holds_text
            own = values[row][prefix.valid[row]] if masked else values[row]  # type: ignore[index]
            tokens[f"{part} of {layer.name}"] = own
    return tokens


def require(condition: bool, message: str, fix: str) -> None:
    """Check that `condition` holds.

    Raises:
        ContractError: it does not hold.
    """
    if not condition:
        raise ContractError(message, fix)


def require_equal(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, fix: str, *, rounding: bool = False
) -> None:
    """Check that two sets of tensors are equal, bit for bit. rounding: allow the rounding of the editor's dtype.

    Raises:
        ContractError: two tensors differ; the message names the first one and the maximum difference.
    """
    require(given.keys() == expected.keys(), f"{what}: layers {sorted(given)} instead of {sorted(expected)}", fix)
    for name, wanted in expected.items():
        actual = given[name]
        require(actual.shape == wanted.shape, f"{what}: {name} has shape {_shape(actual)}, not {_shape(wanted)}", fix)
        gap = largest_gap(actual, wanted)
        allowed = _ROUNDING[wanted.dtype] * max(1.0, _largest(wanted)) if rounding else 0.0
        require(gap <= allowed, f"{what}: {name} differs by up to {gap:.2g}; {allowed:.2g} is allowed", fix)


def require_different(given: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Check that two sets of tensors of equal shapes differ by more than rounding.

    Raises:
        ContractError: the sets are equal up to rounding, or their shapes differ.
    """
    for name, values in given.items():
        shapes = _shape(values), _shape(other[name])
        require(
            shapes[0] == shapes[1], f"{name} has the shapes {shapes[0]} and {shapes[1]}, which cannot be compared", fix
        )
    for name, values in given.items():
        if largest_gap(values, other[name]) > 10 * torch.finfo(values.dtype).eps * _largest(values):
            return
    raise ContractError(what, fix)


def largest_gap(given: Tensor, expected: Tensor) -> float:
    """Return the maximum absolute difference of two tensors."""
    return _largest(given.double() - expected.double())


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _shape(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape)
