"""Check all components of an editor before any of them is used: weights, configs, tokenizers and processors.

Only headers and small files are read. What a folder holds besides its components is named if a user may expect it to
have an effect: a LoRA, or a second set of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from imagewam_cli.editors.loading.fit import require_fit, stem_of
from imagewam_cli.editors.loading.vocabulary import require_processor_files, require_tokenizer_files
from imagewam_cli.editors.loading.weight_files import AGAIN, FULL_PRECISION, is_adapter, loaded_names, require_content
from imagewam_cli.errors import EditorError, warn

_ONE_MODEL = "pass a folder whose components belong to the editor"


def require_components(folders: Mapping[str, Path], classes: Mapping[str, type]) -> None:
    """Check every component of an editor, and warn of files that look like weights but are not used.

    folders: sub-folder -> the pipeline folder that contains it; classes: sub-folder -> class of the component.

    Raises:
        EditorError: a component is not what its config says; the message names it.
    """
    from diffusers import SchedulerMixin
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.image_processing_base import ImageProcessingMixin

    for name, kind in classes.items():
        folder = folders[name] / name
        if issubclass(kind, nn.Module):
            _require_index_class(folders[name], name, kind)
            _require_model(folder, kind)
        if issubclass(kind, PreTrainedTokenizerBase | ProcessorMixin | AutoTokenizer):
            require_tokenizer_files(folder, kind)
        if issubclass(kind, ProcessorMixin | ImageProcessingMixin):
            require_processor_files(folder)
        if issubclass(kind, SchedulerMixin):
            path = folder / "scheduler_config.json"
            require_content(path)
            if "_class_name" not in json.loads(path.read_bytes()):
                raise EditorError(f"{path} describes no scheduler", AGAIN)
    _warn_of_unused(folders, classes)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a component.

    Raises:
        EditorError: the file is missing or damaged.
    """
    path = folder / "config.json"
    require_content(path)
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise EditorError(f"{path} is damaged: it holds no keys", AGAIN)
    return values


def _require_model(folder: Path, kind: type[nn.Module]) -> None:
    config = read_config(folder)
    method = config.get("quantization_config")
    if isinstance(method, Mapping):
        by = method.get("quant_method") or method.get("quant_type") or "another tool"
        raise EditorError(f"the weights in {folder} are quantized by {by}, as its config.json says", FULL_PRECISION)
    _require_described(folder, kind, config)
    require_fit(folder, kind, config)


def _require_described(folder: Path, kind: Any, config: Mapping[str, Any]) -> None:
    """Check that config.json describes a model of this class. The libraries would only warn, and use their defaults."""
    described, wanted = config.get("_class_name"), kind.__name__
    if described is None and (model_type := config.get("model_type")) is not None:
        parts = [part for part in config.values() if isinstance(part, Mapping)]
        accepted = {getattr(kind.config_class, "model_type", model_type)}
        # a text encoder may have the config of the larger model that it was taken from
        if model_type not in accepted and not any(part.get("model_type") in accepted for part in parts):
            described, wanted = model_type, f"{wanted} ({', '.join(accepted)})"
    elif described in {base.__name__ for base in kind.__mro__}:
        described = None
    if described is not None:
        raise EditorError(f"{folder / 'config.json'} describes {described}, and the editor needs {wanted}", _ONE_MODEL)


def _require_index_class(home: Path, name: str, kind: type) -> None:
    """Check that model_index.json, if it names a class for a model, names this one."""
    index = home / "model_index.json"
    if not index.is_file():
        return
    try:
        entry = json.loads(index.read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):
        return  # `require_family` names the damage
    found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if found is not None and found not in {base.__name__ for base in kind.__mro__}:
        raise EditorError(f"{index} names {found} for {name}/, and the editor needs {kind.__name__}", _ONE_MODEL)


def _warn_of_unused(folders: Mapping[str, Path], classes: Mapping[str, type]) -> None:
    """Name LoRAs that are not applied, and second sets of weights that are not read."""
    places = [*dict.fromkeys(folders.values()), *(folders[name] / name for name in classes)]
    adapters = [str(path) for place in places for path in sorted(place.iterdir()) if is_adapter(path.name)]
    if adapters:
        more = f" and {len(adapters) - 3} more" if len(adapters) > 3 else ""
        warn(
            f"{', '.join(adapters[:3])}{more} is a LoRA, which is not applied: the editor runs without it; "
            "to use it, merge it into the weights"
        )
    for name, kind in classes.items():
        folder = folders[name] / name
        if not issubclass(kind, nn.Module):
            continue
        read = loaded_names(folder, stem_of(kind))
        other = sorted(
            path.name
            for path in folder.glob("*.safetensors")
            if path.name not in read and not is_adapter(path.name) and path.name.count(".") == 1
        )
        if other:
            warn(f"{folder} has several sets of weights: {min(read, default='none')} is read, {other[0]} is not")
