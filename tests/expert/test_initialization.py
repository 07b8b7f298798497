"""Compare the expert's initial weights with the published code and with interpolation in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imagewam_cli.errors import EditorError
from imagewam_cli.expert.initialization import initialize, resized
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.prefix.spec import BlockKind, LayerSpec, RopeSpec, SegmentSpec
from tests.support.paths import FIXTURES

PUBLISHED = FIXTURES / "published"
HEADS, SIZE, EDITOR, EXPERT = 3, 32, 96, 64
WIDTH = HEADS * SIZE


@pytest.fixture(scope="module")
def editor() -> dict[str, Tensor]:
    return load_file(PUBLISHED / "editor.safetensors")


def new_expert(*names: str, hidden: int = EXPERT) -> ActionExpert:
    """Return an expert with one block per named layer of the editor."""

    def layer(name: str) -> LayerSpec:
        block: BlockKind = "parallel" if name.startswith("single") else "sequential"
        text = SegmentSpec(name="text", tokens=4)
        return LayerSpec(name=name, block=block, heads=HEADS, kv_heads=HEADS, head_dim=SIZE, segments=(text,))

    rope = RopeSpec(axes=(4, 8, 12, 8), theta=2000.0, action_axis=1, action_ids=(2, 0, 0, 0))
    layers = tuple(layer(name) for name in names or ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ActionExpert(
            ExpertConfig(layers=layers, rope=rope, action_dim=14, state_dim=3, horizon=8, hidden=hidden)
        )


def interpolated(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Interpolate linearly between the old points, keeping both ends."""
    old, new = np.arange(x.shape[axis]), np.linspace(0, x.shape[axis] - 1, size)
    return np.apply_along_axis(lambda line: np.interp(new, old, line), axis, x)


def test_weights_equal_the_published_ones(editor: dict[str, Tensor]) -> None:
    expert = new_expert()
    initialize(expert, editor, "published")
    found, published = expert.state_dict(), load_file(PUBLISHED / "action_init_every_8th_row.safetensors")
    assert len(published) == 14
    for name, expected in published.items():
        mine = found[name][::8] if found[name].ndim == 2 else found[name]
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["published", "repaired"])
def test_encoders_keep_their_random_weights(editor: dict[str, Tensor], how: str) -> None:
    expert, before = new_expert(), new_expert().state_dict()
    initialize(expert, editor, how)  # type: ignore[arg-type]
    after = expert.state_dict()
    for name in after:
        kept = name.startswith(("action_encoder", "state_encoder")) or (name.startswith("head") and how == "repaired")
        assert torch.equal(before[name], after[name]) == kept, name


def test_none_keeps_all_weights(editor: dict[str, Tensor]) -> None:
    expert, before = new_expert(), new_expert().state_dict()
    initialize(expert, editor, "none")
    assert all(torch.equal(before[name], value) for name, value in expert.state_dict().items())


def test_repaired_resizes_each_part_of_a_parallel_block(editor: dict[str, Tensor]) -> None:
    expert = new_expert()
    initialize(expert, editor, "repaired")
    mine = expert.single_blocks[0].linear1.weight.detach().numpy()  # type: ignore[union-attr]
    theirs = editor["single_blocks.0.linear1.weight"].numpy()
    alpha = math.sqrt(EDITOR / EXPERT)
    qkv, gate, up = np.split(theirs, [3 * WIDTH, 3 * WIDTH + 3 * EDITOR])
    np.testing.assert_allclose(mine[: 3 * WIDTH], alpha * interpolated(qkv, EXPERT, 1), atol=2e-5)
    for part, rows in ((gate, mine[3 * WIDTH : 3 * WIDTH + 4 * EXPERT]), (up, mine[3 * WIDTH + 4 * EXPERT :])):
        expected = alpha * interpolated(interpolated(part, 4 * EXPERT, 0), EXPERT, 1)
        np.testing.assert_allclose(rows, expected, atol=2e-5)

    mine = expert.single_blocks[0].linear2.weight.detach().numpy()  # type: ignore[union-attr]
    attention, mlp = np.split(editor["single_blocks.0.linear2.weight"].numpy(), [WIDTH], axis=1)
    np.testing.assert_allclose(mine[:, :WIDTH], interpolated(attention, EXPERT, 0), atol=2e-5)
    expected = math.sqrt(3 * EDITOR / (4 * EXPERT)) * interpolated(interpolated(mlp, EXPERT, 0), 4 * EXPERT, 1)
    np.testing.assert_allclose(mine[:, WIDTH:], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("double_stream_modulation_img.lin.weight", 6),
        ("single_stream_modulation.lin.weight", 3),
        ("double_blocks.0.img_mlp.0.weight", 2),
        ("double_blocks.0.img_attn.qkv.weight", 3),
    ],
)
def test_repaired_keeps_fused_parts_apart(editor: dict[str, Tensor], name: str, parts: int) -> None:
    expert = new_expert()
    initialize(expert, editor, "repaired")
    mine = expert.state_dict()[name]
    chunks = zip(np.split(editor[name].numpy(), parts), np.split(mine.numpy(), parts), strict=True)
    for theirs, part in chunks:
        expected = interpolated(interpolated(theirs, len(part), 0), EXPERT, 1) * math.sqrt(EDITOR / EXPERT)
        np.testing.assert_allclose(part, expected, atol=2e-5)


def test_equal_sizes_are_copied_without_interpolation(editor: dict[str, Tensor]) -> None:
    source = editor["double_blocks.0.img_attn.proj.weight"]
    assert torch.equal(resized(source, source.shape), source)


def test_weights_are_rounded_to_bfloat16_before_scaling() -> None:
    """1.00390625 is between two bfloat16 numbers; rounding it after scaling would give another result."""
    source = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    expected = source.float().mean(-1).to(torch.bfloat16)
    found = resized(source, (1, 3))
    factor = math.sqrt(2 / 3)
    assert found.dtype == torch.bfloat16
    assert found[0, 1] == (expected * factor)[0]


def test_each_block_takes_the_weights_of_the_layer_it_reads(editor: dict[str, Tensor]) -> None:
    expert = new_expert("single_transformer_blocks.1.attn")
    other = {
        k.replace("single_blocks.0", "single_blocks.1"): 2 * v for k, v in editor.items() if "single_blocks.0" in k
    }
    initialize(expert, editor | other, "published")
    expected = resized(other["single_blocks.1.linear2.weight"], (EXPERT, WIDTH + 4 * EXPERT))
    assert torch.equal(expert.single_blocks[0].linear2.weight, expected)  # type: ignore[union-attr]


def test_an_editor_of_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(EditorError, match=r"which has no tensor time_in\.in_layer\.weight"):
        initialize(new_expert(), {"conv_in.weight": torch.zeros(1)}, "published")
