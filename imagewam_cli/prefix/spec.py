"""The layout of an editor's prefix KV: layers, tokens, positions, bytes.

Plain data. It can be computed without weights, and importing this module imports neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Float32Array = npt.NDArray[np.float32]

Mode = Literal["prefix", "denoise"]
BlockKind = Literal["sequential", "parallel"]
Segment = Literal["text", "reference", "target"]
TextPadding = Literal["trim", "keep"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]
RoundingName = Literal["exact", "published-bf16"]
"""Name of an `imagewam_cli.prefix.rounding.Rounding`."""


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """Where the tokens of a segment stand under the editor's rotary positions: ids by place, padding included.

    origin: ids of the first token, one for each rope axis. moves: in a segment with a grid the axes along which the id
    grows by `step` with each row, then those for each column; in one without, the axes along which it grows with each
    token, none where all tokens have the same ids.
    """

    origin: tuple[float, ...]
    moves: tuple[tuple[int, ...], ...]
    step: float = 1.0

    def __post_init__(self) -> None:
        if any(not 0 <= axis < len(self.origin) for axes in self.moves for axis in axes):
            raise ValueError(f"positions move along {self.moves}, and there are {len(self.origin)} axes")

    def ids(self, sizes: tuple[int, ...]) -> Float32Array:
        """Return the ids of every token, (tokens, axes). sizes: (rows, columns) of a grid, or (tokens,)."""
        import numpy as np

        moves = np.zeros((len(self.moves), len(self.origin)), np.float32)
        for row, axes in zip(moves, self.moves, strict=True):
            row[list(axes)] = self.step
        places = np.indices(sizes, np.float32).reshape(len(sizes), -1).T
        return places @ moves + np.array(self.origin, np.float32)


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """A run of consecutive tokens of one kind."""

    name: Segment
    tokens: int
    grid: tuple[int, int] | None = None
    """(rows, columns) of the tokens of a picture, row by row; None where tokens have no place in one."""
    extent: tuple[float, float] | None = None
    """(height, width) of the picture in tokens, where the last row or column reaches over its edge; None: as the
    grid."""
    positions: TokenPositions | None = None
    """None where the editor has no rotary positions or its plugin does not tell them."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid[0] * self.grid[1] != self.tokens:
            raise ValueError(f"segment {self.name}: a grid {self.grid} does not hold {self.tokens} tokens")
        if self.extent is not None and (
            self.grid is None or any(not n - 1 < e <= n for n, e in zip(self.grid, self.extent, strict=True))
        ):
            raise ValueError(f"segment {self.name}: a picture of {self.extent} tokens does not fill a grid {self.grid}")
        if self.positions is not None and len(self.positions.moves) != (1 if self.grid is None else 2):
            raise ValueError(
                f"segment {self.name}: positions move along {self.positions.moves}, which does not fit a "
                + ("row of tokens" if self.grid is None else "grid")
            )

    @property
    def position_ids(self) -> Float32Array | None:
        """Rotary ids of each token, (tokens, axes); None where they are not known."""
        return None if self.positions is None else self.positions.ids(self.grid or (self.tokens,))


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One attention layer: its heads, and the segments that its keys and values come from, in the order of the tokens.

    Layers of a joint transformer all hold the same segments. A UNet's self-attention holds the target at the layer's
    own resolution, its cross-attention the text. `block` says how the expert's block beside it is built: attention
    then MLP, or both at once.
    """

    name: str
    block: BlockKind
    heads: int
    kv_heads: int
    head_dim: int
    segments: tuple[SegmentSpec, ...]
    by_instruction: bool = False
    """K and V are the same for every picture, as in a cross-attention to the text: stored once per instruction."""

    def __post_init__(self) -> None:
        if self.by_instruction and self.holds_pictures:
            raise ValueError(f"layer {self.name} cannot follow from the instruction alone: it holds a picture")

    @property
    def tokens(self) -> int:
        """Per row, padding included."""
        return sum(s.tokens for s in self.segments)

    @property
    def holds_text(self) -> bool:
        """Whether some of its tokens can be padding, since instructions differ in length."""
        return any(s.name == "text" for s in self.segments)

    @property
    def holds_pictures(self) -> bool:
        """Whether some of its tokens have a place in a picture."""
        return any(s.grid for s in self.segments)

    @property
    def numbers_per_row(self) -> int:
        """Numbers that K and V of one row hold."""
        return 2 * self.tokens * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """How the editor rotates keys, so that action queries can be rotated alike.

    axes: numbers of each head that each position axis rotates; action_axis: the axis along which actions count;
    action_ids: the constant ids of an action on the other axes; rounding: of the angles of the editor's keys.
    """

    axes: tuple[int, ...]
    theta: float
    action_axis: int
    action_ids: tuple[int, ...]
    rounding: RoundingName = "exact"

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.action_ids) or any(a % 2 for a in self.axes):
            raise ValueError(f"rope axes {self.axes} must be even and as many as action_ids {self.action_ids}")


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """Everything a reader or an expert must know of a prefix."""

    mode: Mode
    timestep: float
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec | None
    text_padding: TextPadding
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """(height, width) of the picture that the editor sees."""
    prompt_template: str

    def __post_init__(self) -> None:
        widths = {layer.tokens for layer in self.layers if layer.holds_text}
        if len(widths) > 1:
            raise ValueError(f"layers that hold text must have equally many tokens, not {sorted(widths)}")
        axes = 0 if self.rope is None else len(self.rope.axes)
        for segment in (s for layer in self.layers for s in layer.segments if s.positions is not None):
            assert segment.positions is not None
            if len(segment.positions.origin) != axes:
                raise ValueError(
                    f"segment {segment.name} has positions on {len(segment.positions.origin)} axes, the rope has {axes}"
                )

    @property
    def valid_tokens(self) -> int:
        """Width of `PrefixKV.valid`: the tokens of each layer that holds text; 0 where none does."""
        return max((layer.tokens for layer in self.layers if layer.holds_text), default=0)

    @property
    def valid_by_instruction(self) -> bool:
        """Whether `valid` belongs to layers of the instruction alone."""
        return all(layer.by_instruction for layer in self.layers if layer.holds_text)

    def bytes_per_row(self, bytes_per_number: int) -> int:
        """Bytes of K and V of one row, all layers."""
        return bytes_per_number * sum(layer.numbers_per_row for layer in self.layers)


def select_layers(choice: str, count: int) -> tuple[int, ...]:
    """Indices chosen by `all`, `every:N`, or a list like `0,4,9`.

    Raises:
        ValueError: not of that form, or an index out of range.
    """
    try:
        if choice == "all":
            chosen = tuple(range(count))
        elif choice.startswith("every:"):
            step = max(0, int(choice.removeprefix("every:")))
            chosen = tuple(range(0, count, step))  # 0 is a ValueError too
        else:
            chosen = tuple(sorted({int(part) for part in choice.split(",")}))
    except ValueError:
        raise ValueError(f"layers must be 'all', 'every:N' or a list like '0,4,9', N from 1, got {choice!r}") from None
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"layers {choice!r}: the editor has layers 0 to {count - 1}")
    return chosen
