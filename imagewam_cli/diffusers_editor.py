"""`DiffusersEditor`: an editor on a diffusers pipeline folder, except for what makes its family a family.

A subclass says which parts it loads, which attention layers there are and what they hold, how one instruction becomes
text states, and how pictures and text become one forward of the denoiser. Everything else is here: settings, tiling of
cameras, text computed once per instruction, recording, choice of layers and segments, identity of the weights.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from imagewam_cli.capture import LayerKV, record
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editor import Editor, PrefixKV, PrefixSettings, WeightsIdentity, resolve
from imagewam_cli.errors import DatasetError, EditorError, UsageError
from imagewam_cli.fetch import downloaded, is_read
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.kvcache.spec import KVSpec, LayerSpec, Mode, RopeSpec, Segment, SegmentSpec, select_layers

GREY = 128
"""Every pixel of a blank picture."""


@dataclass(frozen=True, kw_only=True)
class EditorDefaults:
    """What an editor is used with unless the user says otherwise, and what of it can be chosen."""

    mode: Mode
    timestep: float
    segments: tuple[Segment, ...]
    available: Mapping[Mode, tuple[Segment, ...]]
    """Mode -> the segments that its forward has."""
    text_padding: Literal["trim", "keep"]
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    camera_size: tuple[int, int]
    """(height, width) of each camera's picture."""
    multiple: int
    """Sides of a camera's picture are multiples of this many pixels."""

    def resolve(self, settings: PrefixSettings, name: str) -> PrefixSettings:
        """`settings` with every None decided, for the editor `name`.

        Raises:
            UsageError: a choice that this editor does not have, with those that it has.
        """
        settings = dataclasses.replace(settings, cameras=settings.cameras or ("top",))
        height, width = self.camera_size
        settings = resolve(
            settings,
            mode=self.mode,
            timestep=self.timestep,
            text_padding=self.text_padding,
            compute_dtype=self.compute_dtype,
            image_size=(height, width * len(settings.cameras)),
        )
        assert settings.mode is not None
        if settings.mode not in self.available:
            modes = ", ".join(self.available)
            raise UsageError(f"mode {settings.mode!r} is not available for {name}", f"use --mode {modes}")
        known = self.available[settings.mode]
        settings = resolve(settings, segments=tuple(s for s in self.segments if s in known))
        assert settings.segments is not None
        if not settings.segments:
            raise UsageError("no segment is chosen", f"choose among {', '.join(known)}")
        for segment in settings.segments:
            if segment not in known:
                raise UsageError(
                    f"mode {settings.mode!r} of {name} has no {segment} tokens",
                    f"choose segments among {', '.join(known)}",
                )
        self._check_size(settings)
        # in the order of the tokens: another order is the same prefix
        return dataclasses.replace(settings, segments=tuple(s for s in known if s in settings.segments))

    def _check_size(self, settings: PrefixSettings) -> None:
        assert settings.image_size is not None
        (height, width), count = settings.image_size, len(settings.cameras)
        step = (self.multiple, self.multiple * count)
        nearest = tuple(max(1, round(side / s)) * s for side, s in zip((height, width), step, strict=True))
        if (height, width) != nearest:
            raise UsageError(
                f"image size {height}x{width} does not split into {self.multiple}-pixel tokens for {count} camera(s)",
                f"the nearest that does is {nearest[0]}x{nearest[1]}",
            )


@dataclass(frozen=True, kw_only=True)
class Text:
    """embeds (B, L, D) and valid, bool (B, L): False where a shorter instruction was padded."""

    embeds: Tensor
    valid: Tensor


