"""FLUX.2-klein as an editor: the prefix of [text | reference picture], one forward, no target.

Default timestep 0: what the published code uses at inference (the reference picture is clean). The prefix of one row is
computed with the positions that it has in the full sequence; all cameras are tiled into one reference picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagewam_cli.capture import LayerKV
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editor import Editor, PrefixGraph, PrefixKV, PrefixSettings, WeightsIdentity, resolve
from imagewam_cli.errors import DatasetError, EditorError, UsageError
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.kvcache.spec import KVSpec, LayerSpec, RopeSpec, SegmentSpec, select_layers
from imagewam_flux2.graph import prefix_graph
from imagewam_flux2.tokens import ACTION_T, REFERENCE_T, FluxTokens, Text, image_ids

_PIXELS_PER_TOKEN = 16
_GREY = 128


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a checkpoint of this family is used with unless the user says otherwise."""

    timestep: float = 0.0
    text_padding: Literal["trim", "keep"] = "keep"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    camera_size: tuple[int, int] = (512, 512)
    text_layers: tuple[int, ...] = (9, 18, 27)
    max_text_tokens: int = 512


def load(
    entry: EditorEntry,
    settings: PrefixSettings,
    *,
    instructions: Sequence[str],
    weights: Path | None = None,
    device: str = "cpu",
) -> Flux2Editor:
    """An `imagewam_cli.editor.EditorLoader` for the checkpoints on the Hub."""
    folder = weights if weights is not None else _downloaded(entry)
    return Flux2Editor(entry, settings, Defaults(), folder, instructions=instructions, device=device)


class Flux2Editor(Editor):
    """A FLUX.2-klein pipeline folder as an `Editor`."""

    def __init__(
        self,
        entry: EditorEntry,
        settings: PrefixSettings,
        defaults: Defaults,
        folder: Path,
        *,
        instructions: Sequence[str],
        device: str,
    ) -> None:
        self.entry = entry
        self.settings = _resolved(settings, defaults)
        assert self.settings.compute_dtype is not None
        self._device, self._dtype = torch.device(device), getattr(torch, self.settings.compute_dtype)
        self._folder = folder
        self._tokens = load_parts(folder, defaults, device, self._dtype)
        if self.settings.random_weights:
            _randomize(self._tokens, seed=0)
        self._texts: dict[str, Tensor] = {}
        self._instructions = frozenset(instructions)
        count = len(self._tokens.layers)
        try:
            self._kept = select_layers(self.settings.layers, count)
        except ValueError as error:
            raise UsageError(str(error)) from None

    @functools.cached_property
    def spec(self) -> KVSpec:
        config = self._tokens.transformer.config
        segments = self._segments(self._text_length, self._grid[0] * self._grid[1])
        names = self._tokens.layers
        layers = tuple(
            LayerSpec(
                name=names[i],
                block="sequential" if i < config.num_layers else "parallel",
                heads=config.num_attention_heads,
                kv_heads=config.num_attention_heads,
                head_dim=config.attention_head_dim,
                segments=segments,
            )
            for i in self._kept
        )
        assert self.settings.mode is not None
        assert self.settings.timestep is not None
        assert self.settings.text_padding is not None
        assert self.settings.image_size is not None
        return KVSpec(
            mode=self.settings.mode,
            timestep=self.settings.timestep,
            layers=layers,
            rope=RopeSpec(
                axes=tuple(config.axes_dims_rope),
                theta=float(config.rope_theta),
                action_axis=1,
                action_ids=(ACTION_T, 0, 0, 0),
            ),
            text_padding=self.settings.text_padding,
            cameras=self.settings.cameras,
            image_size=self.settings.image_size,
            prompt_template=self.entry.prompt_template,
        )

    @functools.cached_property
    def weights(self) -> WeightsIdentity:
        source = self.entry.repo or self.entry.name
        return WeightsIdentity(source=source, revision=_revision(self._folder), sha256=_digest(self._folder))

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        assert self.settings.timestep is not None
        with torch.no_grad():
            pictures = torch.stack([self._picture(row) for row in images])
            reference = self._tokens.image(pictures)
            text = self._text(instructions)
            names = self._tokens.layers
            prefix = self._tokens.prefix(
                text,
                reference,
                image_ids(*self._grid, t=REFERENCE_T),
                timestep=self.settings.timestep,
                layers=[names[i] for i in self._kept],
            )
            return self._keep_segments([prefix.layers[names[i]] for i in self._kept], prefix.valid, text.valid.shape[1])

    def prefix_graph(self) -> PrefixGraph:
        names = self._tokens.layers
        return prefix_graph(
            self._tokens,
            self.settings,
            layers=[names[i] for i in self._kept],
            grid=self._grid,
            keep_segments=self._keep_segments,
            prompt=self._prompt,
            grey=_GREY,
        )

    @property
    def _grid(self) -> tuple[int, int]:
        """Reference tokens: (rows, columns)."""
        assert self.settings.image_size is not None
        height, width = self.settings.image_size
        return height // _PIXELS_PER_TOKEN, width // _PIXELS_PER_TOKEN

    def _segments(self, text: int, reference: int) -> tuple[SegmentSpec, ...]:
        pictures = SegmentSpec(name="reference", tokens=reference, grid=self._grid)
        every = (SegmentSpec(name="text", tokens=text), pictures)
        assert self.settings.segments is not None
        return tuple(s for s in every if s.name in self.settings.segments)

    def _keep_segments(self, layers: list[LayerKV], valid: Tensor, text: int) -> PrefixKV:
        """Drop the segments that are not wanted; zero what padding left, so that equal rows are equal bytes."""
        assert self.settings.segments is not None
        start = 0 if "text" in self.settings.segments else text
        stop = valid.shape[1] if "reference" in self.settings.segments else text
        valid = valid[:, start:stop]
        hidden = ~valid[:, :, None, None]
        kept = [kv.narrow(start, stop) for kv in layers]
        cleared = tuple(LayerKV(kv.k.masked_fill(hidden, 0), kv.v.masked_fill(hidden, 0)) for kv in kept)
        return PrefixKV(cleared, valid if start == 0 else None)

    @functools.cached_property
    def _text_length(self) -> int:
        """Text tokens that a row of the announced instructions has room for."""
        if self.settings.text_padding == "keep" or not self._instructions:
            return self._tokens.max_text_tokens
        return max(len(self._tokens.token_ids(self._prompt(i))) for i in self._instructions)

    def _prompt(self, instruction: str) -> str:
        return self.entry.prompt_template.format(instruction=instruction)

    def _text(self, instructions: Sequence[str]) -> Text:
        """Hidden states of the instructions, each computed once. The text encoder is causal, so a row's states do not
        depend on padding, and states computed alone serve in any batch."""
        keep = self.settings.text_padding == "keep"
        for instruction in dict.fromkeys(i for i in instructions if i not in self._texts):
            text = self._tokens.text([self._prompt(instruction)], pad_to=self._tokens.max_text_tokens if keep else None)
            self._texts[instruction] = text.embeds[0]
        rows = [self._texts[i] for i in instructions]
        length = self._text_length if self._instructions.issuperset(instructions) else max(len(r) for r in rows)
        embeds = torch.stack([torch.nn.functional.pad(r, (0, 0, 0, length - len(r))) for r in rows])
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
        tiles = [np.asarray(_resized(images[c], tile)) for c in self.settings.cameras]
        picture = np.concatenate(tiles, axis=1)
        if self.settings.blank_images:
            picture = np.full_like(picture, _GREY)
        tensor = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
        return tensor.to(self._device, self._dtype) / 127.5 - 1


