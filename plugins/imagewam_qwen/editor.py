"""Qwen-Image-Edit as an editor. Its text encoder also sees the picture, so text states belong to a row.

Modes:
- `prefix`, the default: one forward pass over [text | reference] without a target, at the positions of the full
  sequence. It costs half as much as a full step. In the first step the target is noise and carries no information.
- `denoise`: the full step over [text | target | reference], as in the pipeline, for keys and values of the target.

Both modes use timestep 1 by default, where the pipeline starts. One vector modulates all tokens, so the timestep sets
the stage of editing at which text and reference are read. At 1 the network must predict the edit from them alone, as a
policy must predict actions. Near 0 the target is almost finished, and a prefix has no target. A transformer with
`zero_cond_t` (2511) always modulates the reference as clean; the timestep applies to text and target. Below 1 in
`denoise` the first camera's picture, noised to that timestep, replaces the target.

The user chooses the image size. The default is one megapixel, to which the pipelines rescale every picture. The text
encoder sees the same picture; in the Plus line, as in its pipeline, it sees a copy of about 384 x 384 pixels with the
same aspect ratio.

The pipelines pad text only within a batch and mask the padding, so a row's prefix does not depend on its batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.plugin import (
    DiffusersEditor,
    LayerSpec,
    PrefixSettings,
    Prompt,
    PromptTokens,
    RopeSpec,
    Segment,
    SegmentSpec,
    SharedSize,
    Text,
    UInt8Image,
    UsageError,
    flow_target,
    joint_layers,
    picture_segment,
    picture_width,
    text_width,
)
from imagewam_qwen import PIXELS_PER_TOKEN
from imagewam_qwen.reader import PromptReader
from imagewam_qwen.tokens import (
    ACTION_FRAME,
    picture_latents,
    picture_positions,
    picture_shape,
    text_positions,
    text_start,
    without_target,
)

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

_PIXELS_READ_PER_TOKEN = 28
"""Width and height in pixels of one picture token of Qwen2.5-VL, which the transformer sees as a text token."""


class QwenEditor(DiffusersEditor):
    """A QwenImageEditPipeline folder as an `Editor`: one reference picture."""

    reads_picture = True
    picture_label: ClassVar[str] = ""
    """Text that the pipeline puts before the prompt, once per picture, inside its template."""

    @classmethod
    def attention_layers(
        cls, denoiser: QwenImageTransformer2DModel, settings: PrefixSettings, text: int
    ) -> tuple[LayerSpec, ...]:
        sizes = settings.reference_sizes
        kinds = {
            "text": (SegmentSpec(name="text", tokens=text, positions=text_positions(sizes)),),
            "target": (_picture("target", sizes[0], 0),),
            "reference": tuple(_picture("reference", size, 1 + i) for i, size in enumerate(sizes)),
        }
        return joint_layers(
            denoiser, [s for name in cls.entry.defaults.modes[settings.mode].segments for s in kinds[name]]
        )

    @classmethod
    def shared_sizes(cls) -> tuple[SharedSize, ...]:
        return text_width("text_encoder.hidden_size"), picture_width("vae.z_dim")

    @classmethod
    def rope(cls, denoiser: QwenImageTransformer2DModel) -> RopeSpec:
        return RopeSpec(
            axes=tuple(denoiser.config.axes_dims_rope),
            theta=float(denoiser.pos_embed.theta),
            action_axis=1,
            action_ids=(ACTION_FRAME, 0, 0),
        )

    @classmethod
    def picture_text(cls, settings: PrefixSettings) -> int:
        read = [cls.read_size(size) for size in settings.reference_sizes]
        return sum(round(h / _PIXELS_READ_PER_TOKEN) * round(w / _PIXELS_READ_PER_TOKEN) for h, w in read)

    @staticmethod
    def read_size(size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) at which the text encoder sees a picture of (height, width) pixels."""
        return size

    def fingerprint_extras(self) -> Mapping[str, object]:
        return self._reader.wording | {"read_sizes": [list(size) for size in self._encoder_sizes]}

    def text_tokens(self, prompt: str) -> int:
        return self._require_position_ids(self._reader.length(prompt, self._encoder_sizes))

    def prompt_tokens(self, prompt: str) -> Mapping[str, PromptTokens]:
        return {"processor": PromptTokens(ids=tuple(self._reader.token_ids(prompt, len(self._sizes))))}

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        assert picture is not None
        pictures = np.split(picture, len(self._sizes), axis=1)
        return Prompt(states=self._reader.states(prompt, pictures, self._encoder_sizes))

    def run(self, pictures: Tensor, text: Text) -> None:
        t = self.settings.timestep
        batch, length, _ = text.embeds.shape
        self._require_position_ids(length)
        cameras = pictures.chunk(len(self._sizes), dim=3)
        references = [picture_latents(self.part["vae"], camera) for camera in cameras]
        denoising = self.settings.mode == "denoise"
        target = [flow_target(references[0], t)] if denoising else []
        # without a target its shape stays in the list, with 0 frames: it decides the positions of the references
        shapes = [picture_shape(self._sizes[0], frames=len(target)), *map(picture_shape, self._sizes)]
        with contextlib.nullcontext() if denoising else without_target(self.denoiser):
            self.denoiser(
                hidden_states=torch.cat([*target, *references], dim=1),
                encoder_hidden_states=text.embeds,
                encoder_hidden_states_mask=None if bool(text.valid.all()) else text.valid,
                timestep=references[0].new_full((batch,), t),
                img_shapes=[shapes] * batch,
                return_dict=False,
            )

    @functools.cached_property
    def _reader(self) -> PromptReader:
        import diffusers

        # only the half that reads text is needed; the pipeline accepts None for the rest
        parts = dict.fromkeys(("scheduler", "vae", "tokenizer", "transformer"))
        reading = {name: self.part[name] for name in ("text_encoder", "processor")}
        return PromptReader(getattr(diffusers, self.entry.family)(**parts, **reading), self.picture_label, self.device)

    @functools.cached_property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        return self.settings.reference_sizes

    @functools.cached_property
    def _encoder_sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.read_size(size) for size in self._sizes)

    def _require_position_ids(self, text: int) -> int:
        """Return the number of text tokens, if the transformer has enough position ids for them after the pictures.

        Raises:
            UsageError: it has too few.
        """
        if text_start(self._sizes) + text > len(self.denoiser.pos_embed.pos_freqs):
            raise UsageError(
                f"{text} text tokens, including those of the pictures, exceed the position ids of {self.entry.name}",
                "choose smaller pictures with --image-size",
            )
        return text


def _picture(name: Segment, size: tuple[int, int], frame: int) -> SegmentSpec:
    return picture_segment(name, size, PIXELS_PER_TOKEN, picture_positions(size, frame))


class QwenPlusEditor(QwenEditor):
    """A QwenImageEditPlusPipeline folder as an `Editor`: one reference picture, or one per camera."""

    picture_label = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"

    @staticmethod
    def read_size(size: tuple[int, int]) -> tuple[int, int]:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        height, width = size
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, width / height)
        return height, width
