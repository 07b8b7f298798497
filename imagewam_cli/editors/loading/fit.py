"""Compare the weight files of a component with the model that its config builds, before any weights are read.

The model is built without memory (on torch's meta device) by the library that will load it, and the library itself
decides which stored name belongs to which tensor: older names, tied weights and buffers are its business.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imagewam_cli.editors.loading.foreign_weights import seems_to_be
from imagewam_cli.editors.loading.weight_files import (
    DIFFUSERS,
    FULL_PRECISION,
    TRANSFORMERS,
    StoredTensor,
    WeightFiles,
    weight_files,
)
from imagewam_cli.errors import EditorError, warn

if TYPE_CHECKING:
    from diffusers import ModelMixin

_UNUSED = re.compile(
    r"(^|\.)(position_ids|rotary_emb\.inv_freq|num_batches_tracked)$"
    r"|^(vision_model|visual_projection|text_projection|logit_scale)\b|^lm_head\."
)
"""Tensors that may be in a file although the model has no place for them: buffers of other versions, and the towers
and heads of the larger model that a text encoder was taken from."""
_DISPENSABLE = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|num_batches_tracked)$")
"""Tensors that may be missing: buffers that are computed or never read."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SHOWN = 3
_DAMAGED = "config.json and weights must match: fetch the editor again, or pass a different --weights"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the tensors of a component fit its model. shapes: name -> (stored shape, expected shape) where they
    differ."""

    expected: Collection[str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def reported(cls, model: nn.Module, report: Mapping[str, Any]) -> Fit:
        """Return what a library reported when it loaded `model`."""
        return cls(
            expected=model.state_dict().keys(),
            missing=tuple(sorted(name for name in report["missing_keys"] if not _DISPENSABLE.search(name))),
            unexpected=tuple(sorted(name for name in report["unexpected_keys"] if not _UNUSED.search(name))),
            shapes={name: (tuple(there), tuple(here)) for name, there, here in sorted(report["mismatched_keys"])},
        )


def stem_of(kind: type[nn.Module]) -> str:
    """Return the name, without suffix, of the weight files that the library of a model reads."""
    from diffusers import ModelMixin

    return DIFFUSERS if issubclass(kind, ModelMixin) else TRANSFORMERS


def require_fit(folder: Path, kind: type[nn.Module], config: Mapping[str, object]) -> None:
    """Check that the weights of a component are those of the model that its config builds. Reads only headers.

    folder: of the component; kind: its class; config: its config.json.

    Raises:
        EditorError: a tensor is missing, unexpected, of another shape or of a type that is not read; or a file is
            damaged. The message says what kind of weights they seem to be.
    """
    files = weight_files(folder, stem_of(kind))
    found: Fit | None
    try:
        with quiet():
            found = _diffusers_fit(files, kind, config) if stem_of(kind) == DIFFUSERS else _rehearsed(files, kind)
    except NotImplementedError:
        # Older versions of transformers compare tied weights by value. What they report when they load is checked then.
        found = None
    except Exception as error:  # for a wrong config, the libraries may raise any exception
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise EditorError(
            f"{folder / 'config.json'} does not describe a {kind.__name__}: {reason}", _DAMAGED
        ) from error
    if found is not None:
        require_fitting(folder, found)
    _require_numbers(files, kind)


def require_fitting(folder: Path, found: Fit) -> None:
    """Check the result of a comparison.

    Raises:
        EditorError: something is missing, unexpected or of another shape.
    """
    problems = []
    if found.missing:
        problems.append(f"{_count(found.missing, 'missing')} ({_listed(found.missing)})")
    if found.unexpected:
        problems.append(f"{_count(found.unexpected, 'unexpected')} ({_listed(found.unexpected)})")
    if found.shapes:
        name, (there, here) = next(iter(found.shapes.items()))
        shapes = f"{name!r} is {list(there)} instead of {list(here)}"
        problems.append(f"{_count(found.shapes, 'of another shape')} ({shapes})")
    if not problems:
        return
    meaning = seems_to_be(found.expected, found.missing, found.unexpected, mismatched=bool(found.shapes))
    said, hint = meaning if meaning is not None else ("", _DAMAGED)
    raise EditorError(
        f"the weights in {folder} are not those of its config.json: {'; '.join(problems)}{f'; {said}' if said else ''}",
        hint,
    )


def meta_model(kind: type[ModelMixin], config: Mapping[str, object]) -> ModelMixin:
    """Return a model of diffusers on the meta device. Callers with the same config share it, so it must not be
    modified."""
    return _meta_model(kind, json.dumps(config, sort_keys=True, default=str))  # type: ignore[arg-type]  # untyped library


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and load reports of the libraries: the command that loads has its own."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    bar, levels = of_transformers.is_progress_bar_enabled(), []
    of_transformers.disable_progress_bar()
    for logging in (of_diffusers, of_transformers):
        levels.append((logging, logging.get_verbosity()))
        logging.set_verbosity_error()
    try:
        yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)
        if bar:
            of_transformers.enable_progress_bar()


def _diffusers_fit(files: WeightFiles, kind: Any, config: Mapping[str, object]) -> Fit:
    model = meta_model(kind, config)
    expected = model.state_dict()
    stored = _weightless(files.tensors)
    if not files.sharded:  # diffusers renames the attention of old VAEs only then
        model._fix_state_dict_keys_on_load(stored)
    ignored = [re.compile(pattern) for pattern in kind._keys_to_ignore_on_load_unexpected or ()]
    return Fit.reported(
        model,
        {
            "missing_keys": expected.keys() - stored.keys(),
            "unexpected_keys": {n for n in stored.keys() - expected.keys() if not any(p.search(n) for p in ignored)},
            "mismatched_keys": [
                (name, value.shape, expected[name].shape)
                for name, value in stored.items()
                if name in expected and value.shape != expected[name].shape
            ],
        },
    )


def _rehearsed(files: WeightFiles, kind: Any) -> Fit:
    """Let transformers load tensors without content into a model without memory, and return its own report."""
    config = kind.config_class.from_pretrained(files.folder)
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=_weightless(files.tensors),
        device_map={"": "meta"},
        dtype=torch.float32,
        attn_implementation="eager",  # whatever the config asks for: nothing is computed
        ignore_mismatched_sizes=True,  # report them with all others
        output_loading_info=True,
    )
    return Fit.reported(model, report)


def _weightless(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}


def _require_numbers(files: WeightFiles, kind: type[nn.Module]) -> None:
    """Check that all weights are stored as floats. fp8 without scales is converted, and that is said."""
    whole = {n: t for n, t in files.tensors.items() if t.dtype not in _FLOATS and not _UNUSED.search(n)}
    fp8 = {name: tensor for name, tensor in whole.items() if tensor.dtype in _FP8}
    other = sorted(whole.keys() - fp8.keys())
    if other:
        raise EditorError(
            f"the weights in {files.folder} seem to be quantized: {len(other)} tensors are stored "
            f"as {files.tensors[other[0]].dtype} ({_listed(other)})",
            FULL_PRECISION,
        )
    if fp8:
        warn(
            f"{files.folder} stores {len(fp8)} tensors in 8 bits ({_FP8[next(iter(fp8.values())).dtype]}) without "
            "scales: they are converted to the editor's dtype as they are"
        )


@functools.lru_cache(maxsize=16)
def _meta_model(kind: type[ModelMixin], config: str) -> ModelMixin:
    """Build a model on the meta device. config: as JSON, so that it can be a cache key."""
    from diffusers.models.modeling_utils import no_init_weights

    # skip the initialization of meta weights, which would take half of the time
    with torch.device("meta"), no_init_weights():
        return kind.from_config(json.loads(config))


def _count(names: Collection[str], what: str) -> str:
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}"


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in list(names)[:_SHOWN]) + more
