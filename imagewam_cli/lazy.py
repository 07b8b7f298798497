"""Modules that import what they export when it is first used (PEP 562), so that importing them costs no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    module: str, exports: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a module.

    module: the `__name__` of the module that exports. exports: module -> the names that it defines.
    """
    origins = {name: origin for origin, names in exports.items() for name in names}

    def get(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origins[name]), name)
        setattr(sys.modules[module], name, value)  # the next use of the name does not come here
        return value

    def list_names() -> list[str]:
        special = {name for name in vars(sys.modules[module]) if name.startswith("__")}
        return sorted({*special, *origins})

    return get, list_names
