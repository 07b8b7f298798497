"""Compare traced and unrolled experts of various shapes with torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from imagewam_cli.errors import ExportError
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ExpertConfig
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.export import graphs
from imagewam_cli.export.unroll import unroll
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import BlockKind, LayerSpec, Segment, SegmentSpec
from tests.support.policies import random_expert

SCHEDULE = FlowSchedule(shift=3.0)
STEPS = 3


def layer(name: str, block: BlockKind, tokens: int, kv_heads: int = 2, segment: Segment = "target") -> LayerSpec:
    segments = (SegmentSpec(name=segment, tokens=tokens),)
    return LayerSpec(name=name, block=block, heads=2, kv_heads=kv_heads, head_dim=8, segments=segments)


UNET = ExpertConfig(
    layers=(
        layer("down", "sequential", 16),
        layer("text", "sequential", 5, segment="text"),
        layer("mid", "sequential", 4, kv_heads=1),
    ),
    rope=None,
    action_dim=2,
    state_dim=0,
    horizon=3,
    hidden=16,
    blocks_per_layer=2,
)
BLIND = ExpertConfig(
    layers=(layer("a", "parallel", 9, segment="text"),),
    rope=None,
    action_dim=2,
    state_dim=4,
    horizon=3,
    hidden=16,
    use_prefix=False,
)


@functools.cache
def traced(config: ExpertConfig) -> Any:
    """Return the traced step of `random_expert(config)`, cached because tracing takes seconds."""
    return graphs.trace(graphs.step_graph(random_expert(config)), "step.onnx", Path("unused"))


@pytest.mark.parametrize("config", [UNET, BLIND], ids=["layers-of-different-length", "no-look-at-the-prefix"])
def test_the_step_and_the_loop_equal_torch(config: ExpertConfig) -> None:
    expert, step = random_expert(config), traced(config)
    loop = unroll(step, SCHEDULE.grid(STEPS).tolist())
    for batch in (1, 3):
        inputs, prefix = condition(config, batch)
        noise, state = torch.randn(batch, 3, 2), inputs.get("state")
        t = torch.rand(batch)
        feeds = {name: value.numpy() for name, value in inputs.items()}
        with torch.no_grad():
            velocity = expert(noise, t, state, prefix)
            actions = integrate(expert, noise, state, prefix, SCHEDULE, STEPS)
        np.testing.assert_allclose(
            run(step, feeds | {"noisy_actions": noise.numpy(), "t": t.numpy()}), velocity.numpy(), atol=1e-5
        )
        np.testing.assert_allclose(run(loop, feeds | {"noise": noise.numpy()}), actions.numpy(), atol=1e-5)


def test_the_loop_shares_the_weights_of_the_step() -> None:
    step = traced(BLIND)
    loop = unroll(step, SCHEDULE.grid(40).tolist())
    weights = sum(4 * parameter.numel() for parameter in random_expert(BLIND).parameters())

    def stored(model: Any) -> int:
        return sum(tensor.ByteSize() for tensor in model.graph.initializer)

    assert stored(step) < 2 * weights + 10_000
    assert stored(loop) < stored(step) + 10_000
    assert not loop.functions
    assert {opset.domain for opset in loop.opset_import} == {""}


def test_weights_too_large_for_the_model_are_in_a_file_that_step_and_loop_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_WEIGHT_BYTES", 1000)
    expert, weights = random_expert(BLIND), tmp_path / "loop.onnx.data"
    step = graphs.trace(graphs.step_graph(expert), "step.onnx", weights)
    loop = unroll(step, SCHEDULE.grid(STEPS).tolist())
    inputs, prefix = condition(BLIND, 2)
    noise = torch.randn(2, 3, 2)
    with torch.no_grad():
        expected = integrate(expert, noise, inputs["state"], prefix, SCHEDULE, STEPS)
    for model in (step, loop):
        assert {external(tensor)["location"] for tensor in model.graph.initializer if tensor.external_data} == {
            weights.name
        }
        assert len(model.SerializeToString()) < weights.stat().st_size
    (tmp_path / "loop.onnx").write_bytes(loop.SerializeToString())
    feeds = {name: value.numpy() for name, value in inputs.items()} | {"noise": noise.numpy()}
    np.testing.assert_allclose(run(tmp_path / "loop.onnx", feeds), expected.numpy(), atol=1e-5)
    weights.write_bytes(bytes(weights.stat().st_size))
    assert np.abs(run(tmp_path / "loop.onnx", feeds) - expected.numpy()).max() > 0.01  # the file is really read


def test_a_module_that_cannot_be_traced_is_refused() -> None:
    class Fickle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if bool(x.sum() > 0) else x

    graph = graphs.Graph(module=Fickle(), inputs={"x": torch.ones(2, 3)}, axes={"x": {0: "batch"}}, outputs=("y",))
    with pytest.raises(ExportError, match=r"fickle\.onnx cannot be traced: .+"):
        graphs.trace(graph, "fickle.onnx", Path("unused"))


def condition(config: ExpertConfig, batch: int) -> tuple[dict[str, torch.Tensor], PrefixKV]:
    """Return the inputs of the graphs by name, and the same prefix for the torch expert. Some tokens are not valid."""
    lengths = [spec.tokens + batch for spec in config.layers]
    kv = tuple(
        LayerKV(*(torch.randn(batch, length, spec.kv_heads, spec.head_dim) for _ in "kv"))
        for spec, length in zip(config.layers, lengths, strict=True)
    )
    inputs = {f"layer.{i}.{part}": getattr(entry, part) for i, entry in enumerate(kv) for part in "kv"}
    valid = None
    text = [length for spec, length in zip(config.layers, lengths, strict=True) if spec.holds_text]
    if text:
        valid = torch.arange(text[0]).expand(batch, -1) % 4 > 0
        inputs["valid"] = valid
    if config.state_dim:
        inputs["state"] = torch.randn(batch, config.state_dim)
    return inputs, PrefixKV(kv, valid)


def external(tensor: Any) -> dict[str, str]:
    """Return where the data of a tensor is."""
    return {entry.key: entry.value for entry in tensor.external_data}


def run(model: Any, feeds: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(model if isinstance(model, Path) else model.SerializeToString())
    assert {i.name for i in session.get_inputs()} <= set(feeds)
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]


def test_a_model_contains_no_local_path() -> None:
    text = traced(BLIND).SerializeToString()
    assert str(Path(torch.__file__).parents[1]).encode() not in text
    assert str(Path(graphs.__file__).parent).encode() not in text
