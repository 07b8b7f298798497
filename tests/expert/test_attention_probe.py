"""Compare the observed attention with a softmax of the blocks' queries and keys in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from imagewam_cli.errors import CaptureError, ConfigError
from imagewam_cli.expert.attention_probe import action_attention, block_names, untrained_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.prefix.capture import SOFTMAX, observe
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import BlockKind, LayerSpec, RopeSpec, SegmentSpec

TEXT, PICTURE = SegmentSpec(name="text", tokens=3), SegmentSpec(name="reference", tokens=6, grid=(2, 3))
TOKENS, HORIZON, STEPS, BATCH = 9, 4, 3, 2
SCHEDULE = FlowSchedule(shift=2.0)


def layer(block: BlockKind, kv_heads: int = 2, name: str = "a") -> LayerSpec:
    return LayerSpec(name=name, block=block, heads=2, kv_heads=kv_heads, head_dim=8, segments=(TEXT, PICTURE))


def config(*layers: LayerSpec, state_dim: int = 2, rope: bool = True) -> ExpertConfig:
    axes = RopeSpec(axes=(4, 4), theta=100.0, action_axis=1, action_ids=(1, 0))
    return ExpertConfig(
        layers=layers, rope=axes if rope else None, action_dim=3, state_dim=state_dim, horizon=HORIZON, hidden=16
    )


def random_weights(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def random_prefix(layers: tuple[LayerSpec, ...], valid: Tensor | None) -> PrefixKV:
    generator = torch.Generator().manual_seed(2)
    kv = [torch.randn(2, BATCH, TOKENS, spec.kv_heads, 8, generator=generator) for spec in layers]
    return PrefixKV(tuple(LayerKV(k, v) for k, v in kv), valid)


def test_weights_are_the_softmax_of_queries_and_keys() -> None:
    """Take the rotated queries and keys from the expert and compute the softmax here."""
    layers = (layer("parallel", kv_heads=1), layer("sequential"))
    expert = ActionExpert(config(*layers)).eval()
    random_weights(expert)
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[1, 1:3] = False
    prefix, noise, state = random_prefix(layers, valid), torch.randn(BATCH, HORIZON, 3), torch.randn(BATCH, 2)
    rotated: list[Tensor] = []
    assert expert.rotary is not None
    hook = expert.rotary.register_forward_hook(lambda _m, _a, out: rotated.append(out.double()))
    try:
        found = action_attention(expert, noise, state, prefix, SCHEDULE, STEPS)
    finally:
        hook.remove()

    assert len(rotated) == 2 * len(layers) * STEPS
    for number, kv in enumerate(prefix.layers):
        expected = torch.zeros(BATCH, TOKENS + 1 + HORIZON, dtype=torch.float64)
        for step in range(STEPS):
            q, k = rotated[2 * (len(layers) * step + number) :][:2]
            for row in range(BATCH):
                for head in range(2):
                    key_head = 0 if kv.k.shape[2] == 1 else head
                    keys = torch.cat([kv.k[row, :, key_head].double(), k[row, :, min(head, k.shape[2] - 1)]])
                    scores = q[row, 1:, head] @ keys.T / 8**0.5
                    scores[:, :TOKENS][:, ~valid[row]] = -torch.inf
                    expected[row] += torch.softmax(scores, dim=-1).sum(0) / (HORIZON * 2 * STEPS)
        torch.testing.assert_close(found[number], expected, atol=1e-6, rtol=0)
        assert found[number][1, 1:3].abs().max() == 0
        torch.testing.assert_close(found[number].sum(-1), torch.ones(BATCH, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_image_token_whose_key_matches_the_query_gets_the_attention() -> None:
    """Make all queries equal: the action tokens are indistinguishable and the output is zero."""
    shape = config(layer("sequential"), state_dim=0, rope=False)
    expert = untrained_expert(shape)
    assert expert.positions is not None
    expert.positions.zero_()
    noise, found = torch.zeros(BATCH, HORIZON, 3), []
    block = expert.get_submodule("double_blocks.0.img_attn.norm.query_norm")
    hook = block.register_forward_hook(lambda _m, _a, out: found.append(out))
    prefix = random_prefix(shape.layers, None)
    action_attention(expert, noise, None, prefix, SCHEDULE, 1)
    hook.remove()
    query = found[0][0, 0]
    token = TEXT.tokens + 4
    prefix.layers[0].k[:, token] = 20 * query

    (weights,) = action_attention(expert, noise, None, prefix, SCHEDULE, STEPS)
    assert weights[:, token].min() > 0.999


def test_observing_does_not_change_the_output_and_leaves_no_hook() -> None:
    shape = config(layer("sequential"), layer("parallel"))
    expert = ActionExpert(shape).eval()
    random_weights(expert)
    prefix, noise, state = random_prefix(shape.layers, None), torch.randn(BATCH, HORIZON, 3), torch.randn(BATCH, 2)
    with torch.no_grad():
        before = integrate(expert, noise, state, prefix, SCHEDULE, STEPS)
        with observe(expert, block_names(shape), SOFTMAX, lambda _name, _weights: None):
            during = integrate(expert, noise, state, prefix, SCHEDULE, STEPS)
    assert torch.equal(before, during)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in expert.modules())


def test_blocks_are_paired_with_layers_in_order() -> None:
    shape = config(layer("parallel"), layer("sequential"), layer("parallel"))
    assert block_names(shape) == ("single_blocks.0", "double_blocks.0", "single_blocks.1")
    modules = dict(untrained_expert(shape).named_modules())
    assert all(name in modules for name in block_names(shape))


def test_an_untrained_expert_is_reproducible_and_keeps_the_global_random_state() -> None:
    shape = config(layer("sequential"))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other = untrained_expert(shape).state_dict(), untrained_expert(shape).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["head.linear.weight"].abs().max() == 0


@pytest.mark.parametrize("call", SOFTMAX, ids=["torch", "functional", "method"])
def test_every_way_to_call_softmax_is_observed_once(call: object) -> None:
    seen: list[Tensor] = []
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.forward = lambda x: call(x, dim=-1)  # type: ignore[operator]
    x = torch.randn(2, 3)
    with observe(model, ["inner"], SOFTMAX, lambda _name, result: seen.append(result)):
        model.inner(x)
        x.softmax(-1)  # outside of the named module
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], x.exp() / x.exp().sum(-1, keepdim=True))


def test_a_module_that_calls_no_softmax_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with (
        pytest.raises(CaptureError, match="no call of softmax was intercepted in 0"),
        observe(model, ["0"], SOFTMAX, lambda *_: None),
    ):
        model(torch.zeros(1, 2))


def test_several_blocks_per_layer_equal_one_block_on_each_of_several_equal_layers() -> None:
    """Compare two blocks on each of two layers with one block on each of four, with the same weights."""
    layers = (layer("parallel", name="a"), layer("sequential", name="b"))
    shape = dataclasses.replace(config(*layers), blocks_per_layer=2)
    doubled = config(*(spec for spec in layers for _ in range(2)))
    expert, other = ActionExpert(shape).eval(), ActionExpert(doubled).eval()
    random_weights(expert)
    other.load_state_dict(expert.state_dict())
    prefix, noise, state = random_prefix(layers, None), torch.randn(BATCH, HORIZON, 3), torch.randn(BATCH, 2)
    twice = PrefixKV(tuple(kv for kv in prefix.layers for _ in range(2)), None)
    with torch.no_grad():
        found = integrate(expert, noise, state, prefix, SCHEDULE, STEPS)
        expected = integrate(other, noise, state, twice, SCHEDULE, STEPS)
    assert torch.equal(found, expected)
    of_layers = action_attention(expert, noise, state, prefix, SCHEDULE, STEPS)
    of_blocks = action_attention(other, noise, state, twice, SCHEDULE, STEPS)
    assert len(of_layers) == 2
    assert torch.allclose(of_layers[1], (of_blocks[2] + of_blocks[3]) / 2, rtol=0, atol=1e-12)


def test_an_expert_has_at_least_one_block_per_layer() -> None:
    with pytest.raises(ConfigError, match="at least one layer, block"):
        dataclasses.replace(config(layer("parallel")), blocks_per_layer=0)
