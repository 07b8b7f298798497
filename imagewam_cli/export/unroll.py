"""Build `loop.onnx` from `step.onnx`: make the velocity an ONNX function, call it per Euler step, and inline the calls.

The network is thus traced only once, and all steps share one set of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_DOMAIN, _FUNCTION = "imagewam", "Velocity"


def unroll(step: ModelProto, levels: Sequence[float]) -> ModelProto:
    """Return the model of the loop: `actions` from `noise` and the other inputs of the step.

    step: model with the inputs `noisy_actions` (B, T, A) and `t` (B,) and the output `velocity`.
    levels: noise levels from 1 down to 0, one more than the number of steps. Each step moves x by the level's change
        times the velocity, as in `expert.sampler.integrate`.
    """
    from onnx import helper, inliner

    graph = step.graph
    weights = [tensor.name for tensor in graph.initializer]
    condition = [value for value in graph.input if value.name not in ("noisy_actions", "t")]
    # A function cannot capture initializers, so the weights become additional inputs of it.
    velocity = helper.make_function(
        _DOMAIN,
        _FUNCTION,
        [*(value.name for value in graph.input), *weights],
        [value.name for value in graph.output],
        list(graph.node),
        list(step.opset_import),
    )
    nodes, constants = _steps(levels, [value.name for value in graph.input], weights)
    shape = graph.output[0].type
    loop = helper.make_graph(
        nodes,
        "loop",
        [helper.make_value_info("noise", shape), *condition],
        [helper.make_value_info("actions", shape)],
        [*graph.initializer, *constants],
    )
    model = helper.make_model(
        loop,
        functions=[velocity],
        opset_imports=[*step.opset_import, helper.make_opsetid(_DOMAIN, 1)],
        ir_version=step.ir_version,
        producer_name="imagewam",
    )
    model = inliner.inline_local_functions(model)
    del model.opset_import[len(step.opset_import) :]  # the function's domain, unused after inlining
    return model


def _steps(
    levels: Sequence[float], inputs: Sequence[str], weights: Sequence[str]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return the nodes and constants of all Euler steps.

    Step i: t_i (B,) = level_i; x_{i+1} = x_i + (level_{i+1} - level_i) * velocity(x_i, t_i).
    """
    from onnx import helper, numpy_helper

    constants: dict[str, npt.NDArray[np.float32]] = {}
    # The batch size is known only at run time: read it from the noise and expand each level to it.
    nodes = [helper.make_node("Shape", ["noise"], ["loop.batch"], start=0, end=1)]
    x = "noise"
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        constants[f"loop.level.{i}"] = np.array([level], dtype=np.float32)
        constants[f"loop.stride.{i}"] = np.array(following - level, dtype=np.float32)
        names = {"noisy_actions": x, "t": f"loop.t.{i}"}
        after = "actions" if i == len(levels) - 2 else f"loop.x.{i + 1}"
        nodes += [
            helper.make_node("Expand", [f"loop.level.{i}", "loop.batch"], [names["t"]]),
            helper.make_node(
                _FUNCTION,
                [*(names.get(name, name) for name in inputs), *weights],
                [f"loop.velocity.{i}"],
                domain=_DOMAIN,
            ),
            helper.make_node("Mul", [f"loop.velocity.{i}", f"loop.stride.{i}"], [f"loop.move.{i}"]),
            helper.make_node("Add", [x, f"loop.move.{i}"], [after]),
        ]
        x = after
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]
