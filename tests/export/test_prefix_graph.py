"""Test that FLUX.2's prefix graph gives the same numbers as `Flux2Editor.encode`, for all settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from imagewam_cli.errors import ExportError
from imagewam_cli.export.description import prefix_inputs
from imagewam_cli.export.graphs import Graph, trace, traced_prefix
from imagewam_cli.policy.loading import prefix_arrays
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.runtime.onnx_policy import PrefixGraph
from tests.support.policies import observation

ROWS = [observation(1, "x"), observation(2), observation(3, "put the " + "very " * 5 + "red block down, {now} ")]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_padding": "keep"},
        {"segments": ("reference",)},
        {"segments": ("text",), "layers": "0,2"},
        {"timestep": 1.0, "image_size": (48, 96)},
        {"pool": 2, "image_size": (48, 80)},
        {"cameras": ("top", "wrist"), "image_size": (64, 128)},
        {"blank_images": True},
    ],
    ids=str,
)
def test_the_module_equals_the_editor(load_tiny: Any, settings: dict[str, Any], count: int) -> None:
    editor = load_tiny(**settings)
    rows = [two_cameras(row) for row in ROWS[-count:]]
    graph = editor.prefix_graph()
    recipe = PrefixGraph(prefix_inputs(graph), graph.tokenizer, graph=None)
    ids, valid = recipe.tokens([row.instruction for row in rows])
    image = np.stack([recipe.picture(row.images) for row in rows])
    with torch.no_grad():
        outputs = graph.module(*map(torch.from_numpy, (image, ids, valid)))
    expected = prefix_arrays(
        editor.encode([row.images for row in rows], [row.instruction for row in rows]), editor.spec.layers
    )
    names = traced_prefix(graph, editor.spec.layers).outputs
    assert set(names) == set(expected)
    for name, output in zip(names, outputs, strict=True):
        np.testing.assert_allclose(output.numpy(), expected[name], atol=1e-5, err_msg=name)


class Kept(nn.Module):
    """The part of the prefix graph that processes K and V of one layer, without the network before it."""

    def __init__(self, editor: Any) -> None:
        super().__init__()
        self.editor = editor

    def forward(self, text: Tensor, picture: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        tokens = torch.cat([text, picture], dim=1)
        prefix = self.editor.keep_segments({self.editor.layer_names[0]: LayerKV(tokens, tokens)}, valid)
        return prefix.valid, prefix.layers[0].k, prefix.layers[0].v


def test_pooling_can_be_traced(load_tiny: Any) -> None:
    """Cells at the edge hold fewer tokens; batch and text length stay dynamic."""
    editor = load_tiny(pool=2, image_size=(64, 80), layers="0")
    layer = editor.spec.layers[0]
    batch, text = {0: "batch"}, {0: "batch", 1: "text"}

    def inputs(rows: int, length: int) -> dict[str, Tensor]:
        tokens = torch.randn(rows, length + 20, layer.kv_heads, layer.head_dim)
        valid = torch.arange(length) < torch.arange(length - rows, length)[:, None]
        return {"text": tokens[:, :length], "picture": tokens[:, length:], "valid": valid}

    module, names = Kept(editor), ("all_valid", "k", "v")
    axes = {"text": text, "picture": batch, "valid": text}
    traced = trace(Graph(module=module, inputs=inputs(2, 7), axes=axes, outputs=names), "prefix.onnx", Path("unused"))
    session, given = onnxruntime.InferenceSession(traced.SerializeToString()), inputs(3, 5)
    outputs = session.run(None, {name: value.numpy() for name, value in given.items()})
    for name, output, expected in zip(names, outputs, module(**given), strict=True):
        assert output.shape[:2] == (3, 5 + 6)
        np.testing.assert_allclose(output, expected.numpy(), atol=1e-5, err_msg=name)


def test_long_instructions_are_truncated_like_the_editors(load_tiny: Any) -> None:
    editor = load_tiny()
    graph = editor.prefix_graph()
    recipe = PrefixGraph(prefix_inputs(graph), graph.tokenizer, graph=None)
    ids, valid = recipe.tokens(["put it there " * 40, "x"])
    assert ids.shape == (2, graph.max_tokens)
    assert valid[0].all()
    assert valid[1].sum() < 10
    assert ids[0].tolist() == editor.tokens.token_ids("put it there " * 40)


def test_the_stored_tokenizer_does_not_keep_the_padding_of_its_last_call(load_tiny: Any) -> None:
    graph = load_tiny().prefix_graph()
    tokenizer = Tokenizer.from_str(graph.tokenizer)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert (graph.before, graph.after) == ("<|im_start|>", "<|im_end|><|im_start|>")


def test_a_template_that_changes_the_instruction_is_refused(load_tiny: Any) -> None:
    editor = load_tiny()
    editor.tokens.tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] | trim }}<|im_end|>"
    with pytest.raises(ExportError, match="chat template"):
        editor.prefix_graph()


def test_only_float32_is_traced(load_tiny: Any) -> None:
    editor = load_tiny()
    graph = editor.prefix_graph()
    graph.module.to(torch.bfloat16)
    with pytest.raises(ExportError, match="bfloat16, not float32"):
        traced_prefix(graph, editor.spec.layers)


def two_cameras(row: Any) -> Any:
    return type(row)(
        images={"top": row.images["top"], "wrist": row.images["top"][::-1]},
        state=row.state,
        instruction=row.instruction,
    )
