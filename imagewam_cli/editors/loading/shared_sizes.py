"""Sizes on which two components of a pipeline must agree, compared before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imagewam_cli.errors import EditorError

Configs = Mapping[str, Mapping[str, Any]]
"""config.json of each component that is a model."""


@dataclass(frozen=True, kw_only=True)
class SharedSize:
    """A size that one component gives and another takes. Keys are written "component.key"."""

    what: str
    """The size in words, such as "width of the text states"."""
    given: tuple[str, ...]
    """Keys of the config.json files of the components that give it; several are added."""
    times: int = 1
    """Factor between a given number and a taken one."""
    taken: str

    def require(self, configs: Configs) -> None:
        """Check that both sides agree. Keys that a config leaves out are not checked.

        Raises:
            EditorError: they do not; the message gives both numbers.
        """
        given, taken = [_number(configs, key) for key in self.given], _number(configs, self.taken)
        if taken is None or None in given:
            return
        total = self.times * sum(number for number in given if number is not None)
        if total != taken:
            givers = " and ".join(key.partition(".")[0] for key in self.given)
            raise EditorError(
                f"{givers} and {self.taken.partition('.')[0]} do not belong together: the {self.what} is {total} of "
                f"the former and {taken} of the latter",
                "pass a folder whose components belong to one pipeline",
            )


def _number(configs: Configs, key: str) -> int | None:
    component, _, name = key.partition(".")
    config = configs.get(component, {})
    text = config.get("text_config")
    value = config.get(name, text.get(name) if isinstance(text, Mapping) else None)
    return value if isinstance(value, int) else None
