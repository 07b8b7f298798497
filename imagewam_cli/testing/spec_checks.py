"""Checks of the layout: `encode` matches `spec` and `describe`, and every choice is a slice of the whole prefix."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from imagewam_cli.errors import UsageError
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.pooling import pooled_segment
from imagewam_cli.prefix.spec import KVSpec, Mode, Segment
from imagewam_cli.testing.subject import (
    CAMERA,
    LONG,
    SHORT,
    TWO_CAMERAS,
    NotApplicable,
    Subject,
    require,
    require_equal,
)

Parts = dict[tuple[str, str], dict[str, Tensor]]
"""(layer, segment) -> K and V (B, tokens, H, D)."""


def modes_of_the_entry_load(subject: Subject) -> None:
    """every mode that the entry names can be loaded"""
    refusal = mode_refusal(subject)
    require(
        refusal is None,
        f"the entry names mode {subject.mode}, but `load` rejects it: {refusal}",
        "omit it from the modes of the entry's `defaults`, or accept it in `load`",
    )


def mode_refusal(subject: Subject) -> str | None:
    """Return why `load` rejects the subject's mode; None if it accepts it.

    Raises:
        ImagewamError: the editor does not load in its default mode either.
    """
    refusal = _refusal(subject)
    if refusal is not None:
        subject.load(mode=None)
    return refusal


def shapes_are_those_of_the_spec(subject: Subject) -> None:
    """K, V and `valid` have the shapes that `spec` declares, with one camera and with two"""
    height, width = subject.size
    _require_shapes(subject, (CAMERA,), (height, width), {"segments": subject.segments()})
    for changes in subject.with_two_cameras((SHORT, LONG), segments=subject.segments()):
        _require_shapes(subject, TWO_CAMERAS, (height, 2 * width), changes)


def _require_shapes(
    subject: Subject,
    cameras: tuple[str, ...],
    size: tuple[int, int],
    changes: Mapping[str, Any],
) -> None:
    editor = subject.load((SHORT, LONG), **changes)
    spec, prefix = editor.spec, editor.encode(subject.pictures(2, cameras=cameras), (SHORT, LONG))
    fix = "correct `attention_layers` (names in call order, heads, tokens of each segment)"
    require(spec.mode == subject.mode, f"requested mode {subject.mode}, but the spec has {spec.mode}", "see `spec`")
    require(spec.cameras == cameras, f"requested cameras {cameras}, but the spec has {spec.cameras}", "see `spec`")
    require(spec.image_size == size, f"requested {size}, but the spec has {spec.image_size}", "see `spec`")
    require(
        len(prefix.layers) == len(spec.layers), f"{len(prefix.layers)} layers, but the spec has {len(spec.layers)}", fix
    )
    for layer, kv in zip(spec.layers, prefix.layers, strict=True):
        expected = (2, layer.tokens, layer.kv_heads, layer.head_dim)
        for part, values in (("K", kv.k), ("V", kv.v)):
            actual = tuple(values.shape)
            require(
                actual == expected, f"{part} of {layer.name} has shape {actual}, but the spec declares {expected}", fix
            )
            require(bool(torch.isfinite(values).all()), f"{part} of {layer.name} is not finite", "see `run`")
    _require_valid(prefix, spec)


def pooled_shapes_are_those_of_the_spec(subject: Subject) -> None:
    """with `pool` 2, a picture keeps one token per 2 x 2 cell, and K and V have the shapes that `spec` declares"""
    changes = {"segments": subject.segments()}
    whole = subject.load((SHORT, LONG), **changes).spec
    if not any(layer.holds_pictures for layer in whole.layers):
        raise NotApplicable("it has no picture tokens")
    try:
        pooled = subject.load((SHORT, LONG), pool=2, **changes).spec
    except UsageError as error:
        raise NotApplicable(f"it cannot pool: {error.message}") from None
    fix = "pool as `DiffusersEditor` does, with `imagewam_cli.prefix.pooling`, or reject it with UsageError from `load`"
    for before, after in zip(whole.layers, pooled.layers, strict=True):
        halves = [pooled_segment(segment, 2) for segment in before.segments]
        actual = [(s.name, s.tokens, s.grid) for s in after.segments]
        expected = [(s.name, s.tokens, s.grid) for s in halves]
        require(actual == expected, f"with `pool` 2 the spec of {before.name} has {actual}, not {expected}", fix)
    _require_shapes(subject, (CAMERA,), subject.size, changes | {"pool": 2})


def _require_valid(prefix: PrefixKV, spec: KVSpec) -> None:
    fix = "`valid` is bool (B, P) where a layer holds text, and K and V are zeroed where it is False"
    if prefix.valid is None:
        return
    actual = (prefix.valid.dtype, tuple(prefix.valid.shape))
    expected = (torch.bool, (2, spec.valid_tokens))
    require(actual == expected, f"`valid` is {actual}, but the spec declares {expected}", fix)
    for layer, kv in zip(spec.layers, prefix.layers, strict=True):
        if layer.holds_text:
            hidden = torch.cat([kv.k[~prefix.valid].flatten(), kv.v[~prefix.valid].flatten()])
            require(not hidden.any(), f"K or V of {layer.name} are not zero where `valid` is False", fix)


def description_is_the_spec(subject: Subject) -> None:
    """`describe`, without weights, equals the `spec` of the loaded editor"""
    described = subject.kind.bound_to(_released_as_loaded(subject)).describe(subject.options())
    if described is None:
        raise NotApplicable("the entry has no `config`, so the layout is unknown without weights")
    described, spec = _without_text_length(described), _without_text_length(subject.load().spec)
    for name in (f.name for f in dataclasses.fields(KVSpec)):
        expected, actual = getattr(described, name), getattr(spec, name)
        if name == "layers":
            expected, actual = _first_difference(expected, actual)
        require(
            expected == actual,
            f"described {name}: {expected}\nloaded {name}: {actual}",
            "`attention_layers` and `rope` must depend only on the denoiser's config and the settings",
        )


def _released_as_loaded(subject: Subject) -> EditorEntry:
    """Return the entry with the config of the loaded denoiser, which may be a small one."""
    if subject.weights is None:
        return subject.kind.entry
    if subject.kind.embedded is not None:
        raise NotApplicable("it describes its embedded weights, but other weights are loaded")
    path = subject.weights / subject.kind.entry.denoiser / "config.json"
    if not path.is_file():
        return subject.kind.entry
    return dataclasses.replace(subject.kind.entry, config=json.loads(path.read_text(encoding="utf-8")))


def _without_text_length(spec: KVSpec) -> KVSpec:
    """Return the layout with text of one token: without weights, only its maximum length is known."""
    layers = tuple(
        dataclasses.replace(
            layer,
            segments=tuple(dataclasses.replace(s, tokens=1) if s.name == "text" else s for s in layer.segments),
        )
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=layers)


def _first_difference(expected: tuple[object, ...], actual: tuple[object, ...]) -> tuple[object, object]:
    """Return the numbers of layers, or the first pair that differs: dozens of layers would be unreadable."""
    if len(expected) != len(actual):
        return f"{len(expected)} layers", f"{len(actual)} layers"
    return next(((a, b) for a, b in zip(expected, actual, strict=True) if a != b), (expected, actual))


def segments_are_slices(subject: Subject) -> None:
    """choosing kinds of tokens (`--segments`) gives slices of the whole prefix"""
    whole = _parts(subject, segments=subject.segments())
    for segment in subject.segments():
        kept = _parts(subject, segments=(segment,))
        expected = {key: values for key, values in whole.items() if key[1] == segment}
        _require_parts(kept, expected, f"with only `segments` {segment}")


def layers_are_slices(subject: Subject) -> None:
    """choosing layers (`--layers`) gives slices of the whole prefix"""
    whole = _parts(subject)
    names = list(dict.fromkeys(name for name, _ in whole))
    for choice, chosen in (("every:2", names[::2]), (str(len(names) - 1), names[-1:])):
        expected = {key: values for key, values in whole.items() if key[0] in chosen}
        _require_parts(_parts(subject, layers=choice), expected, f"with `layers` {choice}")


def prefix_mode_has_no_target(subject: Subject) -> None:
    """mode `prefix` has no target tokens, and `--segments target` is rejected"""
    if subject.mode != "prefix":
        raise NotApplicable(f"the mode is {subject.mode}")
    fix = "mode `prefix` is one forward pass without a target; offer a forward pass with a target as mode `denoise`"
    require("target" not in {name for _, name in _parts(subject)}, "the prefix has target tokens", fix)
    require(_refusal(subject, segments=("target",)) is not None, "`segments` target is accepted", fix)


def unknown_choices_are_refused(subject: Subject) -> None:
    """a segment or mode that the editor does not have is rejected, and the hint lists the available ones"""
    fix = "raise UsageError from `load` as `imagewam_cli.plugin.resolve` does, with a hint that lists the choices"
    fix_modes = "name it in the modes of the entry's `defaults`, or reject it in `load`"
    absent = [name for name in ("sky", *get_args(Segment)) if name not in subject.segments()]
    for name in absent:
        refusal = _refusal(subject, segments=(name,))
        require(refusal is not None, f"`segments` {name} is accepted, but the editor has no such tokens", fix)
        listed = all(segment in str(refusal) for segment in subject.segments())
        require(listed, f"`segments` {name} is rejected without naming {', '.join(subject.segments())}: {refusal}", fix)
    for mode in get_args(Mode):
        if mode not in subject.kind.entry.modes:
            accepted = _refusal(subject, mode=mode) is None
            require(not accepted, f"mode {mode} is accepted, but the entry does not have it", fix_modes)


def wrong_size_is_refused(subject: Subject) -> None:
    """a picture size that is not a multiple of the token size is rejected, and the hint names the nearest valid size"""
    height, width = subject.size
    size = (height + 1, width)
    refusal = _refusal(subject, image_size=size)
    if refusal is not None:
        require(
            f"{height}x{width}" in refusal,
            f"{size[0]}x{size[1]} is rejected without naming {height}x{width}, the nearest valid size: {refusal}",
            "raise UsageError from `load` as `imagewam_cli.plugin.resolve` does",
        )
        return
    spec = subject.load(image_size=size).spec
    require(spec.image_size == size, f"{size} is accepted, but the spec has {spec.image_size}", "reject it in `load`")


def _refusal(subject: Subject, **changes: Any) -> str | None:
    """Return why `load` rejects these options; None if it accepts them."""
    try:
        subject.load(**changes)
    except UsageError as error:
        return f"{error.message}; {error.hint}"
    return None


def _parts(subject: Subject, **changes: Any) -> Parts:
    """Return the prefix of two rows, split by layer and segment."""
    editor = subject.load((SHORT, LONG), **changes)
    prefix = editor.encode(subject.pictures(2), (SHORT, LONG))
    parts: Parts = {}
    for layer, kv in zip(editor.spec.layers, prefix.layers, strict=True):
        sizes = [segment.tokens for segment in layer.segments]
        for segment, k, v in zip(
            layer.segments, torch.split(kv.k, sizes, dim=1), torch.split(kv.v, sizes, dim=1), strict=True
        ):
            parts[layer.name, segment.name] = {"K": k, "V": v}
    return parts


def _require_parts(actual: Parts, expected: Mapping[tuple[str, str], dict[str, Tensor]], what: str) -> None:
    fix = "record the same forward pass for every choice, then slice: a choice must not change what is computed"
    require(list(actual) == list(expected), f"{what}: the prefix has {list(actual)}, not {list(expected)}", fix)
    for (layer, segment), values in expected.items():
        require_equal(actual[layer, segment], values, f"{what}: {segment} tokens of {layer}", fix)
