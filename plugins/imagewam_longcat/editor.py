"""LongCat-Image-Edit as an editor: one forward of its joint transformer over the states of a vision-language model,
which sees picture and instruction, and the reference picture's latents.

Modes `prefix`, the default, and `denoise`, both at timestep 1, where editing starts, for the reasons in
`imagewam_cli.editors.joint`: LongCat has one timestep for target and reference, and they see each other.
Guidance is outside the network: the conditional branch needs none.

Text: the picture's tokens, then the instruction. The pipeline shows the transformer the states of all 512 positions of
a padded instruction (`keep`, the default). `trim` drops the padding: the encoder is causal, so no other state changes,
and pictures keep the ids that they have behind 512 positions. Rows of different lengths are masked inside the blocks,
which take a mask that the transformer itself does not hand on.

The encoder sees every row's picture and is never freed. Default size 512 pixels: 1024 tokens, and 81 of the encoder.
The pipeline resizes every picture to about one megapixel; its size is the user's here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from imagewam_cli.plugin import EditorError, JointEditor, PrefixSettings, Prompt, Text, UInt8Image
from imagewam_longcat.prompt import LongCatPrompt, seen_tokens


class LongCatEditor(JointEditor):
    """A LongCatImageEditPipeline folder as an `Editor`."""

    reads_picture = True
    picture_ids = MappingProxyType({"target": 1, "reference": 2})
    text_moves = (1, 2)
    # text is 0: the next one is nobody's, and as far from the reference as the reference is from the target
    action_id = 3

    @classmethod
    def picture_text(cls, settings: PrefixSettings) -> int:
        from transformers import Qwen2VLImageProcessorPil

        return seen_tokens(Qwen2VLImageProcessorPil(), settings.image_size)

    def fingerprint_extras(self) -> Mapping[str, object]:
        return {"preamble": self._prompts.preamble}

    def text_tokens(self, prompt: str) -> int:
        keep = self.settings.text_padding == "keep"
        room = self.entry.defaults.text_limit if keep else len(self._prompts.instruction_ids(prompt))
        return self._seen_tokens + room

    def embed(self, prompt: str, picture: UInt8Image | None) -> Prompt:
        assert picture is not None
        return Prompt(states=self._prompts.states(prompt, picture, padded=self.settings.text_padding == "keep"))

    @classmethod
    def picture_start(cls, settings: PrefixSettings, text: int) -> int:
        """Behind the text, padded."""
        return text if settings.text_padding == "keep" else cls.picture_text(settings) + cls.entry.defaults.text_limit

    def prepare(self) -> None:
        said = self.picture_text(self.settings)
        if self.settings.text_padding == "trim" and self._seen_tokens != said:
            raise EditorError(
                f"the folder's text_processor makes {self._seen_tokens} tokens of a picture, the family's {said}",
                "use --text-padding keep, with which places are told from the text itself",
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
    def _seen_tokens(self) -> int:
        """Text tokens that stand for the picture."""
        return seen_tokens(self.part["text_processor"], self.settings.image_size)


@contextlib.contextmanager
def _masked(transformer: Any, mask: Tensor | None) -> Iterator[None]:
    """Let the attention of every block see only what `mask` says, which goes to the blocks: the transformer's own
    forward has no argument for it."""
    if mask is None:
        yield
        return

    def add_mask(module: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "joint_attention_kwargs": {"attention_mask": mask}}

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [block.register_forward_pre_hook(add_mask, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
