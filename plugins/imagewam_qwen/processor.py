"""The half of Qwen2.5-VL's processor that an editor needs: text with pictures, no videos, pictures on Pillow.

Released folders hold a `Qwen2VLProcessor`. transformers builds its video half with torchvision alone, which nothing
here needs, and its picture half with torchvision where that is installed and Pillow elsewhere. The two resize to
different pixels, and a cache must not depend on what is installed. Importing this module imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """A `Qwen2VLProcessor` folder without its video processor."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """The tokenizer that the folder names, and Qwen2-VL's picture processor on Pillow."""
        return cls(Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def picture_tokens(image_processor: Any, size: tuple[int, int]) -> int:
    """Text tokens that stand for a picture of (height, width) pixels."""
    patches: int = image_processor.get_number_of_image_patches(*size)
    return patches // int(image_processor.merge_size) ** 2
