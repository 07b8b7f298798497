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


def text_width(*given: str, times: int = 1, taken: str = "transformer.joint_attention_dim") -> SharedSize:
    """Return the width of the text states, which text encoders give and the denoiser takes; see `SharedSize`."""
    return SharedSize(what="width of the text states", given=given, times=times, taken=taken)


def picture_width(given: str) -> SharedSize:
    """Return the width of a picture's tokens: four latents of the VAE in each token of a joint transformer."""
    return SharedSize(what="width of a picture's tokens", given=(given,), times=4, taken="transformer.in_channels")


def _number(configs: Configs, key: str) -> int | None:
    component, _, name = key.partition(".")
    config = configs.get(component, {})
    text = config.get("text_config")
    value = config.get(name, text.get(name) if isinstance(text, Mapping) else None)
    return value if isinstance(value, int) else None
