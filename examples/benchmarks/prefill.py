"""Measure what trimmed text and an early stop save, against a padded forward pass through the whole model.

    python examples/benchmarks/prefill.py

On a CPU: 12 heads of 64, 4 double and 8 single layers, 392 reference tokens, 512 text tokens, of which 25 are valid,
random weights, float32. Goal: at least twice as fast. On a CUDA device also FLUX.2-klein-4B's sizes in bfloat16:
prefill and 10 Euler steps of an expert (width 1024, horizon 32), eager, with compiled blocks, and as one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, machine, table
from torch import nn

from imagewam_cli.editors.loading.placement import compile_blocks, require_compiler
from imagewam_cli.editors.tokens import joint_layers
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.prefix.capture import record
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import LayerSpec, SegmentSpec
from imagewam_cli.registry import Registry
from imagewam_flux2.editor import Flux2Editor
from imagewam_flux2.tokens import REFERENCE_T, image_ids, text_ids

PADDED, PADDED_EARLY, TRIMMED, TRIMMED_EARLY = "padded", "padded, stopped early", "trimmed", "trimmed, stopped early"
ROWS, VALID, GRID, STEPS = 512, 25, (14, 28), 10
MEDIUM = {
    "num_layers": 4,
    "num_single_layers": 8,
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "joint_attention_dim": 768,
    "axes_dims_rope": (16, 16, 16, 16),
    "guidance_embeds": False,
}
SMALL = MEDIUM | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="use tiny sizes, only to check that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    model = transformer(SMALL if arguments.small else MEDIUM, torch.device("cpu"), torch.float32)
    results = {"prefill": (prefills(model, arguments.repetitions), PADDED)}
    if torch.cuda.is_available():
        results |= on_gpu(arguments.small, arguments.repetitions)
    if arguments.json:
        print(json.dumps({"machine": machine(), "seconds": {name: s for name, (s, _) in results.items()}}, indent=2))
        return
    print(machine())
    for name, (seconds, base) in results.items():
        print("\n" + table(name, seconds, base))
    medians = results["prefill"][0]
    print(f"\ntrimmed and stopped early: {medians[PADDED] / medians[TRIMMED_EARLY]:.2f} times as fast as padded")


def transformer(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import Flux2Transformer2DModel

    with device:
        model = Flux2Transformer2DModel(**config)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # the model's own `to` warns about half precision


def inputs(model: Any, text: int) -> dict[str, Any]:
    """Create the inputs of one row on the model's device, because a CUDA graph cannot contain copies from the host."""
    like = next(model.parameters())
    rows, columns = GRID
    return {
        "hidden_states": torch.randn(1, rows * columns, model.config.in_channels).to(like),
        "encoder_hidden_states": torch.randn(1, text, model.config.joint_attention_dim).to(like),
        "timestep": torch.zeros(1).to(like),
        "img_ids": image_ids(rows, columns, t=REFERENCE_T).to(like.device),
        "txt_ids": text_ids(text).to(like.device),
        "guidance": None,
    }


def layers_of(model: Any, text: int) -> tuple[LayerSpec, ...]:
    reference = SegmentSpec(name="reference", tokens=GRID[0] * GRID[1], grid=GRID)
    return joint_layers(model, (SegmentSpec(name="text", tokens=text), reference))


def prefix(model: Any, given: dict[str, Any], names: list[str]) -> PrefixKV:
    """Run the recorded forward pass, which stops after the last recorded layer."""
    with torch.no_grad(), record(model, names, stop_after_last=True) as recording:
        model(**given)
    return PrefixKV(tuple(recording.layers[name] for name in names), None)


def prefills(model: Any, repetitions: int) -> dict[str, float]:
    padded, trimmed = inputs(model, ROWS), inputs(model, VALID)
    names = [layer.name for layer in layers_of(model, VALID)]

    def whole(given: dict[str, Any]) -> None:
        with torch.no_grad():
            model(**given)

    calls: dict[str, Callable[[], object]] = {
        PADDED: lambda: whole(padded),
        PADDED_EARLY: lambda: prefix(model, padded, names),
        TRIMMED: lambda: whole(trimmed),
        TRIMMED_EARLY: lambda: prefix(model, trimmed, names),
    }
    return interleaved(calls, repetitions)


def on_gpu(small: bool, repetitions: int) -> dict[str, tuple[dict[str, float], str]]:
    """Measure FLUX.2-klein-4B's sizes with trimmed text: prefill alone, and with the expert's steps."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    config = SMALL if small else dict(Registry.installed().editors.get("flux2-klein-4b").config)
    model = transformer(config, device, dtype)
    act = Acting(model, inputs(model, VALID), expert(model, 1024, 32).to(device, dtype))
    eager = {"prefill": act.prefill, "prefill and steps": act.whole}
    times = {f"eager {name}": s for name, s in interleaved(eager, repetitions).items()}
    graphs = {f"CUDA graph {name}": replayed(call) for name, call in eager.items()}
    times |= interleaved(graphs, repetitions)
    require_compiler(device)
    compile_blocks(model)
    act.expert.compile()
    times |= {f"compiled {name}": s for name, s in interleaved(eager, repetitions).items()}
    return {"flux2-klein-4b, one row": (times, "eager prefill and steps")}


def expert(model: Any, hidden: int, horizon: int) -> ActionExpert:
    config = ExpertConfig(
        layers=layers_of(model, VALID),
        rope=Flux2Editor.rope(model),
        action_dim=7,
        state_dim=8,
        horizon=horizon,
        hidden=hidden,
    )
    return ActionExpert(config).eval().requires_grad_(False)


class Acting:
    """One row from tokens to actions; all inputs of the steps are already on the device."""

    def __init__(self, model: Any, given: dict[str, Any], expert: ActionExpert) -> None:
        self.model, self.given, self.expert = model, given, expert
        like = next(expert.parameters())
        self.names = [layer.name for layer in expert.config.layers]
        self.noise = torch.randn(1, expert.config.horizon, expert.config.action_dim).to(like)
        self.state = torch.randn(1, expert.config.state_dim).to(like)
        self.grid = FlowSchedule(shift=2.0).grid(STEPS).to(like)

    def prefill(self) -> PrefixKV:
        return prefix(self.model, self.given, self.names)

    def whole(self) -> torch.Tensor:
        """Integrate as `imagewam_cli.expert.sampler.integrate` does, with a grid that is created once."""
        kv, x = self.prefill(), self.noise
        with torch.no_grad():
            for i in range(STEPS):
                x = x + (self.grid[i + 1] - self.grid[i]) * self.expert(x, self.grid[i].expand(1), self.state, kv)
        return x


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """Return the call as one CUDA graph, after the warm-up that capturing requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


if __name__ == "__main__":
    main()
