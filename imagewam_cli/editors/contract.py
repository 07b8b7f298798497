"""The contract of an editor: pictures and instructions in, prefix keys and values out.

An editor knows how its pipeline prepares inputs, which attention layers exist, and which tokens they hold. It does
not know about actions, caches or training. A plugin's entry names a subclass of `Editor`. Importing this module
imports no torch.
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
    """Weights that an editor runs on."""

    revision: str | None
    """Commit on the Hub; None if the weights are not from the Hub."""
    sha256: str
    """Digest of the files that are used."""
    former: str | None = None
    """Digest as older versions computed it, if the folder has weights that are not used; else None."""


@dataclass(frozen=True, kw_only=True)
class TextToken:
    """One more text token per row, for `Editor.encode_with`."""

    vectors: torch.Tensor
    """(B, D), as wide as the text states."""
    placement: TokenPlacement
    text_tokens: int
    """Length to which the text is truncated or padded before the token is added; it determines the position of an
    appended token."""


@dataclass(frozen=True, kw_only=True)
class PrefixGraph:
    """A traceable graph of an editor's prefix, and how to prepare its inputs without the editor's code.

    Text: tokenize `before + instruction + after`, truncate it to `max_tokens`, and pad it at the end with `pad_id`.
    Picture: resize each camera (bilinear) to an equal share of the width, put them side by side, and map 0..255 to
    -1..1.
    """

    module: nn.Module
    """forward(image float32 (B, 3, H, W), token_ids int64 (B, L), token_valid bool (B, L)) -> ([valid,] k_0, v_0, ...).

    The outputs equal those of `Editor.encode` for any B and L. `valid` comes first if a layer holds text; K and V are
    zero at invalid tokens. No branch may depend on a tensor's values."""
    tokenizer: str
    """JSON for `tokenizers.Tokenizer.from_str`."""
    before: str
    after: str
    pad_id: int
    max_tokens: int
    pad_to: int | None
    """Number of tokens to which every row is padded; None: the longest row of the batch."""
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """(height, width) of the composed picture."""
    grey: int | None
    """Value of every pixel of a blank picture, for `blank_images`; None: the graph uses the pictures."""


class ReleaseNames(Protocol):
    """Conversion of a family's weights between the names of their release and those of its diffusers class."""

    def from_release(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return diffusers' state dict. Unknown names are kept as they are."""
        ...

    def to_release(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights under their released names, the inverse of `from_release`."""
        ...

    def sizes(self, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the dimensions that differ between sizes of the model, such as "double blocks": 5.

        weights: under their released names.
        """
        ...


class Editor(abc.ABC):
    """An editor ready to encode. `load` reads the weights; `spec` and `settings` are fixed from then on.

    A class may serve several entries (sizes of one family). It is used through a subclass bound to one of them, which
    `imagewam_cli.editors.installed` makes, so every method finds its entry in `cls.entry`.
    """

    entry: EditorEntry
    settings: PrefixSettings
    embedded: ClassVar[Path | None] = None
    """Folder of the weights that ship with the plugin; None if the plugin ships none."""

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
        """Load the editor, ready to encode.

        instructions: all instructions of a cache, so that text is padded to the longest of them; empty for a live
            policy, whose text may have any length.
        weights: a pipeline folder, instead of the embedded or downloaded one.
        tuned: a folder with parts of the pipeline that replace those of `weights`, such as a fine-tuned denoiser.

        Raises:
            EditorError: the weights are missing or do not fit; the hint names the `imagewam fetch` to run.
            UsageError: the editor does not offer an option, or this machine lacks the hardware.
        """

    @classmethod  # noqa: B027 - an editor without files needs no check
    def require_weights(cls, weights: Path | None = None) -> None:
        """Check that `load` will find its weights.

        Raises:
            EditorError: as `load`.
        """

    @classmethod
    def describe(cls, options: PrefixOptions) -> KVSpec | None:
        """Return the layout, computed from the entry without weights; None if the entry does not determine it.

        Trimmed text counts as `TYPICAL_TEXT` tokens.

        Raises:
            UsageError: as `load`.
        """
        return None

    @classmethod
    def memory_bytes(cls, *, acting: bool = False) -> int | None:
        """Return the peak memory of the weights, in the editor's own dtype; None if unknown.

        acting: in a live policy, which takes any instruction; otherwise while caching known instructions.
        """
        return None

    @property
    @abc.abstractmethod
    def spec(self) -> KVSpec:
        """Layout of what `encode` returns. Its text segment is as long as the longest of `load`'s instructions."""

    @property
    @abc.abstractmethod
    def weights(self) -> WeightsIdentity:
        """Identity of the loaded weights."""

    @abc.abstractmethod
    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        """Return the prefix KV of B rows, in the layout of `spec`: a pure function of pictures, instructions, weights
        and settings.

        images: for each row, camera -> uint8 (H, W, 3), with every camera of `settings.cameras`.
        """

    def encode_with(
        self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str], token: TextToken
    ) -> PrefixKV:
        """Encode with one more token in each row's text.

        Only for live policies: K and V then depend on whatever feeds the token, so they cannot be cached.

        Raises:
            UsageError: this editor cannot add tokens to its text.
        """
        raise UsageError(
            f"{self.entry.name} cannot add a token to its text",
            "choose a different editor; `imagewam editors` lists them",
        )

    def prefix_graph(self) -> PrefixGraph | None:
        """Return `encode` as a graph for exporters; None if the editor has no graph.

        Raises:
            ExportError: a graph cannot express the settings or the tokenizer.
        """
        return None

    @classmethod
    def released_weights(cls, weights: Path | None = None) -> dict[str, torch.Tensor]:
        """Return the denoiser's weights under the names of its family's release, which published experts share.

        weights: as in `load`.

        Raises:
            UsageError: this editor has no released names.
            EditorError: the weights are missing or damaged.
        """
        raise _no_released_names(cls.entry.name)

    @classmethod
    def write_released(
        cls, released: Mapping[str, torch.Tensor], out: Path, *, weights: Path | None = None
    ) -> dict[str, int]:
        """Write a denoiser's weights, given under their released names, to the pipeline folder `out`, which
        `load` takes as `tuned`.

        weights: as in `load`; its denoiser must have the same size. Returns the dimensions of `ReleaseNames.sizes`.

        Raises:
            UsageError: as `released_weights`.
            EditorError: the denoiser has a different size, or a tensor is missing, unknown or of a different shape.
        """
        raise _no_released_names(cls.entry.name)

    def fingerprint(self) -> dict[str, object]:
        """Return what determines the numbers in a cache: editor, weights, settings.

        Fingerprints that differ only in `revision`, the origin of the weights, belong to interchangeable prefixes.
        `weights_former` is `WeightsIdentity.former`, if there is one.
        """
        former = {} if self.weights.former is None else {"weights_former": self.weights.former}
        return former | {
            "editor": self.entry.name,
            "weights": self.weights.sha256,
            "revision": self.weights.revision,
            "settings": to_dict(self.settings),
            "prompt_template": self.settings.prompt_template or self.entry.prompt_template,
        }


def _no_released_names(editor: str) -> UsageError:
    return UsageError(
        f"{editor} has no released names for its weights",
        "choose an editor of a published policy, such as flux2-klein-4b",
    )
