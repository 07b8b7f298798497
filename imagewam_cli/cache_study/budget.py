"""Which settings a budget of bytes has room for, and which of them to take.

Errors of attention compare codecs, where layers and tokens are the same. Between fewer tokens and fewer layers there is
no common measure: a layer that is left out has no error, and the expert loses a block with it. So the order is a rule:
first precision goes, then places (pooling), and layers only where nothing fits with all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from imagewam_cli.cache_study.fidelity import POOLS, layer_errors_of, storage_candidates
from imagewam_cli.kvcache.building.shard_plan import bytes_per_instruction, bytes_per_row
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import KVSpec, select_layers

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


def choices(
    spec: KVSpec,
    exact: PrefixKV,
    codecs: Mapping[str, Codec],
    *,
    rows: int,
    instructions: int,
    samples: Sequence[PrefixKV] = (),
    layers: str = "all",
    pool: int = 1,
) -> tuple[Choice, ...]:
    """Every codec with every pooling and thinning, in the order in which they are to be taken where they fit.

    spec, exact: of a few rows; rows, instructions: of the cache; samples: other rows, for codecs that are fitted to
    some. layers, pool: that the rows were made with; where these are not the defaults, they are the user's choice and
    stay.
    """
    tried = storage_candidates(spec, codecs.values(), samples, pools=POOLS if pool == 1 else (1,))
    errors = [[e.attention for e in of_candidate] for of_candidate in layer_errors_of(spec, exact, tried)]
    found = []
    for thinning, kept in _thinned(spec, layers):
        of_thinning = []
        for candidate, of_layers in zip(tried, errors, strict=True):
            thin = dataclasses.replace(candidate.spec, layers=tuple(candidate.spec.layers[i] for i in kept))
            size = bytes_per_row(thin, candidate.codec)
            of_thinning.append(
                Choice(
                    codec=candidate.codec.name,
                    pool=pool if pool != 1 else candidate.pool,
                    layers=thinning,
                    bytes_per_row=size,
                    total_bytes=rows * size + instructions * bytes_per_instruction(thin, candidate.codec),
                    attention=statistics.fmean(of_layers[i] for i in kept),
                )
            )
        found += sorted(of_thinning, key=lambda choice: (choice.pool, choice.attention, choice.total_bytes))
    return tuple(found)


def fitting(tried: Sequence[Choice], budget: float) -> tuple[Choice, ...]:
    """Those of `choices` that are no larger than `budget` bytes; the first is the one to take."""
    return tuple(choice for choice in tried if choice.total_bytes <= budget)


def best_codecs(tried: Sequence[Choice]) -> tuple[Choice, ...]:
    """Of each pooling and thinning the first."""
    return tuple(next(same) for _, same in groupby(tried, key=lambda choice: (choice.layers, choice.pool)))


def _thinned(spec: KVSpec, layers: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each set of layers once, under its first name."""
    everything = tuple(range(len(spec.layers)))
    if layers != "all":
        yield layers, everything
        return
    named = {select_layers(name, len(spec.layers)): name for name in reversed(_THINNINGS)}
    yield from ((name, kept) for kept, name in reversed(named.items()))
