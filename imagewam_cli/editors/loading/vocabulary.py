"""Check tokenizers and processors: their files before they are loaded, and what they make of words afterwards.

transformers loads a tokenizer without its vocabulary: a handful of special tokens remain, and every word becomes the
same one. Nothing of that is an error there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewam_cli.editors.loading.weight_files import AGAIN, require_content
from imagewam_cli.errors import EditorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = "tokenizer.json"
_PARTS = (("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",), ("sentencepiece.bpe.model",))
"""Sets of files, each of which makes a tokenizer without `tokenizer.json`."""
_CONFIG = "tokenizer_config.json"
_ANY = ("PreTrainedTokenizer", "TokenizersBackend")
"""Classes that read the tokenizer of any model."""
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_PROBE = "the quick brown fox jumps over the lazy dog"
"""Every letter, so that no vocabulary that lacks one passes."""
_LEAST_SHARE = 0.1
"""Smallest number of words of a tokenizer, relative to those that its text encoder knows."""


def require_tokenizer_files(folder: Path, kind: type) -> None:
    """Check that a tokenizer has its vocabulary.

    Raises:
        EditorError: a file is missing, empty or was not downloaded.
    """
    named: Mapping[str, str] = getattr(kind, "vocab_files_names", None) or {}
    own = tuple(name for key, name in named.items() if key != "tokenizer_file")
    sets = [(_WHOLE,), *([own] if own and _WHOLE in named.values() and len(named) > 1 else _PARTS)]
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    complete = next((files for files in sets if present.issuperset(files)), None)
    if complete is None:
        wanted = " or ".join(" and ".join(files) for files in sets[:3])
        raise EditorError(f"{folder} has no vocabulary: {wanted} is missing", AGAIN)
    if _CONFIG not in present:
        raise EditorError(f"{folder} lacks {_CONFIG}, which names its special tokens and its limit", AGAIN)
    for name in (*complete, _CONFIG):
        require_content(folder / name)
    found = json.loads((folder / _CONFIG).read_bytes()).get("tokenizer_class")
    if named and found and _plain(found) not in {*_ANY, _plain(kind.__name__)}:
        raise EditorError(
            f"{folder / _CONFIG} describes {found}, and the editor needs {kind.__name__}",
            "pass a folder whose components belong to the editor",
        )


def _plain(name: str) -> str:
    """Return the name of a tokenizer's class without its ending: both kinds of tokenizers give the same tokens."""
    return name.removesuffix("Fast")


def require_processor_files(folder: Path) -> None:
    """Check that a processor of pictures has its settings.

    Raises:
        EditorError: the file is missing, empty or was not downloaded.
    """
    found = next((folder / name for name in _PROCESSOR if (folder / name).exists()), None)
    if found is None:
        raise EditorError(f"{folder} lacks {_PROCESSOR[0]}, which says how pictures are resized", AGAIN)
    require_content(found)


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, encoder: Mapping[str, Any]) -> None:
    """Check that a loaded tokenizer distinguishes words, and that its text encoder knows its tokens.

    encoder: config.json of the text encoder.

    Raises:
        EditorError: the vocabulary is incomplete, or belongs to another model.
    """
    vocabulary, known = tokenizer.get_vocab(), _known_tokens(encoder)
    largest = max(vocabulary.values(), default=-1)
    if known is not None and largest >= known:
        raise EditorError(
            f"{folder} has tokens up to number {largest}, but its text encoder knows {known}: it is of another model",
            "pass tokenizer and text encoder of one model",
        )
    if known is not None and len(vocabulary) < _LEAST_SHARE * known:
        raise EditorError(
            f"{folder} has {len(vocabulary)} tokens, but its text encoder knows {known}: its vocabulary is incomplete",
            AGAIN,
        )
    for key in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        number = encoder.get(key)
        token = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
        if number is not None and (not token or tokenizer(token, add_special_tokens=False).input_ids != [number]):
            raise EditorError(f"{folder} has no token for pictures (number {number}, the text encoder's {key})", AGAIN)
    ids = tokenizer(_PROBE, add_special_tokens=False, verbose=False).input_ids
    read = str(tokenizer.decode(ids, skip_special_tokens=True))
    lost = sorted({letter for letter in _PROBE if letter.isalpha()} - set(read.lower()))
    if lost:
        raise EditorError(
            f"{folder} cannot write {len(lost)} of 26 letters, including {lost[0]!r}: its vocabulary is incomplete",
            AGAIN,
        )


def require_chat_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Check that a tokenizer has the template in which its text encoder was trained to read a sentence.

    Raises:
        EditorError: it has none.
    """
    if not tokenizer.chat_template:
        raise EditorError(
            f"{folder} has no chat template: neither chat_template.jinja, nor `chat_template` in tokenizer_config.json",
            AGAIN,
        )


def _known_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a text encoder knows, from its config.json; None if that does not say."""
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    return int(size) if isinstance(size, int) else None