def _resized(image: UInt8Image, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)


def _resolved(settings: PrefixSettings, defaults: Defaults) -> PrefixSettings:
    cameras = settings.cameras or ("top",)
    size = (defaults.camera_size[0], defaults.camera_size[1] * len(cameras))
    settings = resolve(
        dataclasses.replace(settings, cameras=cameras),
        mode="prefix",
        timestep=defaults.timestep,
        segments=("text", "reference"),
        text_padding=defaults.text_padding,
        compute_dtype=defaults.compute_dtype,
        image_size=size,
    )
    assert settings.image_size is not None
    assert settings.segments is not None
    if settings.mode != "prefix":
        raise UsageError(f"mode {settings.mode!r} is not available for FLUX.2", "use --mode prefix")
    if "target" in settings.segments:
        raise UsageError("mode 'prefix' has no target tokens", "choose segments among text and reference")
    height, width = settings.image_size
    if height % _PIXELS_PER_TOKEN or (width // len(cameras)) % _PIXELS_PER_TOKEN or width % len(cameras):
        raise UsageError(
            f"image size {height}x{width} does not split into 16-pixel tokens for {len(cameras)} camera(s)"
        )
    return settings


def load_parts(folder: Path, defaults: Defaults, device: str, dtype: torch.dtype) -> FluxTokens:
    """The parts of a pipeline folder, ready to encode; nothing is trained.

    Raises:
        EditorError: the folder lacks a part, or a part does not fit its config.
    """
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    if not (folder / "transformer").is_dir():
        raise EditorError(f"{folder} is not a FLUX.2-klein pipeline folder: it has no transformer/")
    try:
        with _no_bars():
            parts = {
                "vae": AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
                "transformer": Flux2Transformer2DModel.from_pretrained(
                    folder, subfolder="transformer", torch_dtype=dtype
                ),
                "text_encoder": Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=dtype),
            }
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise EditorError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    for part in parts.values():
        part.to(device).eval().requires_grad_(False)
    return FluxTokens(
        tokenizer=tokenizer, text_layers=defaults.text_layers, max_text_tokens=defaults.max_text_tokens, **parts
    )


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


def _randomize(tokens: FluxTokens, seed: int) -> None:
    """Draw transformer and text encoder anew; the VAE stays, so that pictures still become the same latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for model in (
            type(tokens.transformer).from_config(tokens.transformer.config),
            type(tokens.text_encoder)(tokens.text_encoder.config),
        ):
            old = tokens.transformer if isinstance(model, type(tokens.transformer)) else tokens.text_encoder
            old.load_state_dict(model.state_dict())


def _downloaded(entry: EditorEntry) -> Path:
    """The Hub snapshot on this disk, without asking the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(entry.repo), local_files_only=True))
    except LocalEntryNotFoundError:
        raise EditorError(
            f"the weights of {entry.name!r} are not on this machine",
            f"run `hf download {entry.repo}`, or pass a diffusers folder with --weights DIR",
        ) from None


def _revision(folder: Path) -> str | None:
    """The commit, where the folder is a snapshot in the Hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def _digest(folder: Path) -> str:
    """sha256 over names and contents of all weight, config and tokenizer files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in {".safetensors", ".json", ".txt", ".jinja"}:
            continue
        blob = path.resolve().name  # in the Hub's cache a large file is a link to its own sha256
        known = path.is_symlink() and len(blob) == 64
        digest = blob if known else hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()
