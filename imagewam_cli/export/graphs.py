"""Trace modules with named inputs and outputs into ONNX.

The expert is traced as one evaluation of its velocity, from which `unroll` builds the loop. The prefix is traced as the
editor's own module (`imagewam_cli.editors.contract.PrefixGraph`). Batch size and number of tokens stay dynamic in both.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imagewam_cli.editors.contract import PrefixGraph
from imagewam_cli.errors import ExportError
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.export.group_norm import AccurateGroupNorm
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import LayerSpec

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

OPSET = 21
"""ONNX opset that onnxruntime supports well.

With the fused attention and rotary operators of opsets 23 to 25, onnxruntime 1.32 fails on dynamic batch sizes or is
several times slower.
"""

IR_VERSION = 10
"""Version of the file format that belongs to the opset."""

_MIN_ONNXRUNTIME, _MIN_ONNXRUNTIME_DOUBLE = "1.18", "1.30"
"""First versions that read this opset and file format, and that compute sine and cosine in float64 on the CPU, as
rotary positions need: 1.28 refuses such a graph."""

MAX_WEIGHT_BYTES = 2**31 - 2**24
"""Maximum size of the weights inside an .onnx file, in bytes: protobuf's limit minus space for the graph.

Larger weights are in a file of their own next to it, as ONNX's external data.
"""

_MIN_EXTERNAL_BYTES = 1024
"""Minimum size of a tensor in such a file. Smaller ones stay in the .onnx file."""

_BATCH, _TOKENS, _TEXT = 2, 11, 7
"""Sizes of the traced example, all above 1, because the tracer treats a size of 1 as a constant."""

Axes = dict[int, str]
"""Axis -> name of its dynamic size."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A module with positional tensors, ready to be traced.

    inputs: name -> example, in positional order; axes: input name -> its dynamic axes; outputs: names.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]


class Velocity(nn.Module):
    """One evaluation of the expert: (noisy_actions, t, [state], [valid], k_0, v_0, ...) -> velocity.

    ONNX inputs are a flat list of tensors; this module rebuilds the expert's arguments from it.
    """

    def __init__(self, expert: ActionExpert, *, has_valid: bool) -> None:
        super().__init__()
        self.expert, self.has_valid = expert, has_valid

    def forward(self, noisy_actions: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """Return the velocity, float32 (B, T, A).

        condition: state and valid, if the expert takes them, then K and V of each layer.
        """
        rest = list(condition)
        state = rest.pop(0) if self.expert.config.state_dim else None
        valid = rest.pop(0) if self.has_valid else None
        prefix = PrefixKV(tuple(LayerKV(k, v) for k, v in zip(rest[::2], rest[1::2], strict=True)), valid)
        velocity: Tensor = self.expert(noisy_actions, t, state, prefix)
        return velocity


def step_graph(expert: ActionExpert) -> Graph:
    """Return the graph of `velocity` from `noisy_actions`, `t` (B,) and the condition."""
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
    """Return the graph of the prefix from `image`, `token_ids` and `token_valid`.

    Outputs: `valid`, if a layer holds text, then K and V of each layer.

    Raises:
        ExportError: the weights are not float32.
    """
    dtypes = {p.dtype for p in prefix.module.parameters()} - {torch.float32}
    if dtypes:
        raise ExportError(f"the editor's weights are {', '.join(map(str, dtypes))}, not float32")
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


def trace(graph: Graph, name: str, weights: Path) -> ModelProto:
    """Trace the module into an ONNX model.

    name: the file's name, for errors.
    weights: file in the model's folder for weights that are too large for the model itself; otherwise not written.

    Raises:
        ExportError: ONNX lacks an operation.
    """
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
    if sum(p.numel() * p.element_size() for p in graph.module.parameters()) > MAX_WEIGHT_BYTES:
        from onnx_ir.external_data import unload_from_model

        unload_from_model(program.model, weights.parent, weights.name, size_threshold_bytes=_MIN_EXTERNAL_BYTES)
    model = program.model_proto
    model.ir_version = IR_VERSION
    _remove_traces(model.graph)
    return model


def min_onnxruntime(model: ModelProto) -> str:
    """Return the oldest version of onnxruntime that runs a traced model on the CPU."""
    from onnx import TensorProto

    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    trigonometric = (node for node in model.graph.node if node.op_type in ("Sin", "Cos"))
    double = any(types.get(node.input[0]) == TensorProto.DOUBLE for node in trigonometric)
    return _MIN_ONNXRUNTIME_DOUBLE if double else _MIN_ONNXRUNTIME


class _Positional(nn.Module):
    """Wrap a module to take `*inputs`, so that dynamic sizes have one form, and to use the accurate group norm."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> object:
        with AccurateGroupNorm():
            return self.module(*inputs)


def _condition(config: ExpertConfig) -> tuple[dict[str, Tensor], dict[str, Axes]]:
    """Return examples and dynamic axes: state (B, S), valid (B, P), then `layer.{i}.k` and `.v` (B, P, H, D).

    Layers with text share the size 'tokens', to which `valid` belongs. Each layer without text has its own size.
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


def _layer_names(count: int) -> list[str]:
    return [f"layer.{i}.{part}" for i in range(count) for part in "kv"]


def _remove_traces(graph: GraphProto) -> None:
    """Remove the stack traces that the exporter attaches to every node.

    They are half of the graph's size and contain paths of this machine.
    """
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Suppress a logger's warnings: torch's exporter reports missing optional packages as warnings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
