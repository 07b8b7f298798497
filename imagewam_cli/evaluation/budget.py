"""The setting that loses least of those that a budget of bytes has room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from imagewam_cli.editor import PrefixKV
from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.fidelity import compare_ways, ways
from imagewam_cli.kvcache.codec import Codec
from imagewam_cli.kvcache.spec import KVSpec, select_layers

_THINNINGS = ("all", "every:2", "every:4", "every:8")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Options of `imagewam cache`, and what they come to. attention: error of the kept layers, on a sample."""

    codec: str
    pool: int
    layers: str
    bytes_per_row: int
    total_bytes: int
    attention: float

    @property
    def options(self) -> str:
        """As they are written on the command line."""
        return f"--codec {self.codec} --pool {self.pool} --layers {self.layers}"


def within_budget(spec: KVSpec, exact: PrefixKV, codecs: Mapping[str, Codec], *, rows: int, budget: float) -> Choice:
    """The least error of attention that fits; layers are left out only where nothing fits with all of them.

    spec, exact: of a sample that is not pooled; budget: bytes for `rows` rows.

    Raises:
        UsageError: nothing fits; says what the smallest needs.
    """
    smallest: Choice | None = None
    for layers in _THINNINGS:
        kept = select_layers(layers, len(spec.layers))
        thin = dataclasses.replace(spec, layers=tuple(spec.layers[i] for i in kept))
        prefix = PrefixKV(tuple(exact.layers[i] for i in kept), exact.valid if thin.valid_tokens else None)
        choices = [
            Choice(
                codec=found.codec,
                pool=found.pool,
                layers=layers,
                bytes_per_row=found.bytes_per_row,
                total_bytes=rows * found.bytes_per_row,
                attention=found.attention,
            )
            for found in compare_ways(thin, prefix, ways(thin, codecs.values()))
        ]
        fitting = [choice for choice in choices if choice.total_bytes <= budget]
        if fitting:
            return min(fitting, key=lambda choice: (choice.attention, choice.total_bytes))
        smallest = min([*choices, *([smallest] if smallest else [])], key=lambda choice: choice.total_bytes)
    assert smallest is not None
    raise UsageError(
        f"nothing fits {budget / 1e9:.3g} GB: {smallest.options} still needs {smallest.total_bytes / 1e9:.3g} GB",
        "raise --budget, or take fewer rows with --stride",
    )