class DiffusersEditor(Editor):
    """A pipeline folder as an `Editor`. Subclasses implement the abstract methods and set the class variables; the
    `load` of their `EditorEntry` is "module:Class.load"."""

    defaults: ClassVar[EditorDefaults]
    embedded: ClassVar[Path | None] = None
    """The folder that comes with the plugin, where one does."""
    learned: ClassVar[tuple[str, ...]]
    """The parts that `random_weights` draws anew: denoiser and text encoders, not the VAE."""

    def __init__(
        self,
        entry: EditorEntry,
        settings: PrefixSettings,
        folder: Path,
        *,
        instructions: Sequence[str],
        device: str,
    ) -> None:
        self.entry = entry
        self.settings = self.defaults.resolve(settings, entry.name)
        self.device, self.dtype = torch.device(device), getattr(torch, str(self.settings.compute_dtype))
        self._folder, self._instructions = folder, frozenset(instructions)
        self._texts: dict[str, Tensor] = {}
        self.part = load_parts(folder, self.part_classes(), entry.family, device, self.dtype)
        _ = self.layer_names  # a choice of layers that do not exist is refused here, not at the first row
        if self.settings.random_weights:
            randomize([self.part[name] for name in self.learned], seed=0)

    @classmethod
    def load(
        cls,
        entry: EditorEntry,
        settings: PrefixSettings,
        *,
        instructions: Sequence[str],
        weights: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """An `imagewam_cli.editor.EditorLoader`: from `weights`, the embedded folder, or what was fetched."""
        folder = weights or cls.embedded or downloaded(entry)
        return cls(entry, settings, folder, instructions=instructions, device=device)

    @staticmethod
    @abc.abstractmethod
    def part_classes() -> Mapping[str, Any]:
        """Sub-folder of the pipeline -> the class with the `from_pretrained` that loads it."""

    @property
    @abc.abstractmethod
    def denoiser(self) -> nn.Module:
        """The model whose attention is recorded."""

    @abc.abstractmethod
    def attention_layers(self, text: int) -> tuple[LayerSpec, ...]:
        """Every attention layer in the order of the calls, with all the segments of the settings' mode, for `text` text
        tokens. From the configs alone."""

    @abc.abstractmethod
    def embed(self, prompt: str) -> Tensor:
        """Text states (L, D) of one prompt, padded as the settings say."""

    @abc.abstractmethod
    def run(self, pictures: Tensor, text: Text) -> None:
        """One forward of the denoiser. pictures: (B, 3, H, W) in [-1, 1]."""

    @property
    def rope(self) -> RopeSpec | None:
        """How the keys are rotated; None where positions are not rotary."""
        return None

    @functools.cached_property
    def spec(self) -> KVSpec:
        settings = self.settings
        assert settings.mode is not None
        assert settings.timestep is not None
        assert settings.text_padding is not None
        assert settings.image_size is not None
        return KVSpec(
            mode=settings.mode,
            timestep=settings.timestep,
            layers=tuple(
                dataclasses.replace(layer, segments=tuple(s for s in layer.segments if s.name in self._segments))
                for layer in self._kept(self._text_length)
            ),
            rope=self.rope,
            text_padding=settings.text_padding,
            cameras=settings.cameras,
            image_size=settings.image_size,
            prompt_template=self.entry.prompt_template,
        )

    @functools.cached_property
    def weights(self) -> WeightsIdentity:
        source = self.entry.repo or self.entry.name
        return WeightsIdentity(
            source=source, revision=revision(self._folder), sha256=digest(self._folder, self.part_classes())
        )

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        with torch.no_grad():
            pictures = torch.stack([self._picture(row) for row in images])
            text = self._text(instructions)
            with record(self.denoiser, self.layer_names, stop_after_last=True) as recording:
                self.run(pictures, text)
            return self.keep_segments(recording.layers, text.valid)

    @functools.cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Of the kept layers."""
        return tuple(layer.name for layer in self._kept(1))

    def keep_segments(self, recorded: Mapping[str, LayerKV], text_valid: Tensor) -> PrefixKV:
        """The wanted segments of the kept layers; what padding left is zeroed, so that equal rows are equal bytes.

        recorded: by the layers' names; text_valid: bool (B, L).
        """
        layers: list[LayerKV] = []
        valid: Tensor | None = None
        for layer in self._kept(text_valid.shape[1]):
            kv = recorded[layer.name]
            k, v = (
                self._wanted(layer, list(torch.split(x, [s.tokens for s in layer.segments], 1))) for x in (kv.k, kv.v)
            )
            if layer.holds_text and "text" in self._segments:
                other = [text_valid.new_ones(text_valid.shape[0], s.tokens) for s in layer.segments]
                masks = [text_valid if s.name == "text" else o for s, o in zip(layer.segments, other, strict=True)]
                valid = self._wanted(layer, masks)
                hidden = ~valid[:, :, None, None]
                k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
            layers.append(LayerKV(k, v))
        return PrefixKV(tuple(layers), valid)

    def _wanted(self, layer: LayerSpec, parts: list[Tensor]) -> Tensor:
        """The parts (B, tokens, ...) of the layer's wanted segments, side by side."""
        wanted = [part for s, part in zip(layer.segments, parts, strict=True) if s.name in self._segments]
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted, dim=1)

    @property
    def _segments(self) -> tuple[Segment, ...]:
        assert self.settings.segments is not None
        return self.settings.segments

    def _kept(self, text: int) -> tuple[LayerSpec, ...]:
        """The layers that hold a wanted segment, thinned as the settings say."""
        holding = [
            layer for layer in self.attention_layers(text) if any(s.name in self._segments for s in layer.segments)
        ]
        try:
            return tuple(holding[i] for i in select_layers(self.settings.layers, len(holding)))
        except ValueError as error:
            raise UsageError(str(error)) from None

    @functools.cached_property
    def _text_length(self) -> int:
        """Text tokens that a row of the announced instructions has room for."""
        return max(len(self._states(i)) for i in self._instructions or ("",))

    def _prompt(self, instruction: str) -> str:
        return self.entry.prompt_template.format(instruction=instruction)

    def _states(self, instruction: str) -> Tensor:
        """Computed once for each distinct instruction."""
        if instruction not in self._texts:
            with torch.no_grad():
                self._texts[instruction] = self.embed(self._prompt(instruction))
        return self._texts[instruction]

    def _text(self, instructions: Sequence[str]) -> Text:
        """Rows padded to the longest of them, or of the announced instructions if they are among those."""
        rows = [self._states(i) for i in instructions]
        length = self._text_length if self._instructions.issuperset(instructions) else max(len(r) for r in rows)
        embeds = torch.stack([F.pad(r, (0, 0, 0, length - len(r))) for r in rows])
        valid = torch.stack([torch.arange(length, device=r.device) < len(r) for r in rows])
        return Text(embeds=embeds, valid=valid)

    def _picture(self, images: Mapping[str, UInt8Image]) -> Tensor:
        """The cameras side by side as one float picture (3, H, W) in [-1, 1]."""
        assert self.settings.image_size is not None
        height, width = self.settings.image_size
        missing = [c for c in self.settings.cameras if c not in images]
        if missing:
            raise DatasetError(f"no picture of camera {missing[0]!r}", f"there are: {', '.join(images) or 'none'}")
        tile = (width // len(self.settings.cameras), height)
        picture = np.concatenate([np.asarray(_resized(images[c], tile)) for c in self.settings.cameras], axis=1)
        if self.settings.blank_images:
            picture = np.full_like(picture, GREY)
        tensor = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
        return (tensor.float() / 127.5 - 1).to(self.device, self.dtype)  # scaled in float32, as the pipelines do


def picture_segment(name: Segment, size: tuple[int, int], pixels: int) -> SegmentSpec:
    """Tokens of a picture of (height, width) pixels, each `pixels` wide and high; partial ones at the edge count."""
    rows, columns = (-(-side // pixels) for side in size)
    return SegmentSpec(name=name, tokens=rows * columns, grid=(rows, columns))


def target_noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """The seeded noise that stands in place of a target: (B, ...) with the same noise in every row.

    Drawn on the CPU in float32, so that it is the same on every device and in every dtype and batch.
    """
    noise = torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.expand(tuple(shape)).to(like)


def load_parts(
    folder: Path, classes: Mapping[str, Any], family: str, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The parts of a pipeline folder, ready to encode; nothing is trained.

    Raises:
        EditorError: the folder lacks a part, or a part does not fit its config.
    """
    from diffusers import ModelMixin
    from safetensors import SafetensorError

    _require_family(folder, family)
    loaded: dict[str, Any] = {}
    for name, kind in classes.items():
        if not (folder / name).is_dir():
            raise EditorError(f"{folder} is not a {family} folder: it has no {name}/")
        options: dict[str, Any] = {}
        if issubclass(kind, nn.Module):
            options = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype, "use_safetensors": True}
        try:
            with _no_bars():
                loaded[name] = kind.from_pretrained(folder / name, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise EditorError(f"{folder / name} cannot be loaded: {reason}", "fetch the editor again") from error
        if isinstance(loaded[name], nn.Module):
            loaded[name].to(device).eval().requires_grad_(False)
    return loaded


def _require_family(folder: Path, family: str) -> None:
    """Another family's folder may have all the sub-folders, and only fails at the first row."""
    index = folder / "model_index.json"
    if not index.is_file():
        return  # parts alone will do
    try:
        found = json.loads(index.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise EditorError(f"{index} is damaged: {error}", "fetch the editor again") from error
    if found != family:
        raise EditorError(f"{folder} is a {found} folder, not a {family} one", "see `imagewam editors` for others")


def randomize(models: Sequence[nn.Module], seed: int) -> None:
    """Draw the weights of the models anew, as their classes initialise them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for model in models:
            kind: Any = type(model)
            fresh = kind.from_config(model.config) if hasattr(kind, "from_config") else kind(model.config)
            model.load_state_dict(fresh.state_dict())


def revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the Hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def digest(folder: Path, parts: Iterable[str]) -> str:
    """sha256 over names and contents of the parts' weight, config and tokenizer files; what else the folder holds, and
    where it came from, makes no difference."""
    total = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).rglob("*")):
        if not is_read(path.name):
            continue
        blob = path.resolve().name  # in the Hub's cache a large file is a link to its own sha256
        known = path.is_symlink() and len(blob) == 64
        content = blob if known else hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def _resized(image: UInt8Image, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bar: loading is part of a command that has a bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
