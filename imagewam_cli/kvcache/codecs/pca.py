"""Transform coding of keys and values: about one bit per number, with the error of `int4` at four and a half bits.

K and V of a token derive from one hidden state, and hidden states of similar scenes are similar, so a few principal
components predict most of their numbers. For each segment of a layer and each block of neighboring heads, K and V are
concatenated and projected onto principal axes, which are fitted to a sample of the dataset's rows. Each axis is then
quantized with its own number of bits: bits are allocated, eight axes at a time, where they reduce the squared error
most (greedy allocation; Gersho and Gray, Vector Quantization and Signal Compression, 1992, chapter 8). Step sizes start
from the optimum for a Gaussian (Max 1960) and are widened if the sample has heavier tails. Rotary keys are un-rotated
first, as in `int4`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.positions import layer_ids, rotate_keys, unrotate
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec

_BLOCK = 512
"""Maximum number of values of a token in one projection. A larger head gets its own block."""
_GROUP = 8
"""Neighboring axes that get equally many bits, so that each bit plane fills whole bytes."""
_MAX_BITS = 8
_GAUSSIAN_STEPS = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
"""Optimal steps of uniform quantizers of 1 to 8 bits, for a Gaussian of deviation 1."""
_WIDENINGS = (0.7, 0.85, 1.0, 1.2, 1.5, 1.9, 2.4, 3.0, 4.0, 6.0)
_MIN_STEP = 1e-12
_SAMPLE = 2048
"""Number of tokens on which quantizers are compared."""


@dataclass(frozen=True)
class SegmentBasis:
    """Fitted basis of one segment of one layer. A token has C = 2 G D numbers, of which A axes are stored.

    scale: (2,) divisors of K and V, so that both count equally. order: (A,) indices among the C axes, most bits first.
    """

    mean: Tensor
    """(C,) float32"""
    scale: Tensor
    blocks: tuple[Tensor, ...]
    """Square float16 matrices whose columns are the axes; their sizes add up to C."""
    order: Tensor
    bits: Tensor
    """(A,) int64: number of bits of each stored axis."""
    step: Tensor
    """(A,) float32"""

    def codes(self, x: Tensor) -> Tensor:
        """Quantize: (P, C) -> (P, A) uint8, from 0 to 2^bits - 1."""
        parts = [
            part @ projection for part, projection in zip(self._split(x - self.mean), self._projections, strict=True)
        ]
        turned = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)[:, self._block_order.argsort()]
        half = 2.0 ** (self.bits - 1)
        return (turned.floor() + half).clamp(min=torch.zeros_like(half), max=2 * half - 1).to(torch.uint8)

    def numbers(self, codes: Tensor) -> list[Tensor]:
        """Reconstruct the numbers of each block: (M, A) uint8 -> (M, size) float32."""
        q = codes.float()
        if len(self.blocks) > 1:
            q = q[:, self._block_order]
        parts = torch.split(q, [len(inverse) for inverse in self._inverse_projections], dim=1)
        return [
            torch.addmm(zero_code, part, inverse)
            for part, inverse, zero_code in zip(parts, self._inverse_projections, self._zero_code_values, strict=True)
        ]

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, [len(block) for block in self.blocks], dim=-1)

    @functools.cached_property
    def _axis_positions(self) -> list[Tensor]:
        """Positions of each block's axes among the A stored ones, (A_b,)."""
        ends = torch.tensor([len(block) for block in self.blocks]).cumsum(0)
        owner = torch.bucketize(self.order.cpu(), ends, right=True)
        return [torch.nonzero(owner == i)[:, 0].to(self.order.device) for i in range(len(self.blocks))]

    @functools.cached_property
    def _block_order(self) -> Tensor:
        """Positions of the stored axes, block after block, (A,)."""
        return torch.cat(self._axis_positions)

    @functools.cached_property
    def _axes(self) -> list[Tensor]:
        """Stored axes of each block as columns, (size, A_b), in the order of `order`."""
        ends = accumulate(len(block) for block in self.blocks)
        return [
            block.float()[:, self.order[own] - (end - len(block))]
            for block, own, end in zip(self.blocks, self._axis_positions, ends, strict=True)
        ]

    @functools.cached_property
    def _projections(self) -> list[Tensor]:
        """Projection of each block, (size, A_b): maps centered numbers to multiples of a step."""
        return [
            axes / self._spread(len(axes))[:, None] / self.step[own]
            for axes, own in zip(self._axes, self._axis_positions, strict=True)
        ]

    @functools.cached_property
    def _inverse_projections(self) -> list[Tensor]:
        """Inverse projection of each block, (A_b, size)."""
        return [
            (axes * self._spread(len(axes))[:, None] * self.step[own]).T
            for axes, own in zip(self._axes, self._axis_positions, strict=True)
        ]

    @functools.cached_property
    def _zero_code_values(self) -> list[Tensor]:
        """Numbers of each block, (size,), that codes of zero represent."""
        middle = 0.5 - 2.0 ** (self.bits - 1)
        means = self._split(self.mean)
        return [
            mean + middle[own] @ inverse
            for mean, own, inverse in zip(means, self._axis_positions, self._inverse_projections, strict=True)
        ]

    def _spread(self, size: int) -> Tensor:
        """Expand `scale` to the numbers of a block, which has K of its heads first, then V."""
        return self.scale.repeat_interleave(size // 2)

    def to(self, device: torch.device) -> SegmentBasis:
        if self.mean.device == device:
            return self  # keeps the cached matrices
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        blocks = tuple(block.to(device) for block in moved.pop("blocks"))
        return SegmentBasis(blocks=blocks, **{name: tensor.to(device) for name, tensor in moved.items()})


@dataclass(frozen=True)
class PCACodec:
    """Codec with at most `bits` per number on average. Must be fitted before encoding; its encoded size is known before
    fitting."""

    name: str
    bits: float
    bases: Mapping[tuple[str, int], SegmentBasis] = field(default_factory=dict)
    """Bases by layer name and segment index."""
    _bases_by_device: dict[torch.device, dict[tuple[str, int], SegmentBasis]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """Copies of the bases on other devices, with their cached matrices."""

    def parts(self, layer: LayerSpec) -> dict[str, Part]:
        return {"codes": Part((layer.tokens, self._token_bytes(layer)), torch.uint8)}

    def fitted(self, spec: KVSpec, samples: Sequence[PrefixKV]) -> PCACodec:
        """Fit a basis to each segment. samples: batches of a few dozen prefixes. Deterministic."""
        bases = {}
        for i, layer in enumerate(spec.layers):
            kept = [
                _tokens(prefix.layers[i], layer, spec.rope, prefix.valid if layer.holds_text else None)
                for prefix in samples
            ]
            for index, segment in enumerate(zip(*kept, strict=True)):
                bases[layer.name, index] = _fit(torch.cat(segment), _block_sizes(layer), self._token_bytes(layer))
        return dataclasses.replace(self, bases=bases)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of all bases, for `restored`."""
        return {
            f"{layer}/{index}/{name}": tensor
            for (layer, index), basis in self.bases.items()
            for name, tensor in _tensors(basis)
        }

    def restored(self, spec: KVSpec, state: Mapping[str, Tensor]) -> PCACodec:
        """Return the codec with the bases of this state."""
        bases = {}
        for layer in spec.layers:
            for index in range(len(layer.segments)):
                prefix = f"{layer.name}/{index}/"
                found = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
                blocks = sum(name.startswith("block.") for name in found)
                bases[layer.name, index] = SegmentBasis(
                    blocks=tuple(found[f"block.{i}"] for i in range(blocks)),
                    **{name: found[name] for name in ("mean", "scale", "order", "bits", "step")},
                )
        return dataclasses.replace(self, bases=bases)

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        segments = self._of(layer, kv.k.device)
        packed = []
        for row in _rows(kv, layer, rope):  # one by one: a matrix product of another shape may round differently
            parts = [_pack(basis.codes(x), basis.bits) for basis, x in zip(segments, row, strict=True)]
            packed.append(torch.cat(parts))
        return {"codes": torch.stack(packed)}

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        codes = stored["codes"]
        shape = (len(codes), layer.tokens, layer.kv_heads, layer.head_dim)
        k, v = (torch.empty(shape, device=codes.device) for _ in range(2))
        tokens = [s.tokens for s in layer.segments]
        pieces = zip(*(torch.split(x, tokens, dim=1) for x in (codes, k, v)), strict=True)
        for basis, (piece, k_piece, v_piece) in zip(self._of(layer, codes.device), pieces, strict=True):
            numbers = basis.numbers(_unpack(piece, basis.bits).flatten(0, 1))
            first = 0
            for block in numbers:
                halves = block.reshape(len(codes), piece.shape[1], 2, -1, layer.head_dim)
                heads = slice(first, first + halves.shape[3])
                k_piece[:, :, heads], v_piece[:, :, heads] = halves[:, :, 0], halves[:, :, 1]
                first = heads.stop
        ids = None if rope is None else layer_ids(layer)
        return LayerKV(k if ids is None or rope is None else rotate_keys(k, ids, rope), v)

    def _of(self, layer: LayerSpec, device: torch.device) -> list[SegmentBasis]:
        bases, keys = (
            self._bases_by_device.setdefault(device, {}),
            [(layer.name, i) for i in range(len(layer.segments))],
        )
        return [bases.setdefault(key, self.bases[key].to(device)) for key in keys]

    def _token_bytes(self, layer: LayerSpec) -> int:
        return max(1, int(self.bits * 2 * layer.kv_heads * layer.head_dim / 8))


def _tensors(basis: SegmentBasis) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"block.{i}", block) for i, block in enumerate(basis.blocks))
    yield from ((name, getattr(basis, name)) for name in ("mean", "scale", "order", "bits", "step"))


def _block_sizes(layer: LayerSpec) -> list[int]:
    """Return the size of each block: K and V of as many heads as fit."""
    at_once = max(1, _BLOCK // (2 * layer.head_dim))
    sizes = [min(at_once, layer.kv_heads - first) for first in range(0, layer.kv_heads, at_once)]
    return [2 * layer.head_dim * size for size in sizes]


def _concatenate_heads(k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
    """Concatenate K and V, (..., G, D) each, to (..., 2 G D): block by block, K before V in each block."""
    counts = [size // (2 * layer.head_dim) for size in _block_sizes(layer)]
    pairs = zip(torch.split(k, counts, dim=-2), torch.split(v, counts, dim=-2), strict=True)
    return torch.cat([x.flatten(-2) for pair in pairs for x in pair], dim=-1)


def _rows(kv: LayerKV, layer: LayerSpec, rope: RopeSpec | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield the numbers of each segment, (P, C), row by row, with keys un-rotated."""
    ids = None if rope is None else layer_ids(layer)
    k = kv.k.float() if ids is None or rope is None else unrotate(kv.k, ids, rope)
    for row in _concatenate_heads(k, kv.v.float(), layer):
        yield torch.split(row, [s.tokens for s in layer.segments])


def _tokens(kv: LayerKV, layer: LayerSpec, rope: RopeSpec | None, valid: Tensor | None) -> list[Tensor]:
    """Return for each segment the numbers of all tokens that are not padding, (tokens, C)."""
    sizes = [s.tokens for s in layer.segments]
    seen = torch.ones(kv.k.shape[:2], dtype=torch.bool) if valid is None else valid.cpu()
    rows = [
        [x.cpu()[mask] for x, mask in zip(row, torch.split(valid_row, sizes), strict=True)]
        for row, valid_row in zip(_rows(kv, layer, rope), seen, strict=True)
    ]
    return [torch.cat(pieces) for pieces in zip(*rows, strict=True)]


def _fit(x: Tensor, sizes: Sequence[int], token_bytes: int) -> SegmentBasis:
    """Fit a basis to x, (tokens, C), where C is the sum of sizes."""
    mean = x.mean(0)
    scale = torch.stack([_rms_of_half(x - mean, sizes, half) for half in (0, 1)])
    spread = torch.cat([scale.repeat_interleave(size // 2) for size in sizes])
    parts = torch.split((x - mean) / spread, list(sizes), dim=1)
    blocks = tuple(torch.linalg.eigh(part.double().T @ part.double())[1].half() for part in parts)
    turned = torch.cat([part @ block.float() for part, block in zip(parts, blocks, strict=True)], dim=1)
    order = turned.square().mean(0).argsort(descending=True, stable=True)
    steps, errors = _choose_steps(_evenly_spaced(turned, _SAMPLE)[:, order])
    bits = _allocate_bits(errors, token_bytes)
    widest_first = bits.argsort(descending=True, stable=True)
    kept = widest_first[: int((bits > 0).sum())]
    return SegmentBasis(mean, scale, blocks, order[kept], bits[kept], steps[bits[kept], kept])


def _evenly_spaced(x: Tensor, count: int) -> Tensor:
    """Return at most `count` of the rows, evenly spaced."""
    return x[torch.linspace(0, len(x) - 1, min(count, len(x))).long()]


def _rms_of_half(x: Tensor, sizes: Sequence[int], half: int) -> Tensor:
    """Return the root mean square of K (half 0) or V (half 1) over all blocks."""
    parts = [part.chunk(2, dim=1)[half] for part in torch.split(x, list(sizes), dim=1)]
    return torch.cat(parts, dim=1).square().mean().sqrt().clamp(min=_MIN_STEP)


def _choose_steps(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return for 0 to 8 bits the best step on this sample and its error, (bits, C) each."""
    deviation = y.square().mean(0).sqrt()
    steps, errors = [torch.zeros_like(deviation)], [y.square().mean(0)]
    for bits, gaussian in enumerate(_GAUSSIAN_STEPS, start=1):
        tried = (gaussian * deviation * torch.tensor(_WIDENINGS)[:, None]).clamp(min=_MIN_STEP)
        found = torch.stack([_quantization_error(y, step, bits) for step in tried])
        best = found.argmin(0, keepdim=True)
        steps.append(tried.gather(0, best)[0])
        errors.append(found.gather(0, best)[0])
    return torch.stack(steps), torch.stack(errors)


def _quantization_error(y: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the mean squared error of each column of y, (C,)."""
    half = 2 ** (bits - 1)
    quantized = ((y / step).floor().clamp(-half, half - 1) + 0.5) * step
    return (quantized - y).square().mean(0)


def _allocate_bits(errors: Tensor, token_bytes: int) -> Tensor:
    """Return the number of bits of each axis, (C,), which fill `token_bytes`.

    errors: (bits, C) squared error of each axis by its number of bits, axes by falling variance.
    """
    count = errors.shape[1] // _GROUP
    group_errors = errors[:, : count * _GROUP].reshape(len(errors), count, _GROUP).sum(2)
    bits, groups = torch.zeros(count, dtype=torch.long), torch.arange(count)
    # One more bit for a group of eight axes costs one byte per token. Greedy allocation is optimal if each further bit
    # of an axis gains less than the one before it.
    for _ in range(min(token_bytes, _MAX_BITS * count)):
        gain = group_errors[bits, groups] - group_errors[(bits + 1).clamp(max=_MAX_BITS), groups]
        bits[gain.masked_fill(bits == _MAX_BITS, -torch.inf).argmax()] += 1
    # axes that do not fill a group get no bits
    return torch.cat([bits.repeat_interleave(_GROUP), bits.new_zeros(errors.shape[1] - count * _GROUP)])


def _plane_sizes(bits: Tensor) -> list[int]:
    """Return the number of axes in each bit plane: those with at least one bit, at least two, ..."""
    return [int((bits > plane).sum()) for plane in range(int(bits.max()) if len(bits) else 0)]


def _pack(codes: Tensor, bits: Tensor) -> Tensor:
    """Pack (P, A) uint8 -> (P, bytes): plane after plane, eight axes per byte, the first in the lowest bit."""
    planes = [(codes[:, :count] >> plane) & 1 for plane, count in enumerate(_plane_sizes(bits))]
    eights = torch.cat(planes, dim=1).reshape(len(codes), -1, 8)
    return (eights << _bit_numbers(codes)).sum(2, dtype=torch.uint8)


def _unpack(stored: Tensor, bits: Tensor) -> Tensor:
    """Unpack (N, P, bytes) -> (N, P, A) uint8."""
    counts = _plane_sizes(bits)
    codes = torch.zeros((*stored.shape[:2], len(bits)), dtype=torch.uint8, device=stored.device)
    ends = accumulate(count // 8 for count in counts)
    for plane, (count, end) in enumerate(zip(counts, ends, strict=True)):
        eights = (stored[..., end - count // 8 : end, None] >> _bit_numbers(stored)) & 1
        codes[..., :count] |= eights.flatten(-2) << plane
    return codes


def _bit_numbers(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


PCA2 = PCACodec("pca2", 1.875)
PCA1 = PCACodec("pca1", 0.9375)
"""Slightly less than one bit, so that a row with its index takes at most a sixteenth of bf16."""
PCA_HALF = PCACodec("pca0.5", 0.46875)
