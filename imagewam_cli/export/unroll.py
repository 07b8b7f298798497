"""`loop.onnx` from `step.onnx`: the velocity becomes an ONNX function, called once per Euler step and then inlined.

So the network is traced once, whatever the number of steps, and all steps share one set of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

_DOMAIN, _FUNCTION = "imagewam", "Velocity"


def unroll(step: Any, levels: Sequence[float]) -> Any:
    """The ModelProto of the loop: `actions` from `noise` and everything else that the step takes.

    step: ModelProto with the inputs `noisy_actions` (B, T, A) and `t` (B,) and the output `velocity`.
    levels: noise levels from 1 down to 0, one more than there are steps; x moves by the difference times the velocity,
        as in `expert.sampler.integrate`.
    """
    from onnx import helper, inliner

    graph = step.graph
    weights = [tensor.name for tensor in graph.initializer]
    condition = [value for value in graph.input if value.name not in ("noisy_actions", "t")]
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
    del model.opset_import[len(step.opset_import) :]  # the function's domain, of which nothing is left
    return model


def _steps(levels: Sequence[float], inputs: Sequence[str], weights: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Nodes and constants: t_i (B,) = level i, then x_{i+1} = x_i + (level_{i+1} - level_i) velocity(x_i, t_i)."""
    from onnx import helper, numpy_helper

    constants: dict[str, Any] = {}
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
