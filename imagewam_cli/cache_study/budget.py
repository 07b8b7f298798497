"""Find the cache settings that fit a budget of bytes, and rank them.

The attention error compares codecs that store the same layers and tokens. It cannot weigh fewer tokens against fewer
layers: a dropped layer has no error, but the expert loses a block. A fixed rule therefore decides: reduce precision
first, then pool tokens, and drop layers only if nothing fits with all of them.
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
    """Options of `imagewam cache` with the size and error of the resulting cache."""

    codec: str
    pool: int
    layers: str
    bytes_per_row: int
    total_bytes: int
    attention: float
    """Mean attention error of the kept layers, measured on a sample."""

    @property
    def options(self) -> str:
        """The options as written on the command line."""
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
    """Return every combination of codec, pooling and layer subset, best first.

    spec, exact: layout and prefix of a few sample rows. rows, instructions: their numbers in the cache. samples: other
    rows, to fit codecs to. layers, pool: settings of the sample rows; if they are not the defaults, the user chose
    them, and only the other settings are varied.
    """
    candidates = storage_candidates(spec, codecs.values(), samples, pools=POOLS if pool == 1 else (1,))
    errors = [[e.attention for e in candidate_errors] for candidate_errors in layer_errors_of(spec, exact, candidates)]
    found = []
    for thinning, kept in _thinned(spec, layers):
        same_layers = []
        for candidate, layer_errors in zip(candidates, errors, strict=True):
            thin = dataclasses.replace(candidate.spec, layers=tuple(candidate.spec.layers[i] for i in kept))
            size = bytes_per_row(thin, candidate.codec)
            same_layers.append(
                Choice(
                    codec=candidate.codec.name,
                    pool=pool if pool != 1 else candidate.pool,
                    layers=thinning,
                    bytes_per_row=size,
                    total_bytes=rows * size + instructions * bytes_per_instruction(thin, candidate.codec),
                    attention=statistics.fmean(layer_errors[i] for i in kept),
                )
            )
        found += sorted(same_layers, key=lambda choice: (choice.pool, choice.attention, choice.total_bytes))
    return tuple(found)


def fitting(candidates: Sequence[Choice], budget: float) -> tuple[Choice, ...]:
    """Return the choices of at most `budget` bytes, in order; the first is the best."""
    return tuple(choice for choice in candidates if choice.total_bytes <= budget)


def best_codecs(candidates: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the first, best choice for each combination of pooling and layers."""
    return tuple(next(same) for _, same in groupby(candidates, key=lambda choice: (choice.layers, choice.pool)))


def _thinned(spec: KVSpec, layers: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each distinct subset of layers once, under the first option that selects it."""
    everything = tuple(range(len(spec.layers)))
    if layers != "all":
        yield layers, everything
        return
    # filled from the last option to the first, so that the first name of equal subsets wins
    named = {select_layers(name, len(spec.layers)): name for name in reversed(_THINNINGS)}
    yield from ((name, kept) for kept, name in reversed(named.items()))
