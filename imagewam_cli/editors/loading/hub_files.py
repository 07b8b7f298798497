"""The files of a Hub repository that an editor reads: its components' weights, configs and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from imagewam_cli.errors import EditorError
from imagewam_cli.hookspecs import EditorEntry

_WEIGHTS = "*.safetensors"
_READ = (_WEIGHTS, "*.json", "*.txt", "*.jinja", "*.model")
VARIANTS = ("*.*.safetensors", "*.index.*.json", "*.*.*.index.json")
"""Second copies of the same weights, which diffusers and transformers mark with an arbitrary word (fp16, non_ema):
NAME.WORD.safetensors, in shards NAME.WORD-00001-of-00002.safetensors or NAME-00001-of-00002.WORD.safetensors, with the
index NAME.safetensors.index.WORD.json or NAME.safetensors.WORD.index.json. Names of plain weights have no dot."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_loaded_file(name: str) -> bool:
    """Return whether loading a part reads a file of this name: weights, configs, tokenizers, but no second copies."""
    return any(fnmatch(name, p) for p in _READ) and not any(fnmatch(name, p) for p in VARIANTS)


def patterns(entry: EditorEntry) -> list[str]:
    """Return huggingface_hub's patterns of the files that the plugin reads."""
    return ["model_index.json", *(f"{c}/{kind}" for c in entry.components for kind in _READ)]


def require_safetensors(entry: EditorEntry, component: str, names: Sequence[str]) -> None:
    """Check that a component has files and, if it has parameters, safetensors weights in the standard precision.

    Raises:
        EditorError: it has no files, or its weights are only pickles or second copies.
    """
    inside = [n for n in names if n.startswith(f"{component}/")]
    if not inside:
        raise EditorError(f"{entry.repo} has no {component}/: it is not a {entry.family} repository")
    weights = [n for n in inside if fnmatch(n, _WEIGHTS)]
    pickled = [n for n in inside if any(fnmatch(n, p) for p in _PICKLES)]
    if any(is_loaded_file(n) for n in weights) or not (pickled or entry.components[component].parameters):
        return
    hint = "choose a --revision with safetensors, or convert them and pass the folder with --weights DIR"
    if weights:
        raise EditorError(
            f"{entry.repo} has safetensors of {component}/ only as a variant ({weights[0]}), which is not read", hint
        )
    if pickled:
        raise EditorError(
            f"{entry.repo} has weights of {component}/ only as a pickle ({pickled[0]}), which can run arbitrary code",
            hint,
        )
    raise EditorError(f"{entry.repo} has no weights of {component}/ as safetensors", hint)
