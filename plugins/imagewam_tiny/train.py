"""Train `tiny`: first the VAE on tabletop pictures, then text encoder and transformer on tabletop edits.

    python -m imagewam_tiny.train --out DIR [--seed 0] [--threads 2]

Each stage writes checkpoints and resumes from the last one. Every random number depends on the seed: the same seed,
thread count and torch build give the same weights.

The editor stages train exactly what `imagewam cache` stores. One forward pass over [text | reference] at the fixed
`PREFIX_TIMESTEP` gives keys and values; a second forward pass, over the noisy target at its own random timestep,
attends to them. Text and reference never attend to the target (the published mask). The prefix has the same timestep in
training and in use, unlike in the published training.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagewam_cli.expert.flow import FlowSchedule, add_noise, velocity
from imagewam_cli.files import atomic_file, partial_of
from imagewam_cli.sim.tabletop.edits import Edit, sample_edit
from imagewam_cli.sim.tabletop.render import TABLE_RGB
from imagewam_cli.sim.tabletop.scene import sample_scene
from imagewam_flux2.tokens import FluxTokens, image_ids
from imagewam_tiny import architecture

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of one stage."""

    steps: int
    """Length of the learning rate schedule."""
    batch: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    save_every: int = 250
    stop: int | None = None
    """Step at which to end the stage, before the end of its schedule."""

    @property
    def total_steps(self) -> int:
        """Number of steps of the stage."""
        return self.steps if self.stop is None else self.stop

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to 1 %."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass(frozen=True, kw_only=True)
class EditorConfig(TrainConfig):
    """Hyperparameters of an editor stage."""

    shift: float
    """Shift of the schedule of noise levels."""
    draws: int = 1
    """Number of noisy targets per prefix, which is computed once for all of them."""
    changed_weight: float = 1.0
    """Weight in the loss of a token that the edit changes; other tokens weigh 1."""
    prefix_weight: float = 0.0
    """Weight of the loss at the reference tokens, see `train_editor`."""
    beside_share: float | None = None
    """Fraction of edits that put a block beside another; None: the tabletop's own fraction, about a quarter."""
    first_edit_number: int = 0
    """Number of the stage's first edit, so that each stage has its own scenes."""


