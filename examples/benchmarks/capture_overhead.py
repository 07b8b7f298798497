"""Measure the cost of recording keys and values: a plain forward pass, a recorded one, and one that stops early.

    python examples/benchmarks/capture_overhead.py

Models with random weights at the widths of released ones: FLUX.2-klein-4B's blocks (24 heads of 128), one double and
two single ones, 418 tokens; and InstructPix2Pix's whole UNet at 256 pixels. Goal: recording takes at most 3 % more.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from timing import interleaved, machine, table

from imagewam_cli.prefix.capture import attention_layers, record
from imagewam_cli.registry import Registry

BARE, RECORDED, EARLY = "bare", "recorded", "recorded, stopped early"
_SMALL_FLUX = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
_SMALL_UNET = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="use tiny sizes, only to check that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    results = {name: measure(*MODELS[name](arguments.small), arguments.repetitions) for name in arguments.models}
    if arguments.json:
        print(json.dumps({"machine": machine(), "seconds": results}, indent=2))
        return
    print(machine())
    for name, seconds in results.items():
        print("\n" + table(name, seconds, BARE))
        print(f"\noverhead of recording: {100 * (seconds[RECORDED] / seconds[BARE] - 1):+.1f} %")


def measure(model: Any, inputs: dict[str, Any], repetitions: int) -> dict[str, float]:
    """Return median seconds of each way to run the model, recording every attention layer."""
    names = list(attention_layers(model, **inputs))

    def recorded(early: bool) -> None:
        with torch.no_grad(), record(model, names, stop_after_last=early):
            model(**inputs)

    def bare() -> None:
        with torch.no_grad():
            model(**inputs)

    calls = {BARE: bare, RECORDED: lambda: recorded(False), EARLY: lambda: recorded(True)}
    return interleaved(calls, repetitions)


def flux(small: bool) -> tuple[Any, dict[str, Any]]:
    """Build one double and two single blocks with inputs of 392 reference tokens and 26 of text."""
    from diffusers import Flux2Transformer2DModel

    from imagewam_flux2.tokens import REFERENCE_T, image_ids, text_ids

    config = Registry.installed().editors.get("flux2-klein-4b").config
    sizes = {**config, "num_layers": 1, "num_single_layers": 2} | (_SMALL_FLUX if small else {})
    model = Flux2Transformer2DModel(**sizes).eval().requires_grad_(False)
    reference, text = (
        torch.randn(1, 392, model.config.in_channels),
        torch.randn(1, 26, model.config.joint_attention_dim),
    )
    return model, {
        "hidden_states": reference,
        "encoder_hidden_states": text,
        "timestep": torch.zeros(1),
        "img_ids": image_ids(14, 28, t=REFERENCE_T),
        "txt_ids": text_ids(26),
        "guidance": None,
    }


def unet(small: bool) -> tuple[Any, dict[str, Any]]:
    """Build the whole UNet with inputs of 32 x 32 latents and 77 text tokens."""
    from diffusers import UNet2DConditionModel

    config = dict(Registry.installed().editors.get("instruct-pix2pix").config) | (_SMALL_UNET if small else {})
    model = UNet2DConditionModel(**config).eval().requires_grad_(False)
    side = 16 if small else 32
    return model, {
        "sample": torch.randn(1, 8, side, side),
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(1, 77, model.config.cross_attention_dim),
    }


MODELS = {"flux2-klein-4b, 1 + 2 blocks": flux, "instruct-pix2pix, 256 px": unet}

if __name__ == "__main__":
    main()
