"""LongCat-Image-Edit as an editor.

Its joint transformer attends over the reference picture's latents and the states of a vision-language model, which
reads the picture and the instruction.

Modes `prefix` (the default) and `denoise` both use timestep 1, where editing starts; `imagewam_cli.editors.joint` gives
the reasons. Target and reference have one timestep and attend to each other. Guidance is applied outside the network,
so only the conditional branch runs.

Text is the picture's tokens, then the instruction. The pipeline passes all 512 positions of a padded instruction to the
transformer (`keep`, the default). `trim` drops the padding. The encoder is causal, so the other states do not change,
and pictures keep their position ids after 512 text positions. In a batch, shorter rows are masked inside the blocks:
the blocks accept a mask, although the transformer does not pass one on.

The encoder reads every row's picture, so it is never freed. At the default size of 512 pixels a picture has 1024 tokens
in the transformer and 81 in the encoder. The pipeline resizes every picture to about one megapixel; here the user
chooses the size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from imagewam_cli.plugin import (
    EditorError,
    JointEditor,
    PrefixSettings,
    Prompt,
    PromptTokens,
    SharedSize,
    Text,
    UInt8Image,
    picture_width,
    text_width,
)
from imagewam_longcat.prompt import LongCatPrompt, picture_tokens

if TYPE_CHECKING:
    from diffusers import LongCatImageTransformer2DModel

_RELEASED_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
"""Least and greatest number of pixels that LongCat's own processor reads. Not taken from its class, whose defaults
transformers 5.4 overwrites with those of the folder that was loaded last."""


class LongCatEditor(JointEditor):
    """A LongCatImageEditPipeline folder as an `Editor`."""

    reads_picture = True
    picture_ids = MappingProxyType({"target": 1, "reference": 2})
    text_moves = (1, 2)
    # ids 0, 1 and 2 are text, target and reference; 3 is free, and as far from the reference as the target is
    action_id = 3

    @classmethod
    def picture_text(cls, settings: PrefixSettings) -> int:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return picture_tokens(Qwen2VLImageProcessorPil(size=dict(_RELEASED_PIXELS)), settings.image_size)

    def fingerprint_extras(self) -> Mapping[str, object]:
        return {"preamble": self._prompts.preamble}

    def text_tokens(self, prompt: str) -> int:
        keep = self.settings.text_padding == "keep"
        room = self.entry.defaults.text_limit if keep else len(self._prompts.instruction_ids(prompt))
        return self._picture_tokens + room

    def prompt_tokens(self, prompt: str) -> Mapping[str, PromptTokens]:
        return {"tokenizer": self._prompts.prompt_tokens(prompt)}

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        assert picture is not None
        return Prompt(states=self._prompts.states(prompt, picture, padded=self.settings.text_padding == "keep"))

    @classmethod
    def picture_start(cls, settings: PrefixSettings, text: int) -> int:
        """Return the ids of a picture's first token, which follow the padded text even if the padding is dropped."""
        return text if settings.text_padding == "keep" else cls.picture_text(settings) + cls.entry.defaults.text_limit

    @classmethod
    def shared_sizes(cls) -> tuple[SharedSize, ...]:
        return text_width("text_encoder.hidden_size"), picture_width("vae.latent_channels")

    def prepare(self) -> None:
        expected = self.picture_text(self.settings)
        if self.settings.text_padding == "trim" and self._picture_tokens != expected:
            raise EditorError(
                f"the folder's text_processor turns a picture into {self._picture_tokens} tokens; "
                f"LongCat's own processor gives {expected}",
                "use --text-padding keep, which takes positions from the length of the text",
            )

    def forward(self, image: Tensor, text: Text, mask: Tensor | None, **inputs: Tensor) -> None:
        with _masked(self.denoiser, mask):
            self.denoiser(hidden_states=image, encoder_hidden_states=text.embeds, return_dict=False, **inputs)

    @functools.cached_property
    def _prompts(self) -> LongCatPrompt:
        return LongCatPrompt(
            tokenizer=self.part["tokenizer"],
            text_processor=self.part["text_processor"],
            text_encoder=self.part["text_encoder"],
            max_tokens=self.entry.defaults.text_limit,
            device=self.device,
        )

    @property
    def _picture_tokens(self) -> int:
        """Number of text tokens that represent the picture."""
        return picture_tokens(self.part["text_processor"], self.settings.image_size)


@contextlib.contextmanager
def _masked(transformer: LongCatImageTransformer2DModel, mask: Tensor | None) -> Iterator[None]:
    """Pass an attention mask to every block. The transformer's own `forward` has no argument for it."""
    if mask is None:
        yield
        return

    def add_mask(
        module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return args, {**kwargs, "joint_attention_kwargs": {"attention_mask": mask}}

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [block.register_forward_pre_hook(add_mask, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
