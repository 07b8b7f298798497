"""Edit pictures with `tiny`, to see what it has learned. imagewam itself never decodes a picture.

    python -m imagewam_tiny.edit --out sheet.png

draws a sheet of input / edited / ground-truth pictures of unseen scenes (seeds 0 to 63). It prints the rate of correct
edits and, as a baseline, the rate at which an unchanged copy of the input counts as correct.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.plugin import PrefixOptions, UInt8Image
from imagewam_cli.sim.tabletop.edits import Edit, judge_edit, sample_edit
from imagewam_cli.sim.tabletop.scene import Split
from imagewam_flux2.tokens import REFERENCE_T, FluxTokens, image_ids
from imagewam_tiny import architecture, imagewam_editors
from imagewam_tiny.editor import WEIGHTS, TinyEditor

EDIT_STEPS = 1
"""Number of Euler steps. One step predicts the mean of all possible results, which is correct here: an instruction
allows one result. More steps sample one result, which is sharper if there are several, but more often wrong here
(docs/reference/tiny.md)."""
EDIT_SHIFT = 3.0


def edit(
    tokens: FluxTokens,
    pictures: npt.NDArray[np.uint8],
    instructions: Sequence[str],
    *,
    steps: int = EDIT_STEPS,
    seed: int = 0,
) -> npt.NDArray[np.uint8]:
    """Edit pictures, uint8 (B, H, W, 3), with Euler steps of the target over one prefix."""
    height, width = (side // 16 for side in pictures.shape[1:3])
    grid = FlowSchedule(shift=EDIT_SHIFT).grid(steps)
    with torch.no_grad():
        reference = tokens.image(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
        prefix = tokens.prefix(
            tokens.text(instructions),
            reference,
            image_ids(height, width, t=REFERENCE_T),
            timestep=architecture.PREFIX_TIMESTEP,
        )
        x = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))
        for now, then in itertools.pairwise(grid):
            x = x + (then - now) * tokens.target_velocity(prefix, x, now.expand(len(x)))
        decoded = tokens.picture(x, height, width)
    edited: npt.NDArray[np.uint8] = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return edited


def judge(
    tokens: FluxTokens, split: Split, seeds: Sequence[int], *, steps: int = EDIT_STEPS, batch: int = 32
) -> tuple[list[bool], list[UInt8Image]]:
    """Edit the scene of each seed. Return whether each edited picture shows the finished task, and the pictures."""
    right: list[bool] = []
    pictures: list[UInt8Image] = []
    for i in range(0, len(seeds), batch):
        edits = [sample_edit(s, split, from_start=True) for s in seeds[i : i + batch]]
        edited = edit(tokens, np.stack([e.before for e in edits]), [e.instruction for e in edits], steps=steps)
        right += [judge_edit(p, e.scene) for p, e in zip(edited, edits, strict=True)]
        pictures += list(edited)
    return right, pictures


def sheet(edits: Sequence[Edit], edited: Sequence[UInt8Image], right: Sequence[bool], columns: int = 8) -> Image.Image:
    """Draw input, edit and ground truth of each scene in a column, above a green (correct) or red (incorrect) bar."""
    size, gap = edits[0].before.shape[0], 6
    rows = -(-len(edits) // columns)
    page = Image.new("RGB", (columns * (size + gap), rows * (3 * size + 3 * gap)), "white")
    for i, (e, picture, ok) in enumerate(zip(edits, edited, right, strict=True)):
        x, y = (i % columns) * (size + gap), (i // columns) * (3 * size + 3 * gap)
        for j, part in enumerate((e.before, picture, e.after)):
            page.paste(Image.fromarray(part), (x, y + j * size))
        page.paste((40, 160, 60) if ok else (210, 40, 40), (x, y + 3 * size, x + size, y + 3 * size + gap))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Edit tabletop pictures with the embedded editor and rate the results."
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write, with seeds 0 to 63")
    parser.add_argument("--scenes", type=int, default=256, help="number of scenes per split")
    parser.add_argument("--steps", type=int, default=EDIT_STEPS, help="number of Euler steps of an edit")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first scene")
    arguments = parser.parse_args()
    (entry,) = imagewam_editors()
    tokens = TinyEditor.bound_to(entry).load(PrefixOptions(), instructions=(), weights=arguments.weights).tokens
    rates: dict[str, dict[str, float]] = {}
    splits: tuple[Split, ...] = ("test", "heldout")
    for split in splits:
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.scenes)
        right, pictures = judge(tokens, split, seeds, steps=arguments.steps)
        edits = [sample_edit(s, split, from_start=True) for s in seeds]
        copies = [judge_edit(e.before, e.scene) for e in edits]
        kinds = {
            k: [r for r, e in zip(right, edits, strict=True) if e.scene.task.kind == k] for k in ("place", "beside")
        }
        rates[split] = {"right": float(np.mean(right)), "copy_of_input": float(np.mean(copies))} | {
            kind: float(np.mean(values)) for kind, values in kinds.items() if values
        }
        if split == "test":
            count = min(64, arguments.scenes)
            sheet(edits[:count], pictures[:count], right[:count]).save(arguments.out)
    print(json.dumps(rates, indent=2))


if __name__ == "__main__":
    main()
