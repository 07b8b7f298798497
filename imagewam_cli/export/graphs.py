"""What is traced into ONNX: modules with named inputs and outputs, and the call of torch's exporter.

The expert is traced as one evaluation of its velocity (`unroll` makes the loop of it), the prefix as the editor's own
module (`imagewam_cli.editors.contract.PrefixGraph`). The batch and the number of tokens stay open in both.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagewam_cli.editors.contract import PrefixGraph
from imagewam_cli.errors import ExportError
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.export.group_norm import SteadyGroupNorm
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import LayerSpec

OPSET = 21
"""What onnxruntime runs well. With the fused attention and rotary operators of 23 to 25 its version 1.32 fails on open
batch sizes or takes a multiple of the time."""

LARGEST = 2**31 - 2**24
"""Bytes of weights that one .onnx file can hold (protobuf's limit, with room for the graph)."""

_BATCH, _TOKENS, _TEXT = 2, 11, 7
"""Sizes of the traced example: all different from 1, which a trace would take for a constant."""

Axes = dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A module with positional tensors. inputs: name -> example; axes: name -> axis -> name of its open size."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]


class Velocity(nn.Module):
    """One evaluation of the expert: (noisy_actions, t, [state], [valid], k_0, v_0, ...) -> velocity."""

    def __init__(self, expert: ActionExpert, *, has_valid: bool) -> None:
        super().__init__()
        self.expert, self.has_valid = expert, has_valid

    def forward(self, noisy_actions: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """float32 (B, T, A); condition: state and valid where there are any, then K and V of each layer."""
        rest = list(condition)
        state = rest.pop(0) if self.expert.config.state_dim else None
        valid = rest.pop(0) if self.has_valid else None
        prefix = PrefixKV(tuple(LayerKV(k, v) for k, v in zip(rest[::2], rest[1::2], strict=True)), valid)
        velocity: Tensor = self.expert(noisy_actions, t, state, prefix)
        return velocity


def step_graph(expert: ActionExpert) -> Graph:
    """`velocity` from `noisy_actions`, `t` (B,), and the condition."""
    config = expert.config
    inputs, axes = _condition(config)
    noisy = {"noisy_actions": torch.zeros(_BATCH, config.horizon, config.action_dim), "t": torch.zeros(_BATCH)}
    return Graph(
        module=Velocity(expert, has_valid="valid" in inputs),
        inputs=noisy | inputs,
        axes={name: {0: "batch"} for name in noisy} | axes,
        outputs=("velocity",),
    )


def traced_prefix(prefix: PrefixGraph, layers: Sequence[LayerSpec]) -> Graph:
    """`valid`, where a layer holds text, and K and V of each layer from `image`, `token_ids`, `token_valid`.

    Raises:
        ExportError: the weights are not float32, or more than a file can hold.
    """
    dtypes = {p.dtype for p in prefix.module.parameters()} - {torch.float32}
    if dtypes:
        raise ExportError(f"the editor's weights are {', '.join(map(str, dtypes))}, not float32")
    _require_room(prefix.module, "prefix.onnx")
    height, width = prefix.image_size
    return Graph(
        module=prefix.module,
        inputs={
            "image": torch.zeros(_BATCH, 3, height, width),
            "token_ids": torch.full((_BATCH, _TEXT), prefix.pad_id),
            "token_valid": torch.ones(_BATCH, _TEXT, dtype=torch.bool),
        },
        axes={"image": {0: "batch"}} | {name: {0: "batch", 1: "text"} for name in ("token_ids", "token_valid")},
        outputs=(*(["valid"] if any(layer.holds_text for layer in layers) else []), *_layer_names(len(layers))),
    )


def trace(graph: Graph, name: str) -> Any:
    """The module as an ONNX ModelProto, weights inside; `name` is for messages.

    Raises:
        ExportError: too many weights for a file, or an operation that ONNX does not have.
    """
    _require_room(graph.module, name)
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                _Positional(graph.module).eval(),
                tuple(graph.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=(tuple(graph.axes[name] for name in graph.inputs),),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ExportError(f"{name} cannot be traced: {reason}") from error
    assert program is not None
    model = program.model_proto
    _forget_sources(model.graph)
    return model


class _Positional(nn.Module):
    """Gives every module the same signature, so that open sizes are described in one way, and a steady group norm."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> object:
        with SteadyGroupNorm():
            return self.module(*inputs)


def _condition(config: ExpertConfig) -> tuple[dict[str, Tensor], dict[str, Axes]]:
    """state (B, S), valid (B, P), then `layer.{i}.k` and `.v` (B, P, H, D): examples and open sizes.

    `valid` where some layer holds text; a layer without text has an open size of its own.
    """
    inputs: dict[str, Tensor] = {}
    axes: dict[str, Axes] = {}
    if config.state_dim:
        inputs["state"], axes["state"] = torch.zeros(_BATCH, config.state_dim), {0: "batch"}
    if any(layer.holds_text for layer in config.layers):
        inputs["valid"], axes["valid"] = torch.ones(_BATCH, _TOKENS, dtype=torch.bool), {0: "batch", 1: "tokens"}
    names = iter(_layer_names(len(config.layers)))
    for i, layer in enumerate(config.layers):
        for name in (next(names), next(names)):
            inputs[name] = torch.zeros(_BATCH, _TOKENS, layer.kv_heads, layer.head_dim)
            axes[name] = {0: "batch", 1: "tokens" if layer.holds_text else f"tokens_{i}"}
    return inputs, axes


def _require_room(module: nn.Module, file: str) -> None:
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LARGEST:
        raise ExportError(f"{file} would hold {size / 1e9:.1f} GB of weights, and an .onnx file holds 2 GB")


def _layer_names(count: int) -> list[str]:
    return [f"layer.{i}.{part}" for i in range(count) for part in "kv"]


def _forget_sources(graph: Any) -> None:
    """Drop the stack traces that the exporter leaves on every node: half of the graph's text, with this machine's
    paths."""
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of this logger: the exporter reports which optional packages it looked for."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
