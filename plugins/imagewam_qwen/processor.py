"""The half of Qwen2.5-VL's processor that an editor needs: text with pictures, no videos.

Released folders hold a `Qwen2VLProcessor`. transformers builds its video half with torchvision alone, which nothing
here needs. Importing this module imports transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """A `Qwen2VLProcessor` folder without its video processor: transformers loads what this signature names."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def picture_tokens(image_processor: Any, size: tuple[int, int]) -> int:
    """Text tokens that stand for a picture of (height, width) pixels."""
    patches: int = image_processor.get_number_of_image_patches(*size)
    return patches // int(image_processor.merge_size) ** 2
