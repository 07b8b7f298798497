"""Qwen-Image-Edit as an editor. Its text encoder sees the picture too, so text states belong to a row.

Mode `prefix`, the default: one forward over [text | reference] without a target, at the positions of the full sequence.
It costs half of a full step, and the target of a first step tells nothing: it is noise. Mode `denoise`: the full step,
[text | target | reference], for those who want what the editor makes of the target; it is what the pipeline computes.

Default timestep 1 in both. One vector modulates all tokens of a sequence, so a timestep says at which stage of the
editing text and reference are read. At 1 the edit must be drawn from them alone, as a policy must draw actions; the
pipeline starts there. Near 0 they only help to finish a target that is all but known, and that a prefix does not have.
A transformer with `zero_cond_t` (2511) modulates the reference as clean, whatever the timestep; text and target follow
it. Below 1 in `denoise` the first camera's picture stands for the target, noised to that timestep.

Sizes are the user's: the pipelines rescale every picture to a megapixel first, which is the default here. What the text
encoder sees is that picture; in the Plus line, as in its pipeline, a copy of some 384 x 384 pixels of the same shape.

The pipelines pad text only within a batch and mask it: a row's prefix does not depend on its batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.plugin import (
    DiffusersEditor,
    LayerSpec,
    PrefixSettings,
    Prompt,
    RopeSpec,
    Segment,
    SegmentSpec,
    Text,
    UInt8Image,
    UsageError,
    flow_target,
    joint_layers,
    picture_segment,
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

_PIXELS_READ_PER_TOKEN = 28
"""Of Qwen2.5-VL, whose tokens of a picture are text to the transformer."""


class QwenEditor(DiffusersEditor):
    """A QwenImageEditPipeline folder as an `Editor`: one reference picture."""

    reads_picture = True
    picture_label: ClassVar[str] = ""
    """What the pipeline sets before the prompt for each picture, beside its template."""

    @classmethod
    def attention_layers(cls, denoiser: Any, settings: PrefixSettings, text: int) -> tuple[LayerSpec, ...]:
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
    def rope(cls, denoiser: Any) -> RopeSpec:
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
        """(height, width) at which the text encoder is shown a picture of (height, width) pixels."""
        return size

    def fingerprint_extras(self) -> Mapping[str, object]:
        return self._reader.wording | {"read_sizes": [list(size) for size in self._read_sizes]}

    def text_tokens(self, prompt: str) -> int:
        return self._placed(self._reader.length(prompt, self._read_sizes))

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        assert picture is not None
        pictures = np.split(picture, len(self._sizes), axis=1)
        return Prompt(states=self._reader.states(prompt, pictures, self._read_sizes))

    def run(self, pictures: Tensor, text: Text) -> None:
        t = self.settings.timestep
        batch, length, _ = text.embeds.shape
        self._placed(length)
        cameras = pictures.chunk(len(self._sizes), dim=3)
        references = [picture_latents(self.part["vae"], camera) for camera in cameras]
        denoising = self.settings.mode == "denoise"
        target = [flow_target(references[0], t)] if denoising else []
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

        parts = dict.fromkeys(("scheduler", "vae", "tokenizer", "transformer"))
        reading = {name: self.part[name] for name in ("text_encoder", "processor")}
        return PromptReader(getattr(diffusers, self.entry.family)(**parts, **reading), self.picture_label, self.device)

    @functools.cached_property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        return self.settings.reference_sizes

    @functools.cached_property
    def _read_sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.read_size(size) for size in self._sizes)

    def _placed(self, text: int) -> int:
        """`text`, if the transformer has positions for so many tokens beside these pictures."""
        if text_start(self._sizes) + text > len(self.denoiser.pos_embed.pos_freqs):
            raise UsageError(
                f"{text} text tokens, the pictures' among them, are more than {self.entry.name} has positions for",
                "choose smaller pictures with --image-size",
            )
        return text


def _picture(name: Segment, size: tuple[int, int], frame: int) -> SegmentSpec:
    return picture_segment(name, size, PIXELS_PER_TOKEN, picture_positions(size, frame))


class QwenPlusEditor(QwenEditor):
    """A QwenImageEditPlusPipeline folder as an `Editor`: one reference picture, or one for each camera."""

    picture_label = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"

    @staticmethod
    def read_size(size: tuple[int, int]) -> tuple[int, int]:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        height, width = size
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, width / height)
        return height, width
