"""The contract of an editor: pictures and instructions in, prefix keys and values out.

An editor knows how its pipeline prepares inputs, which layers count and which tokens are which. It knows nothing of
actions, caches or training. A plugin's entry names a subclass of `Editor`. Importing this module imports no torch.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from imagewam_cli.config import to_dict
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.settings import PrefixOptions, PrefixSettings
from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.spec import KVSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imagewam_cli.data.types import UInt8Image
    from imagewam_cli.hookspecs import EditorEntry
    from imagewam_cli.prefix.kv import PrefixKV


TokenPlacement = Literal["packed", "appended"]
"""packed: directly after the valid text, in front of the padding. appended: after the padding."""
TYPICAL_TEXT = 32
"""Number of text tokens that is assumed for an instruction whose length is unknown."""


@dataclass(frozen=True, kw_only=True)
class WeightsIdentity:
    """Which weights an editor runs on: the resolved revision if they came from the Hub, and their digest."""

    revision: str | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TextToken:
    """One more text token for each row, for `Editor.encode_with`.

    vectors: (B, D), as wide as the text states; text_tokens: the text before it is cut or padded to so many tokens,
    which decides where an appended token stands.
    """

    vectors: torch.Tensor
    placement: TokenPlacement
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class PrefixGraph:
    """An editor's prefix as a graph that can be traced, and how its inputs are made without the editor's code.

    Text: `before + instruction + after` is tokenized, cut at `max_tokens` and padded at the end with `pad_id`.
    Picture: each camera is resized (bilinear) to an equal share of the width, they stand side by side, and 0..255
    becomes -1..1.
    """

    module: nn.Module
    """forward(image float32 (B, 3, H, W), token_ids int64 (B, L), token_valid bool (B, L)) -> ([valid,] k_0, v_0, ...):
    what `Editor.encode` gives, `valid` where a layer holds text, invalid tokens zeroed, for any B and L. No branch may
    depend on a value."""
    tokenizer: str
    """JSON that `tokenizers.Tokenizer.from_str` reads."""
    before: str
    after: str
    pad_id: int
    max_tokens: int
    pad_to: int | None
    """Every row has this many tokens; None: as many as the longest row of the batch."""
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """(height, width) of the whole picture."""
    grey: int | None
    """Every pixel has this value instead, where the editor is to see nothing."""


class ReleaseNames(Protocol):
    """A family's weights by the names of their release, and by those of its diffusers class."""

    def from_release(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Released names -> diffusers' state dict; names that are not known keep theirs."""
        ...

    def to_release(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `from_release`."""
        ...

    def sizes(self, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """What tells one size of the model from another ("double blocks": 5), from released names."""
        ...


class Editor(abc.ABC):
    """An editor ready to encode. `load` reads the weights; `spec` and `settings` are fixed from then on.

    A class may serve several entries (sizes of one family). It is used through a subclass bound to one of them, which
    `imagewam_cli.editors.installed` makes, so every method finds its entry in `cls.entry`.
    """

    entry: EditorEntry
    settings: PrefixSettings
    embedded: ClassVar[Path | None] = None
    """Folder of the weights that ship with the plugin, if any do."""

    @classmethod
    def bound_to(cls, entry: EditorEntry) -> type[Self]:
        """Return a subclass whose `entry` is this one."""
        names = {"entry": entry, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        return type(cls.__name__, (cls,), names)

    @classmethod
    @abc.abstractmethod
    def load(
        cls,
        options: PrefixOptions,
        *,
        instructions: Sequence[str],
        weights: Path | None = None,
        hardware: Hardware = CPU,
        tuned: Path | None = None,
    ) -> Self:
        """The editor, ready to encode.

        instructions: those that a cache will hold, so that text is padded to the longest of them and no further; empty
            for a live policy, whose text may have any length.
        weights: a pipeline folder instead of what came with the plugin or was fetched.
        tuned: a folder with parts of the pipeline that stand in place of those, as a denoiser that was trained on.

        Raises:
            EditorError: weights missing or unfit, with the `imagewam fetch` to run.
            UsageError: a setting that the architecture does not allow, or hardware that is not there, with the reason.
        """

    @classmethod  # noqa: B027 - an editor without files has nothing to look for
    def require_weights(cls, weights: Path | None = None) -> None:
        """Look whether `load` will find weights, before anything is computed for it.

        Raises:
            EditorError: as `load`.
        """

    @classmethod
    def describe(cls, options: PrefixOptions) -> KVSpec | None:
        """The layout without weights, from the entry alone; None where that does not tell it. Text that is trimmed to
        the instructions counts as `TYPICAL_TEXT` tokens.

        Raises:
            UsageError: as `load`.
        """
        return None

    @classmethod
    def memory_bytes(cls, *, acting: bool = False) -> int | None:
        """What the weights take at most at one time, in the editor's own dtype; None where that is not known.

        acting: in a live policy, which may be told anything; else while caching, with all instructions known.
        """
        return None

    @property
    @abc.abstractmethod
    def spec(self) -> KVSpec:
        """The layout of what `encode` returns; the text segment has room for the longest instruction announced."""

    @property
    @abc.abstractmethod
    def weights(self) -> WeightsIdentity:
        """Which weights are loaded."""

    @abc.abstractmethod
    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        """Prefix KV of B rows, as `spec` says. A pure function of pictures, instruction, weights and settings.

        images: per row, camera -> uint8 (H, W, 3), with every camera of `settings.cameras`.
        """

    def encode_with(
        self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str], token: TextToken
    ) -> PrefixKV:
        """`encode` with one more token in each row's text. For live policies only: what feeds the token then decides K
        and V too, so that no cache can hold them.

        Raises:
            UsageError: this editor's text takes no more tokens.
        """
        raise UsageError(f"{self.entry.name} takes no token beside its text", "see `imagewam editors`")

    def prefix_graph(self) -> PrefixGraph | None:
        """`encode` as a graph for exporters; None where the editor has none.

        Raises:
            ExportError: the settings or the tokenizer cannot be expressed.
        """
        return None

    @classmethod
    def released_weights(cls, weights: Path | None = None) -> dict[str, torch.Tensor]:
        """The denoiser's weights by the names of its family's release, which published experts share.

        weights: as in `load`.

        Raises:
            UsageError: released names are not known for this editor.
            EditorError: weights missing or damaged.
        """
        raise UsageError(f"the released names of {cls.entry.name}'s weights are not known", "see `imagewam editors`")

    @classmethod
    def write_released(
        cls, released: Mapping[str, torch.Tensor], out: Path, *, weights: Path | None = None
    ) -> dict[str, int]:
        """Write a denoiser, given by released names, as a part of the pipeline folder `out`: a `tuned` of `load`.

        weights: as in `load`; its sizes must be the same. Returns what tells one size of the family from another.

        Raises:
            UsageError: as `released_weights`.
            EditorError: another size (both numbers are named), a name that is missing, unknown or of another shape.
        """
        raise UsageError(f"the released names of {cls.entry.name}'s weights are not known", "see `imagewam editors`")

    def fingerprint(self) -> dict[str, object]:
        """What decides the numbers in a cache: editor, weights, settings. Two that are equal but for `revision`, which
        only says where the weights came from, give interchangeable prefixes."""
        return {
            "editor": self.entry.name,
            "weights": self.weights.sha256,
            "revision": self.weights.revision,
            "settings": to_dict(self.settings),
            "prompt_template": self.settings.prompt_template or self.entry.prompt_template,
        }
