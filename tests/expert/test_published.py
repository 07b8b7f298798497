"""Compare the expert with numbers computed by the published code."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import BlockKind, LayerSpec, RopeSpec, RoundingName, SegmentSpec
from tests.support.paths import FIXTURES

PUBLISHED = FIXTURES / "published"
TOLERANCE = 5e-5
CASES = ("infer_proprio_pack_holes", "infer_shift3_20step")


@pytest.fixture
def expert() -> ActionExpert:
    return published_expert(horizon=16)


def published_expert(horizon: int, rounding: RoundingName = "exact") -> ActionExpert:
    def layer(name: str, block: BlockKind) -> LayerSpec:
        segments = (SegmentSpec(name="text", tokens=21), SegmentSpec(name="reference", tokens=24))
        return LayerSpec(name=name, block=block, heads=3, kv_heads=3, head_dim=32, segments=segments)

    config = ExpertConfig(
        layers=(layer("double.0", "sequential"), *(layer(f"single.{i}", "parallel") for i in range(4))),
        rope=RopeSpec(axes=(4, 8, 12, 8), theta=2000.0, action_axis=1, action_ids=(2, 0, 0, 0)),
        action_dim=14,
        state_dim=0,
        horizon=horizon,
        hidden=64,
        rounding=rounding,
    )
    model = ActionExpert(config)
    model.load_state_dict(load_file(PUBLISHED / "expert.safetensors"), strict=True)
    return model.eval()


def published_prefix(case: dict[str, torch.Tensor]) -> PrefixKV:
    names = ["double.0", *(f"single.{i}" for i in range(4))]
    layers = tuple(LayerKV(*(case[f"cache.{n}.{part}"].unflatten(-1, (3, 32)) for part in "kv")) for n in names)
    tokens = layers[0].k.shape[1]
    text = case["txt.mask_after_proprio"].bool()
    valid = torch.cat([text, torch.ones(1, tokens - text.shape[1], dtype=torch.bool)], dim=1)
    return PrefixKV(layers, valid)


@pytest.mark.parametrize("name", CASES)
def test_velocity_of_every_step_equals_the_published_one(name: str) -> None:
    case = load_file(PUBLISHED / f"{name}.safetensors")
    prefix = published_prefix(case)
    expert = published_expert(horizon=case["step.x"].shape[2])
    for x, t, velocity in zip(case["step.x"], case["step.t_unit"], case["step.velocity"], strict=True):
        with torch.no_grad():
            predicted = expert(x, t, None, prefix)
        assert (predicted - velocity).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_final_action_equals_the_published_one(name: str) -> None:
    case = load_file(PUBLISHED / f"{name}.safetensors")
    steps = len(case["sched.timesteps"])
    expert = published_expert(horizon=case["noise.initial"].shape[1])
    schedule = FlowSchedule(shift=3.0 if "shift3" in name else 5.0)
    with torch.no_grad():
        chunk = integrate(expert, case["noise.initial"], None, published_prefix(case), schedule, steps)
    assert (chunk[0] - case["out.action"]).abs().max() < TOLERANCE


def test_rounding_of_velocities_and_actions_equals_the_published_one() -> None:
    """Velocities and actions are about 4, where neighbouring bfloat16 numbers are 0.03 apart."""
    case = load_file(PUBLISHED / "infer_proprio_pack_bf16.safetensors")
    prefix, expert = published_prefix(case), published_expert(horizon=16, rounding="published-bf16")
    steps = len(case["step.t_unit"])
    with torch.no_grad():
        for x, t, velocity in zip(case["step.x"], case["step.t_unit"], case["step.velocity"], strict=True):
            assert (expert(x, t, None, prefix).float() - velocity.float()).abs().max() < 0.05
        chunk = integrate(expert, case["noise.initial"], None, prefix, FlowSchedule(), steps)
        exact = integrate(
            published_expert(horizon=16),
            case["noise.initial"].float(),
            None,
            prefix.to("cpu", torch.float32),
            FlowSchedule(),
            steps,
        )
    assert (chunk[0].float() - case["out.action"]).abs().max() < 0.05
    assert (exact[0] - case["out.action"]).abs().max() > 0.2


def test_rounding_of_the_times_equals_the_published_one() -> None:
    case = load_file(PUBLISHED / "infer_proprio_pack_bf16.safetensors")
    seen: list[torch.Tensor] = []

    def expert(x: torch.Tensor, t: torch.Tensor, state: None, prefix: None) -> torch.Tensor:
        seen.append(t)
        return torch.ones_like(x)

    noise = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    integrate(expert, noise, None, None, FlowSchedule(), 4)  # type: ignore[arg-type]
    assert torch.equal(torch.stack(seen), case["step.t_unit"])
    seen.clear()
    integrate(expert, noise, None, None, FlowSchedule(), 10)  # type: ignore[arg-type]
    # the published grid of ten steps
    expected = torch.tensor([1000, 980, 952, 920, 884, 832, 768, 680, 556, 358], dtype=torch.bfloat16)
    assert torch.equal(1000 * torch.cat(seen), expected)


def test_several_draws_on_one_prefix_equal_separate_chunks(expert: ActionExpert) -> None:
    case = load_file(PUBLISHED / f"{CASES[0]}.safetensors")
    prefix = published_prefix(case)
    noise, t = torch.randn(3, 16, 14, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        together = expert(noise, t, None, prefix)
        apart = torch.cat([expert(noise[i : i + 1], t[i : i + 1], None, prefix) for i in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_masked_tokens_are_never_seen(expert: ActionExpert) -> None:
    case = load_file(PUBLISHED / f"{CASES[0]}.safetensors")
    prefix = published_prefix(case)
    assert prefix.valid is not None
    assert not prefix.valid.all()
    hidden = ~prefix.valid[:, :, None, None]
    garbage = PrefixKV(
        tuple(LayerKV(kv.k.masked_fill(hidden, 50.0), kv.v.masked_fill(hidden, -70.0)) for kv in prefix.layers),
        prefix.valid,
    )
    x, t = case["step.x"][0], case["step.t_unit"][0]
    with torch.no_grad():
        torch.testing.assert_close(expert(x, t, None, garbage), expert(x, t, None, prefix), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_scheduler_grids_and_weights_equal_the_published_ones(shift: float) -> None:
    published = load_file(PUBLISHED / "scheduler.safetensors")
    schedule = FlowSchedule(shift=shift)
    for steps in (1, 4, 10, 20, 50):
        grid = schedule.grid(steps)
        key = f"shift{shift}.n{steps}"
        torch.testing.assert_close(1000 * grid[:-1], published[f"{key}.timesteps"], atol=1e-3, rtol=1e-6)
        torch.testing.assert_close(grid[1:] - grid[:-1], published[f"{key}.deltas"], atol=1e-6, rtol=1e-5)
    t = published[f"shift{shift}.weight_t"] / 1000
    torch.testing.assert_close(
        schedule.weight(t).double(), published[f"shift{shift}.weight"].double(), atol=1e-5, rtol=1e-5
    )
