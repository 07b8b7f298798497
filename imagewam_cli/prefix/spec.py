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
Quantization = Literal["none", "int8", "nf4"]
RoundingName = Literal["exact", "published-bf16"]
"""Name of an `imagewam_cli.prefix.rounding.Rounding`."""


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """Rotary position ids of a segment's tokens. Padding has ids too."""

    origin: tuple[float, ...]
    """Ids of the first token, one per rope axis."""
    moves: tuple[tuple[int, ...], ...]
    """Axes along which the id grows by `step`. With a grid: the axes of each row, then those of each column. Without
    one: the axes of each token; none if all tokens have the same ids."""
    step: float = 1.0

    def __post_init__(self) -> None:
        if any(not 0 <= axis < len(self.origin) for axes in self.moves for axis in axes):
            raise ValueError(f"positions move along the axes {self.moves}, but there are {len(self.origin)} axes")

    def ids(self, sizes: tuple[int, ...]) -> Float32Array:
        """Return the ids of every token, (tokens, axes). sizes: (rows, columns) of a grid, or (tokens,)."""
        import numpy as np

        moves = np.zeros((len(self.moves), len(self.origin)), np.float32)
        for row, axes in zip(moves, self.moves, strict=True):
            row[list(axes)] = self.step
        indices = np.indices(sizes, np.float32).reshape(len(sizes), -1).T
        return indices @ moves + np.array(self.origin, np.float32)


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """A run of consecutive tokens of one kind."""

    name: Segment
    tokens: int
    grid: tuple[int, int] | None = None
    """(rows, columns) of a picture's tokens, row by row; None for text."""
    extent: tuple[float, float] | None = None
    """(height, width) of the picture in tokens, if the last row or column extends beyond its edge; None: the grid."""
    positions: TokenPositions | None = None
    """None if the editor has no rotary positions, or its plugin does not give them."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid[0] * self.grid[1] != self.tokens:
            raise ValueError(
                f"segment {self.name}: grid {self.grid} has {self.grid[0] * self.grid[1]} cells, "
                f"but the segment has {self.tokens} tokens"
            )
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
        """Rotary ids of each token, (tokens, axes); None if unknown."""
        return None if self.positions is None else self.positions.ids(self.grid or (self.tokens,))


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One attention layer: its heads, and the segments of its keys and values, in the order of the tokens.

    All layers of a joint transformer hold the same segments. A UNet's self-attention holds the target at the layer's
    own resolution, its cross-attention the text.
    """

    name: str
    block: BlockKind
    """Structure of the expert's block for this layer: `sequential`, attention then MLP, or `parallel`, both at once."""
    heads: int
    kv_heads: int
    head_dim: int
    segments: tuple[SegmentSpec, ...]
    by_instruction: bool = False
    """Whether K and V do not depend on the picture, as in a cross-attention to the text. A cache stores them once per
    instruction."""

    def __post_init__(self) -> None:
        if self.by_instruction and self.holds_pictures:
            raise ValueError(f"layer {self.name} holds a picture, so it cannot be `by_instruction`")

    @property
    def tokens(self) -> int:
        """Number of tokens per row, padding included."""
        return sum(s.tokens for s in self.segments)

    @property
    def holds_text(self) -> bool:
        """Whether some of its tokens are text, which can be padding."""
        return any(s.name == "text" for s in self.segments)

    @property
    def holds_pictures(self) -> bool:
        """Whether some of its tokens belong to a picture."""
        return any(s.grid for s in self.segments)

    @property
    def numbers_per_row(self) -> int:
        """Number of values in K and V of one row."""
        return 2 * self.tokens * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotation of the editor's keys, so that the queries of actions can be rotated in the same way."""

    axes: tuple[int, ...]
    """Number of channels of each head that each position axis rotates."""
    theta: float
    action_axis: int
    """Axis along which actions are counted."""
    action_ids: tuple[int, ...]
    """Ids of an action on every axis; the id on `action_axis` is replaced with the action's number."""
    rounding: RoundingName = "exact"
    """Rounding of the angles of the editor's keys."""

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.action_ids) or any(a % 2 for a in self.axes):
            raise ValueError(f"rope axes {self.axes} must be even numbers, one per action id of {self.action_ids}")


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """Complete layout of a prefix: what a reader or an expert needs to know."""

    mode: Mode
    timestep: float
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec | None
    text_padding: TextPadding
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """(height, width) of the composed picture that the editor sees."""
    prompt_template: str

    def __post_init__(self) -> None:
        widths = {layer.tokens for layer in self.layers if layer.holds_text}
        if len(widths) > 1:
            raise ValueError(f"layers that hold text must have the same number of tokens, got {sorted(widths)}")
        axes = 0 if self.rope is None else len(self.rope.axes)
        for segment in (s for layer in self.layers for s in layer.segments if s.positions is not None):
            assert segment.positions is not None
            if len(segment.positions.origin) != axes:
                raise ValueError(
                    f"segment {segment.name} has positions on {len(segment.positions.origin)} axes, "
                    f"but the rope has {axes}"
                )

    @property
    def valid_tokens(self) -> int:
        """Width of `PrefixKV.valid`: number of tokens of the layers that hold text; 0 if none does."""
        return max((layer.tokens for layer in self.layers if layer.holds_text), default=0)

    @property
    def valid_by_instruction(self) -> bool:
        """Whether every layer that holds text is `by_instruction`, so that `valid` is stored once per instruction."""
        return all(layer.by_instruction for layer in self.layers if layer.holds_text)

    def bytes_per_row(self, bytes_per_number: int) -> int:
        """Return the bytes of K and V of one row in all layers."""
        return bytes_per_number * sum(layer.numbers_per_row for layer in self.layers)


def select_layers(choice: str, count: int) -> tuple[int, ...]:
    """Return the indices chosen by `all`, `every:N`, or a list like `0,4,9`, in ascending order.

    Raises:
        ValueError: the choice has a different form, or an index is out of range.
    """
    try:
        if choice == "all":
            chosen = tuple(range(count))
        elif choice.startswith("every:"):
            step = max(0, int(choice.removeprefix("every:")))
            chosen = tuple(range(0, count, step))  # raises ValueError for step 0
        else:
            chosen = tuple(sorted({int(part) for part in choice.split(",")}))
    except ValueError:
        raise ValueError(f"layers must be 'all', 'every:N' or a list like '0,4,9', N from 1, got {choice!r}") from None
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"layers {choice!r}: the editor has layers 0 to {count - 1}")
    return chosen
