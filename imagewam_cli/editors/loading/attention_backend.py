"""Torch's own attention in every editor, whatever the environment or a config asks for.

K and V are recorded where `scaled_dot_product_attention` is called (`prefix.capture`). Other backends, such as flash,
sage or xformers, do not call it, and they round differently. diffusers takes a backend from the environment when it is
imported; transformers takes one from a component's config.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from imagewam_cli.errors import warn

BACKEND = "DIFFUSERS_ATTN_BACKEND"
NATIVE = "native"
_TORCH = (None, "sdpa", "eager")
"""Attention of transformers that torch itself computes."""


def override_environment() -> None:
    """Replace the attention backend of the environment, with a warning. Call it before diffusers is imported."""
    asked = os.environ.get(BACKEND)
    if asked is not None and asked != NATIVE:
        os.environ[BACKEND] = NATIVE
        warn(f"{BACKEND}={asked} is not used: editors compute with torch's attention, where K and V are recorded")


def use_torch_attention(denoiser: nn.Module) -> None:
    """Set the native backend in every attention of a diffusers model. It goes before the backend with which diffusers
    was imported."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName.NATIVE


def torch_attention(part: Path) -> dict[str, str]:
    """Return the argument of transformers' `from_pretrained` that replaces the attention of a component's config.json;
    empty if torch computes it anyway."""
    try:
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # loading reports it
    known = (
        [config, *(value for value in config.values() if isinstance(value, dict))] if isinstance(config, dict) else []
    )
    for values in known:
        for key in ("attn_implementation", "_attn_implementation"):
            if values.get(key) not in _TORCH:
                warn(f"{key} {values[key]!r} in {part / 'config.json'} is not used: torch computes the attention")
                return {"attn_implementation": "sdpa"}
    return {}