VAE_STAGE = TrainConfig(steps=1100, batch=32, learning_rate=2e-3, warmup=50, ema=0.99, save_every=100)
EDITOR_STAGES = (
    EditorConfig(steps=2100, batch=32, learning_rate=1e-3, ema=0.995, save_every=150, shift=3.0, draws=2),
    EditorConfig(
        steps=2700, batch=32, learning_rate=1e-3, ema=0.995, save_every=100, shift=3.0, changed_weight=4.0,
        prefix_weight=1.0, first_edit_number=10**7, stop=700,
    ),
    EditorConfig(
        steps=2400, batch=32, learning_rate=1e-3, warmup=50, ema=0.995, save_every=100, shift=3.0, changed_weight=4.0,
        prefix_weight=1.0, beside_share=0.5, first_edit_number=2 * 10**7,
    ),
)  # fmt: skip
"""The first stage learns the whole picture, which has most of the error. The second weights the few tokens that the
instruction changes, and trains the prefix to compute the change. The third stage contains a larger share of
the edits that are learned last."""
KL_WEIGHT = 2e-7
OBJECT_WEIGHT = 4.0
"""Weight of a pixel that is not bare table in the VAE's loss: blocks and jaws are a few percent of a picture."""
CHANGE = 0.5
"""Change of any channel, in standard deviations of the latents, above which a token counts as changed."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded editor `tiny` from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained pipeline")
    parser.add_argument("--work", type=Path, default=Path("tiny-training"), help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pipeline = architecture.build_pipeline(arguments.seed)
    train_vae(pipeline.vae, VAE_STAGE, arguments.work / "vae.safetensors", arguments.seed)
    for number, stage in enumerate(EDITOR_STAGES):
        train_editor(pipeline, stage, arguments.work / f"editor-{number}.safetensors", arguments.seed)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.to(torch.float16)
    architecture.save_pipeline(pipeline, arguments.out)


def train_vae(vae: AutoencoderKLFlux2, config: TrainConfig, checkpoint: Path, seed: int) -> None:
    """Train the VAE on crops and whole pictures, then set the batch norm to the mean and variance of its latents."""
    stage = _Stage(vae, config, checkpoint)
    for step in stage.remaining():
        whole = step % 4 == 3
        pictures = to_tensor(_pictures(seed, step, config.batch // 4 if whole else config.batch))
        if not whole:  # the network is convolutional: crops teach as much at a quarter of the cost
            corner = np.random.default_rng([seed, step]).integers(0, 65, size=(len(pictures), 2))
            pictures = torch.stack([p[:, y : y + 64, x : x + 64] for p, (y, x) in zip(pictures, corner, strict=True)])
        torch.manual_seed(1_000_000 * (seed + 1) + step)
        with mixed_precision():
            posterior = vae.encode(pictures).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - pictures
        weight = 1 + (OBJECT_WEIGHT - 1) * _object_mask(pictures)
        loss = (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * posterior.kl().mean()
        stage.advance(step, loss)
    stage.finish()
    latents = torch.cat([encode_mean(vae, to_tensor(_pictures(seed, 10**6 + i, 32))) for i in range(16)])
    vae.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))


def train_editor(pipeline: Flux2KleinPipeline, config: EditorConfig, checkpoint: Path, seed: int) -> None:
    """Train text encoder and transformer by flow matching: (picture before, instruction) -> picture after.

    With a `prefix_weight`, the denoiser's output at the reference tokens also learns to predict the change of the
    latents there. A policy sees only the prefix. Without this loss, the model could compute only at the target tokens
    which block moves and where; with it, the prefix does, and the keys and values of the later layers carry the answer.
    """
    tokens = FluxTokens.from_pipeline(
        pipeline, text_layers=architecture.TEXT_LAYERS, max_text_tokens=architecture.MAX_TEXT_TOKENS
    )
    trained = torch.nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder.model})
    schedule = FlowSchedule(shift=config.shift)
    stage = _Stage(trained, config, checkpoint)
    for step in stage.remaining():
        edits = _edits(config, seed, step)
        with mixed_precision():
            before, after = _latents(tokens, edits)
        generator = torch.Generator().manual_seed(1_000_000 * (seed + 1) + step)
        target = after.repeat(config.draws, 1, 1)
        noise = torch.randn(target.shape, generator=generator)
        t = schedule.sample(len(target), generator)
        with mixed_precision():
            text = tokens.text([e.instruction for e in edits], grad=True)
            prefix = tokens.prefix(
                text, before, image_ids(8, 8, t=10), timestep=architecture.PREFIX_TIMESTEP, grad=True
            )
            predicted = tokens.target_velocity(prefix.repeat(config.draws), add_noise(target, noise, t), t)
        error = (predicted.float() - velocity(target, noise)).square().mean(-1)
        weight = 1 + (config.changed_weight - 1) * _changed(before, after)
        loss = _weighted(error, weight.repeat(config.draws, 1))
        if config.prefix_weight:
            assert prefix.output is not None
            error = (prefix.output.float() - (after - before)).square().mean(-1)
            loss = loss + config.prefix_weight * _weighted(error, weight)
        stage.advance(step, loss)
    stage.finish()


def mixed_precision() -> torch.autocast:
    """Return a context of bfloat16 products with float32 weights and sums: twice as fast on CPUs with bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


