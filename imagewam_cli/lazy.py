"""Export names lazily (PEP 562): a module imports each name when it is first used.

Importing such a module does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    module: str, exports: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a module.

    Args:
        module: the `__name__` of the module that exports the names.
        exports: defining module -> names.
    """
    origins = {name: origin for origin, names in exports.items() for name in names}

    def get(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origins[name]), name)
        setattr(sys.modules[module], name, value)  # cached: the next access bypasses `__getattr__`
        return value

    def list_names() -> list[str]:
        special = {name for name in vars(sys.modules[module]) if name.startswith("__")}
        return sorted({*special, *origins})

    return get, list_names
