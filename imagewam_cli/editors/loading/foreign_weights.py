"""Say what kind of weights a file holds that does not fit, judged by the names of its tensors.

Only for messages: whether weights fit is decided by comparing them with the model (`fit`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from imagewam_cli.editors.loading.weight_files import FULL_PRECISION

_MERGE = "merge the LoRA into the weights and save them without it, or pass the folder of the base model"
_DIFFUSERS = "pass a folder in the diffusers format; most repositories have one beside their single files"


@dataclass(frozen=True)
class _Sign:
    pattern: re.Pattern[str]
    meaning: str
    hint: str


def _sign(pattern: str, meaning: str, hint: str) -> _Sign:
    return _Sign(re.compile(pattern), meaning, hint)


_SIGNS = (
    _sign(
        r"quant_state|\.absmax$|\.nested_absmax$|\.quant_map$|\.SCB$",
        "they seem to be quantized by bitsandbytes",
        FULL_PRECISION,
    ),
    _sign(
        r"\.qweight$|\.qzeros$|\.g_idx$|\.wscales$",
        "they seem to be quantized by GPTQ, AWQ or SVDQuant",
        FULL_PRECISION,
    ),
    _sign(r"\.weight_packed$|_proj_blocks$", "they seem to be packed in 4 bits", FULL_PRECISION),
    _sign(
        r"[:_.](qdata|int_data|tensor_impl|zero_point)$|\.weight\._(data|scale)$|\.(input|output)_scale$(?<!\.input_scale)",
        "they seem to be quantized by torchao or quanto",
        FULL_PRECISION,
    ),
    _sign(
        r"weight_scale(_inv|_2)?$|scale_weight$|(^|\.)(input_scale|scale_input|act_scale|scaled_fp8)$",
        "they seem to be in 8 bits (fp8) with scales",
        FULL_PRECISION,
    ),
    _sign(r"\.base_layer\.", "they seem to hold a LoRA beside its base layers, as peft saves it", _MERGE),
    _sign(r"^lora_(unet|te)", "they seem to be a LoRA with the names of kohya's trainer", _MERGE),
    _sign(
        r"lora_[AB]\b|lora_(down|up)\b|\blora\.(down|up)\b|\.(hada|lokr)_\w+$|lora_magnitude|dora_scale|\.alpha$",
        "they seem to hold a LoRA",
        _MERGE,
    ),
    _sign(
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        "they seem to have the names of ComfyUI or of the model's first release",
        _DIFFUSERS,
    ),
    _sign(
        r"^((double|single)_blocks\.\d+\.|img_in\.|txt_in\.|final_layer\.|guidance_in\.)",
        "they seem to have the names of Black Forest Labs' own release",
        _DIFFUSERS,
    ),
    _sign(r"^(blk\.\d+\.|token_embd\.)", "they seem to be converted from GGUF", FULL_PRECISION),
)
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "transformer.", "unet.", "vae.", "model.", "ema.")
"""Prefixes that training frameworks put before every name."""
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


def kind_of_names(names: Collection[str]) -> str | None:
    """Return what the names of a file's tensors say about it; None if nothing."""
    return next((sign.meaning for sign in _SIGNS if any(sign.pattern.search(name) for name in names)), None)


def seems_to_be(
    expected: Collection[str], missing: Collection[str], unexpected: Collection[str], *, mismatched: bool
) -> tuple[str, str] | None:
    """Return what weights that do not fit seem to be, and what to do about it; None if nothing is known.

    expected: names of the model's tensors; missing: those that the file lacks; unexpected: other names in the file;
    mismatched: whether some tensors have another shape.
    """
    for sign in _SIGNS:
        if any(sign.pattern.search(name) for name in unexpected):
            return sign.meaning, sign.hint
    for prefix in _WRAPPERS:
        if unexpected and {name.removeprefix(prefix) for name in unexpected if name.startswith(prefix)} & set(missing):
            return (
                f"their names begin with {prefix!r}, which a training framework adds",
                "remove it from the names, or save the model with `save_pretrained`",
            )
    if (blocks := _other_blocks(expected, missing, unexpected)) is not None:
        return blocks, "pass the config.json that belongs to these weights, or the weights that belong to it"
    if unexpected and len(missing) > len(expected) / 2:
        return "they seem to be of another model, or named by another tool", _DIFFUSERS
    if mismatched:
        return "they seem to be of another size of the model", "pass config.json and weights of one model"
    return None


def _other_blocks(expected: Collection[str], missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """Say which numbers of blocks differ, if whole blocks are missing or unexpected and nothing else is."""
    if missing and unexpected:
        return None
    different = missing or unexpected
    stored = (set(expected) - set(missing)) | set(unexpected)
    stacks = {match[1] if (match := _BLOCK.match(name)) else "" for name in different}
    if "" in stacks:
        return None
    said = []
    for stack in sorted(stacks):
        there, here = _indices(stored, stack), _indices(expected, stack)
        if len(there) == len(here):
            return None
        said.append(f"{len(there)} blocks {stack!r} where config.json says {len(here)}")
    return f"they have {', and '.join(said)}" if said else None


def _indices(names: Collection[str], stack: str) -> set[int]:
    matches = (_BLOCK.match(name) for name in names)
    return {int(match[2]) for match in matches if match is not None and match[1] == stack}
