"""Qwen2.5-VL's processor without videos, resizing pictures with Pillow.

Released folders hold a `Qwen2VLProcessor`. transformers needs torchvision for its videos, which imagewam does not use,
and resizes pictures with torchvision if it is installed, otherwise with Pillow. The two give different pixels, and a
cache must not depend on what is installed. Importing this module imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from transformers import AutoTokenizer, Qwen2VLProcessor

# transformers 5.4 exports this class only with torchvision, which it does not use
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """A `Qwen2VLProcessor` folder without its video processor."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Load the folder's tokenizer, and its picture processor on Pillow."""
        return cls(Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def picture_tokens(image_processor: Qwen2VLImageProcessorPil, size: tuple[int, int]) -> int:
    """Return the number of text tokens that represent a picture of (height, width) pixels."""
    patches: int = image_processor.get_number_of_image_patches(*size, {})  # 5.5 and older fail without the dict
    return patches // int(image_processor.merge_size) ** 2
