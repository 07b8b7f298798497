"""`DiffusersEditor`: base class of the editors on diffusers pipeline folders.

A subclass implements what is specific to its family: the attention layers and their segments, the encoding of a prompt
as text states, and one forward pass of the denoiser. Its entry names the components. The base class does the rest:
settings, cameras, one text encoding per instruction, recording, choice of layers and segments, identity of the weights.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import (
    TYPICAL_TEXT,
    Editor,
    ReleaseNames,
    TextToken,
    WeightsIdentity,
)
from imagewam_cli.editors.loading.attention_backend import override_environment, use_torch_attention
from imagewam_cli.editors.loading.components import read_config, require_components
from imagewam_cli.editors.loading.fit import meta_model
from imagewam_cli.editors.loading.folder import (
    PipelinePart,
    load_part,
    part_tensors,
    require_family,
    require_names,
    revision,
    write_part,
)
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.loading.hub_cache import find_snapshot
from imagewam_cli.editors.loading.identity import LoadedFiles
from imagewam_cli.editors.loading.placement import Placement
from imagewam_cli.editors.loading.shared_sizes import SharedSize
from imagewam_cli.editors.loading.vocabulary import require_chat_template, require_vocabulary
from imagewam_cli.editors.settings import PrefixOptions, PrefixSettings, resolve
from imagewam_cli.editors.text import (
    InstructionCheck,
    Prompt,
    PromptTokens,
    Text,
    TextStates,
    prompt_tokens,
    with_token,
)
from imagewam_cli.editors.tokens import concatenate, split, valid_mask
from imagewam_cli.errors import EditorError, PluginError, UsageError
from imagewam_cli.prefix.capture import exclusive, record
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.pooling import pooled, pooled_layer, pooled_segment
from imagewam_cli.prefix.spec import (
    KVSpec,
    LayerSpec,
    RopeSpec,
    SegmentSpec,
    select_layers,
)
from imagewam_cli.registry import imported

if TYPE_CHECKING:
    from diffusers import ModelMixin

GREY = 128
"""Value of every pixel of a blank picture."""


class DiffusersEditor(Editor):
    """A pipeline folder as an `Editor`. Subclasses implement the abstract methods and may set the class variables."""

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Components that are models and encode text. Freed after all instructions are encoded, unless the encoded states
    would need more memory than the encoders."""
    text_tokenizer: ClassVar[str] = "tokenizer"
    """Component whose tokens are the text states."""
    chat_tokenizers: ClassVar[tuple[str, ...]] = ()
    """Components whose chat template the prompt is written in."""
    reads_picture: ClassVar[bool] = False
    """Whether the text encoder also sees the picture. Text states then belong to a row, not to an instruction."""
    release: ClassVar[ReleaseNames | None] = None
    """Names of the denoiser's weights in its family's own release; None if there are no other names."""
    takes_text_token: ClassVar[bool] = False
    """Whether `run` respects any `Text.valid`, even with gaps. `encode_with` needs that to add a token."""

    def __init__(
        self,
        options: PrefixOptions,
        folder: Path,
        *,
        instructions: Sequence[str],
        hardware: Hardware,
        tuned: Path | None = None,
    ) -> None:
        self.settings = resolve(options, self.entry)
        self.dtype: torch.dtype = getattr(torch, self.settings.compute_dtype)
        self._placement = Placement(
            hardware, quantization=self.settings.quantization, random_weights=self.settings.random_weights
        )
        self.device = self._placement.device
        self._folder, self._tuned = folder, tuned
        self.part: dict[str, Any] = {}
        """Loaded components: sub-folder of the pipeline -> object."""
        classes = self.part_classes()
        require_family(folder, self.entry.family, [name for name in classes if self._folder_of(name) == folder])
        folders = {name: self._folder_of(name) for name in classes}
        self._files = LoadedFiles(folders, classes)
        require_components(folders, classes)
        self._require_shared_sizes(folders)
        # Text encoders come first. If they can be freed before the denoiser is loaded, peak memory is the larger of the
        # two, not their sum.
        late = [
            name for name, kind in classes.items() if issubclass(kind, nn.Module) and name not in self.text_encoders
        ]
        self._load_parts(name for name in classes if name not in late)
        self._require_vocabularies()
        check = InstructionCheck(self._prompt_tokens)
        self._texts = TextStates(
            self._embed, self._text_tokens, instructions, self.device, check=check.require_distinct
        )
        if instructions and not self.reads_picture and self._texts.encode_all(self._encoder_bytes()):
            for name in self.text_encoders:
                del self.part[name]
        self._load_parts(late)
        self.prepare()
        _ = self.layer_names  # check layers and pooling now, not at the first row

    @classmethod
    def load(
        cls,
        options: PrefixOptions,
        *,
        instructions: Sequence[str],
        weights: Path | None = None,
        hardware: Hardware = CPU,
        tuned: Path | None = None,
    ) -> Self:
        """Load from `weights`, the embedded folder, or the downloaded one."""
        folder = cls._weights_folder(weights)
        return cls(options, folder, instructions=instructions, hardware=hardware, tuned=tuned)

    @classmethod
    def require_weights(cls, weights: Path | None = None) -> None:
        folder, classes = cls._weights_folder(weights), cls.part_classes()
        require_family(folder, cls.entry.family, classes)
        require_components(dict.fromkeys(classes, folder), classes)
        cls._require_shared_sizes(dict.fromkeys(classes, folder))

    @classmethod
    def released_weights(cls, weights: Path | None = None) -> dict[str, Tensor]:
        if cls.release is None:
            return super().released_weights(weights)
        folder, denoiser = cls._weights_folder(weights), cls.entry.denoiser
        require_family(folder, cls.entry.family, [denoiser])
        require_components({denoiser: folder}, {denoiser: cls.part_classes()[denoiser]})
        return cls.release.to_release(part_tensors(folder, denoiser))

    @classmethod
    def write_released(
        cls, released: Mapping[str, Tensor], out: Path, *, weights: Path | None = None
    ) -> dict[str, int]:
        if cls.release is None:
            return super().write_released(released, out, weights=weights)
        folder, denoiser = cls._weights_folder(weights), cls.entry.denoiser
        require_family(folder, cls.entry.family, [denoiser])
        config = read_config(folder / denoiser)
        expected = meta_model(cls.part_classes()[denoiser], config).state_dict()
        wanted = cls.release.to_release(expected)
        sizes = cls.release.sizes(released)
        for what, size in cls.release.sizes(wanted).items():
            if sizes.get(what, size) != size:
                raise EditorError(
                    f"the checkpoint has {sizes[what]} {what}, but the editor {cls.entry.name} has {size}",
                    "choose the editor that the checkpoint was trained on",
                )
        require_names(released, wanted, f"the checkpoint's editor weights do not fit {cls.entry.name}")
        write_part(out, denoiser, config, cls.release.from_release(released))
        return sizes

    @classmethod
    def describe(cls, options: PrefixOptions) -> KVSpec | None:
        entry, config = cls.entry, cls.entry.config
        if cls.embedded is not None:
            config = json.loads((cls.embedded / entry.denoiser / "config.json").read_text(encoding="utf-8"))
        if not config:
            return None
        settings, kind = resolve(options, entry), cls.part_classes()[entry.denoiser]
        taken = inspect.signature(kind.__init__).parameters
        unknown = [key for key in entry.config if key not in taken and not key.startswith("_")]
        if unknown:  # diffusers would only warn, and use its default
            raise PluginError(
                f"the entry {entry.name!r} has config {unknown[0]!r}, which {kind.__name__} does not take",
                "correct the entry's `config`",
            )
        denoiser = meta_model(kind, config)
        text = entry.defaults.text_limit if settings.text_padding == "keep" else TYPICAL_TEXT
        return cls._layout(settings, denoiser, cls.picture_text(settings) + text)

    @classmethod
    def memory_bytes(cls, *, acting: bool = False) -> int:
        """Return the memory of the text encoders or of all other parts, whichever is larger: while caching, the
        encoders are freed before the others are loaded.

        Acting needs all parts, and so does an encoder that `reads_picture`. Not considered here: an encoder also stays
        if the states of all instructions need more memory than it does.
        """
        dtype: torch.dtype = getattr(torch, cls.entry.defaults.compute_dtype)
        parameters = {name: component.parameters for name, component in cls.entry.components.items()}
        everything = sum(parameters.values())
        if acting or cls.reads_picture:
            return dtype.itemsize * everything
        reading = sum(parameters.get(name, 0) for name in cls.text_encoders)
        return dtype.itemsize * max(reading, everything - reading)

    @classmethod
    def part_classes(cls) -> Mapping[str, type[PipelinePart]]:
        """Return the class of each component: sub-folder of the pipeline -> class.

        Raises:
            PluginError: the entry names a class that cannot be imported.
        """
        override_environment()
        return {
            name: imported(component.load, f"component {name!r} of {cls.entry.name}")
            for name, component in cls.entry.components.items()
        }

    @classmethod
    @abc.abstractmethod
    def attention_layers(cls, denoiser: ModelMixin, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        """Return every attention layer in call order, with all segments of the settings' mode.

        denoiser: may be on the meta device, so only its config is meaningful. text: number of text tokens.
        """

    @classmethod
    def picture_text(cls, settings: PrefixSettings) -> int:
        """Return the number of text states that stand for the picture, if the text encoder `reads_picture`."""
        return 0

    @classmethod
    def rope(cls, denoiser: ModelMixin) -> RopeSpec | None:
        """Return how the keys are rotated; None if positions are not rotary."""
        return None

    @classmethod
    def shared_sizes(cls) -> tuple[SharedSize, ...]:
        """Return sizes on which two components must agree, such as the width of the text states."""
        return ()

    def prepare(self) -> None:
        """Modify the loaded components as the settings require. Called once, at the end of loading."""

    def fingerprint_extras(self) -> Mapping[str, object]:
        """Return what determines K and V besides weights and settings, as JSON values: constants of the plugin, or
        wording and constants of the installed diffusers. The fingerprint holds it as "recipe"."""
        return {}

    def text_tokens(self, prompt: str) -> int:
        """Return the number of text states that `embed` gives, without running the encoder; by default one per
        token of `text_tokenizer`."""
        return self.tokenized(prompt)[0].shape[1]

    def prompt_tokens(self, prompt: str) -> Mapping[str, PromptTokens]:
        """Return the tokens of a prompt by tokenizer: name of its component -> tokens. Instructions are compared by
        them.

        By default each component that is a tokenizer reads the prompt itself: `text_tokenizer` at most
        `max_text_tokens`, others as many as their own limit.
        """
        from transformers import PreTrainedTokenizerBase

        limit = self.entry.defaults.max_text_tokens
        return {
            name: prompt_tokens(part, prompt, limit if name == self.text_tokenizer else part.model_max_length)
            for name, part in self.part.items()
            if isinstance(part, PreTrainedTokenizerBase)
        }

    def tokenized(self, prompt: str, tokenizer: str | None = None) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, int64 (1, L), truncated to `max_text_tokens`, and padded to it if
        padding is kept. tokenizer: name of its component, by default `text_tokenizer`."""
        limit = self.entry.defaults.max_text_tokens
        tokens = self.part[tokenizer or self.text_tokenizer](
            prompt,
            padding="max_length" if self.settings.text_padding == "keep" else False,
            max_length=limit,
            truncation=limit is not None,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)

    @abc.abstractmethod
    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        """Return the text states of one prompt, padded according to the settings.

        picture: uint8 (H, W, 3), the composed picture, if the text encoder `reads_picture`; otherwise None.
        """

    @abc.abstractmethod
    def run(self, pictures: Tensor, text: Text) -> None:
        """Run one forward pass of the denoiser, whose attention is recorded. pictures: (B, 3, H, W) in [-1, 1]."""

    @property
    def denoiser(self) -> ModelMixin:
        """Model whose attention is recorded."""
        return self.part[self.entry.denoiser]

    @functools.cached_property
    def spec(self) -> KVSpec:
        return self._layout(self.settings, self.denoiser, self._texts.longest)

    @functools.cached_property
    def weights(self) -> WeightsIdentity:
        return WeightsIdentity(
            revision=revision(self._folder), sha256=self._files.digest(), former=self._files.former_digest()
        )

    def fingerprint(self) -> dict[str, object]:
        extras = self.fingerprint_extras()
        return super().fingerprint() | ({"recipe": dict(extras)} if extras else {})

    def prompt(self, instruction: str) -> str:
        """Return the instruction in the user's prompt template, or in the entry's: the prompt that `embed` gets."""
        template = self.settings.prompt_template or self.entry.prompt_template
        return template.format(instruction=instruction)

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        return self._encode(images, instructions, None)

    def encode_with(
        self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str], token: TextToken
    ) -> PrefixKV:
        if not self.takes_text_token:
            return super().encode_with(images, instructions, token)
        return self._encode(images, instructions, token)

    def _encode(
        self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str], token: TextToken | None
    ) -> PrefixKV:
        # one thread at a time: tokenizers, the cache of text states and offloaded weights change while they are used
        with exclusive(self.denoiser), torch.no_grad():
            seen = [self._picture(row) for row in images]
            pictures = torch.stack([self._pixels(picture) for picture in seen])
            text = self._texts.batch(instructions, seen if self.reads_picture else None)
            if token is not None:
                text = with_token(text, token)
            with record(self.denoiser, self.layer_names, stop_after_last=True) as recording:
                self.run(pictures, text)
            return self.keep_segments(recording.layers, text.valid)

    @functools.cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the kept layers."""
        return tuple(layer.name for layer in self._layers(self.denoiser, self.settings, text=1))

    def keep_segments(self, recorded: Mapping[str, LayerKV], text_valid: Tensor) -> PrefixKV:
        """Return the chosen segments of the kept layers, pooled.

        K and V are set to zero at padding, so that equal rows have equal bytes.

        recorded: layer name -> K and V of all its tokens; text_valid: bool (B, L).
        """
        size, rope = self.settings.pool, self.rounded_rope(self.denoiser, self.settings)
        layers: list[LayerKV] = []
        valid: Tensor | None = None
        for layer in self._kept_layers(self.denoiser, self.settings, text=text_valid.shape[1]):
            kept = self._chosen_segments(layer, recorded[layer.name])
            k, v = concatenate([pooled(kv, segment, size, rope) for segment, kv in kept])
            if any(segment.name == "text" for segment, _ in kept):
                valid = valid_mask([pooled_segment(segment, size) for segment, _ in kept], text_valid)
                hidden = ~valid[:, :, None, None]
                k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
            layers.append(LayerKV(k, v))
        return PrefixKV(tuple(layers), valid)

    def _chosen_segments(self, layer: LayerSpec, kv: LayerKV) -> list[tuple[SegmentSpec, LayerKV]]:
        """Return the chosen segments of a layer, each with its keys and values."""
        parts = zip(layer.segments, split(layer, kv.k), split(layer, kv.v), strict=True)
        return [(segment, LayerKV(k, v)) for segment, k, v in parts if segment.name in self.settings.segments]

    @classmethod
    def _layout(cls, settings: PrefixSettings, denoiser: ModelMixin, text: int) -> KVSpec:
        return KVSpec(
            mode=settings.mode,
            timestep=settings.timestep,
            layers=cls._layers(denoiser, settings, text),
            rope=cls.rounded_rope(denoiser, settings),
            text_padding=settings.text_padding,
            cameras=settings.cameras,
            image_size=settings.image_size,
            prompt_template=settings.prompt_template or cls.entry.prompt_template,
        )

    @classmethod
    def _layers(cls, denoiser: ModelMixin, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        """Return the layers of `encode`'s result: kept layers, chosen segments, pooled pictures."""
        wanted = [
            dataclasses.replace(layer, segments=tuple(s for s in layer.segments if s.name in settings.segments))
            for layer in cls._kept_layers(denoiser, settings, text)
        ]
        rope = cls.rounded_rope(denoiser, settings)
        return tuple(pooled_layer(layer, settings.pool, rope) for layer in wanted)

    @classmethod
    def rounded_rope(cls, denoiser: ModelMixin, settings: PrefixSettings) -> RopeSpec | None:
        """Return `rope` with the rounding of the settings."""
        rope = cls.rope(denoiser)
        return None if rope is None else dataclasses.replace(rope, rounding=settings.rounding)

    @classmethod
    def _kept_layers(cls, denoiser: ModelMixin, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
        """Return the kept layers, each with all its segments.

        `--layers` counts only layers that hold a chosen segment, so that its indices have no gaps.
        """
        candidates = [
            layer
            for layer in cls.attention_layers(denoiser, settings, text)
            if any(s.name in settings.segments for s in layer.segments)
        ]
        try:
            return tuple(candidates[i] for i in select_layers(settings.layers, len(candidates)))
        except ValueError as error:
            raise UsageError(str(error), "choose with --layers; by default all layers are kept") from None

    @classmethod
    def _weights_folder(cls, weights: Path | None) -> Path:
        """Return the folder given by the user, else the embedded one, else the downloaded one."""
        return weights or cls.embedded or find_snapshot(cls.entry)

    def _load_parts(self, names: Iterable[str]) -> None:
        for name in names:
            kind, denoiser, home = self.part_classes()[name], name == self.entry.denoiser, self._folder_of(name)
            if denoiser or name in self.text_encoders:
                self.part[name] = self._placement.load(home, name, kind, self.dtype, denoiser=denoiser)
                if denoiser:
                    use_torch_attention(self.part[name])
            else:
                self.part[name] = load_part(home, name, kind, self.device, self.dtype)

    @classmethod
    def _require_shared_sizes(cls, folders: Mapping[str, Path]) -> None:
        models = [name for name, kind in cls.part_classes().items() if issubclass(kind, nn.Module)]
        configs = {name: read_config(folders[name] / name) for name in models}
        for size in cls.shared_sizes():
            size.require(configs)

    def _require_vocabularies(self) -> None:
        """Check that every loaded tokenizer is that of its text encoder: `tokenizer_2` belongs to `text_encoder_2`, and
        a processor's to `text_encoder`."""
        from transformers import PreTrainedTokenizerBase

        for name, part in self.part.items():
            tokenizer = part if isinstance(part, PreTrainedTokenizerBase) else getattr(part, "tokenizer", None)
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                continue
            folder, encoder = self._folder_of(name) / name, f"text_encoder{name.removeprefix('tokenizer')}"
            if encoder not in self.text_encoders:
                encoder = self.text_encoders[0]
            require_vocabulary(tokenizer, folder, read_config(self._folder_of(encoder) / encoder))
            if name in self.chat_tokenizers:
                require_chat_template(tokenizer, folder)

    def _folder_of(self, part: str) -> Path:
        """Return the pipeline folder that this component is loaded from."""
        return self._tuned if self._tuned is not None and (self._tuned / part).is_dir() else self._folder

    def _encoder_bytes(self) -> int:
        encoders = [self.part[name] for name in self.text_encoders]
        return sum(p.numel() * p.element_size() for encoder in encoders for p in encoder.parameters())

    def _text_tokens(self, instruction: str) -> int:
        return self.text_tokens(self.prompt(instruction))

    def _prompt_tokens(self, instruction: str) -> Mapping[str, PromptTokens]:
        return self.prompt_tokens(self.prompt(instruction))

    def _embed(self, instruction: str, picture: UInt8Image | None) -> Prompt:
        return self.embed(self.prompt(instruction), picture)

    def _picture(self, images: Mapping[str, UInt8Image]) -> UInt8Image:
        """Return the picture that the editor sees, uint8 (H, W, 3): the cameras in their layout, or grey."""
        picture = self.settings.layout.compose(images, self.settings.cameras, self.settings.image_size)
        return np.full_like(picture, GREY) if self.settings.blank_images else picture

    def _pixels(self, picture: UInt8Image) -> Tensor:
        """Convert uint8 (H, W, 3) to (3, H, W) in [-1, 1]."""
        tensor = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
        return (tensor.float() / 127.5 - 1).to(self.device, self.dtype)  # scaled in float32, as the pipelines do