def to_tensor(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_mean(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """Return packed latents before the batch norm, (B, 4 C, H / 16, W / 16)."""
    with torch.no_grad():
        return F.pixel_unshuffle(vae.encode(pictures).latent_dist.mode(), 2)


def _edits(config: EditorConfig, seed: int, step: int) -> list[Edit]:
    """Return the edits of a step. With a `beside_share`, each edit is the first of its seeds with the required kind."""
    first = seed * 10**8 + config.first_edit_number + step * config.batch
    if config.beside_share is None:
        return [sample_edit(first + i) for i in range(config.batch)]
    kinds = ["beside" if i < config.beside_share * config.batch else "place" for i in range(config.batch)]
    return [sample_edit(_first_of_kind(kind, first + i)) for i, kind in enumerate(kinds)]


def _first_of_kind(kind: str, number: int) -> int:
    """Return the first of the seeds 100 number, 100 number + 1, ... whose task is of that kind."""
    return next(s for s in range(100 * number, 100 * number + 100) if sample_scene(s).task.kind == kind)


def _weighted(error: Tensor, weight: Tensor) -> Tensor:
    return (weight * error).mean() / weight.mean()


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Return float32 (B, T), 1 at the tokens that the edit changes."""
    return ((before - after).abs().amax(-1) > CHANGE).float()


def _object_mask(pictures: Tensor) -> Tensor:
    """Return float32 (B, 1, H, W), 1 at pixels that are not bare table."""
    table = torch.tensor(TABLE_RGB).view(1, 3, 1, 1) / 127.5 - 1
    return ((pictures - table).abs().amax(1, keepdim=True) > 0.1).float()


def _latents(tokens: FluxTokens, edits: list[Edit]) -> tuple[Tensor, Tensor]:
    both = to_tensor(np.stack([e.before for e in edits] + [e.after for e in edits]))
    latents = tokens.image(both)
    return latents[: len(edits)].float(), latents[len(edits) :].float()


def _pictures(seed: int, step: int, count: int) -> npt.NDArray[np.uint8]:
    edits = [sample_edit(seed * 10**8 + step * count + i) for i in range(count)]
    return np.stack([e.before if i % 3 else e.after for i, e in enumerate(edits)])


class _Stage:
    """Training of one model with AdamW, an average of its weights, checkpoints and printed progress."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig, checkpoint: Path) -> None:
        self.model, self.config, self.checkpoint = model.train(), config, checkpoint
        self.parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.started = time.monotonic()
        self.losses: list[float] = []

    def remaining(self) -> Iterator[int]:
        """Yield the remaining steps: all steps, or the ones after the checkpoint."""
        yield from range(self._restore(), self.config.total_steps)

    def advance(self, step: int, loss: Tensor) -> None:
        """Take one optimizer step, and write a checkpoint every `save_every` steps."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {float(loss.detach())} at step {step}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        # average over few steps at first, so that the initial weights do not dominate it
        decay = min(self.config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        self.losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            recent = sum(self.losses[-50:]) / len(self.losses[-50:])
            elapsed = time.monotonic() - self.started
            print(f"{self.checkpoint.stem} step {step + 1} loss {recent:.4f} {elapsed:.0f} s", flush=True)
        if (step + 1) % self.config.save_every == 0:
            self._save(step + 1)

    def finish(self) -> None:
        """Replace the model's weights by their average."""
        self._save(self.config.total_steps)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        self.model.eval()

    def _save(self, step: int) -> None:
        state = {f"model.{k}": p.detach().contiguous() for k, p in self.parameters.items()}
        state |= {f"average.{k}": p.contiguous() for k, p in self.average.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            state |= {f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]} if moments else {}
        with atomic_file(self.checkpoint, partial=partial_of(self.checkpoint)) as temporary:
            save_file(state, temporary, metadata={"step": str(step)})

    def _restore(self) -> int:
        if not self.checkpoint.exists():
            return 0
        from safetensors import safe_open

        with safe_open(self.checkpoint, framework="pt") as file:
            step = int(file.metadata()["step"])
        state = load_file(self.checkpoint)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"model.{name}"])
                self.average[name].copy_(state[f"average.{name}"])
                if f"first.{name}" in state:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": state[f"first.{name}"],
                        "exp_avg_sq": state[f"second.{name}"],
                    }
        return step


if __name__ == "__main__":
    main()
