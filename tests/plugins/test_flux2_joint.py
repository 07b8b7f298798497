"""The joint training step of FLUX.2.

Losses are compared with the published code. Forward and gradients are compared with one forward of diffusers' own
transformer with the published mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from imagewam_cli.editors.text import Text
from imagewam_cli.editors.tokens import joint_layers
from imagewam_cli.expert.flow import FlowSchedule, add_noise, velocity
from imagewam_cli.expert.model import ActionExpert, ExpertConfig, masked_flow_loss
from imagewam_cli.prefix.spec import RopeSpec, SegmentSpec
from imagewam_flux2.joint import JointBatch, joint_step, video_flow_loss
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.tokens import ACTION_T, REFERENCE_T, TARGET_T, FluxTokens, image_ids, text_ids
from tests.support.editors import published

GRID, TEXT, ROWS = (2, 3), 5, 2
SIZES = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 2, 2),
    "guidance_embeds": False,
}


def test_losses_equal_those_of_the_published_code() -> None:
    case = published.case("train_pads")
    schedule = FlowSchedule()
    for name in ("action", "video"):
        torch.testing.assert_close(schedule.weight(case[f"t.{name}"] / 1000), case[f"w.{name}"], atol=1e-5, rtol=1e-5)
    action = masked_flow_loss(
        case["pred.action"],
        velocity(case["in.action"], case["noise.action"]),
        case["in.action_is_pad"],
        case["w.action"],
        case["in.action_dim_is_pad"],
    )
    video = video_flow_loss(case["pred.video"], velocity(case["target.tokens"], case["noise.video"]), case["w.video"])
    torch.testing.assert_close(action, case["loss.action"][0], atol=5e-6, rtol=0)
    torch.testing.assert_close(video, case["loss.video"][0], atol=5e-6, rtol=0)
    torch.testing.assert_close(0.5 * video + action, case["loss.total"][0], atol=1e-5, rtol=0)


@pytest.fixture
def system() -> tuple[Any, ActionExpert]:
    """Return transformer and expert in float64, without zero weights."""
    transformer: Any = Flux2Transformer2DModel(**SIZES)
    layers = joint_layers(transformer, (SegmentSpec(name="text", tokens=TEXT),))
    rope = RopeSpec(axes=SIZES["axes_dims_rope"], theta=2000.0, action_axis=1, action_ids=(ACTION_T, 0, 0, 0))  # type: ignore[arg-type]
    expert = ActionExpert(ExpertConfig(layers=layers, rope=rope, action_dim=3, state_dim=0, horizon=4, hidden=16))
    generator = torch.Generator().manual_seed(0)
    for model in (transformer, expert):
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return transformer.double(), expert.double()


@pytest.fixture
def batch() -> JointBatch:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)

    tokens = (GRID[0] * GRID[1], 8)
    return JointBatch(
        text=Text(embeds=noise(TEXT, 12), valid=torch.tensor([[True] * 5, [True, True, True, False, False]])),
        reference=noise(*tokens),
        target=noise(*tokens),
        grid=GRID,
        actions=noise(4, 3),
        is_pad=torch.tensor([[False] * 4, [False, False, True, True]]),
        video_noise=noise(*tokens),
        action_noise=noise(4, 3),
        video_t=torch.tensor([0.8, 0.3], dtype=torch.float64),
        action_t=torch.tensor([0.6, 0.1], dtype=torch.float64),
    )


def tokens_of(transformer: Any) -> FluxTokens:
    return FluxTokens(transformer=transformer, vae=None, text_encoder=None, tokenizer=None)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def test_video_velocity_and_gradients_equal_one_masked_forward(system: Any, batch: JointBatch) -> None:
    transformer, expert = system
    step = joint_step(tokens_of(transformer), expert, batch, FlowSchedule())
    count = GRID[0] * GRID[1]
    prefix = TEXT + count
    seen = torch.ones(ROWS, 1, prefix + count, prefix + count, dtype=torch.bool)
    seen[:, :, :prefix, prefix:] = False  # text and reference never see the target
    seen[:, :, :, :TEXT] &= batch.text.valid[:, None, None, :]
    noisy = add_noise(batch.target, batch.video_noise, batch.video_t)
    whole = transformer(
        hidden_states=torch.cat([batch.reference, noisy], dim=1),
        encoder_hidden_states=batch.text.embeds,
        timestep=batch.video_t,
        img_ids=torch.cat([image_ids(*GRID, t=REFERENCE_T), image_ids(*GRID, t=TARGET_T)]),
        txt_ids=text_ids(TEXT),
        guidance=None,
        joint_attention_kwargs={"attention_mask": seen},
        return_dict=False,
    )[0][:, count:]
    torch.testing.assert_close(step.video_velocity, whole, atol=1e-6, rtol=1e-6)
    target = velocity(batch.target, batch.video_noise)
    expected = gradients(transformer, video_flow_loss(whole, target, FlowSchedule().weight(batch.video_t)))
    found = gradients(transformer, step.video_loss)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5 * float(value.abs().max()) + 1e-9, rtol=0, msg=name)


def test_gradients_equal_finite_differences(system: Any, batch: JointBatch) -> None:
    """The loss is moved along a random direction through the text states and all weights of editor and expert."""
    transformer, expert = system
    generator = torch.Generator().manual_seed(2)
    embeds = batch.text.embeds.clone().requires_grad_()
    moving = [*transformer.parameters(), *expert.parameters(), embeds]
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in moving]
    batch = dataclasses.replace(batch, text=dataclasses.replace(batch.text, embeds=embeds))

    def loss(move: float) -> Tensor:
        with torch.no_grad():
            for parameter, change in zip(moving, direction, strict=True):
                parameter.add_(move * change)
        return joint_step(tokens_of(transformer), expert, batch, FlowSchedule()).loss.double()

    grads = torch.autograd.grad(loss(0.0), moving, allow_unused=True)
    expected = sum(float((g * change).sum()) for g, change in zip(grads, direction, strict=True) if g is not None)
    size = 1e-4
    above, below = loss(size).item(), loss(-2 * size).item()  # moves add up, so the second one ends at -size
    assert (above - below) / (2 * size) == pytest.approx(expected, rel=2e-2)


def test_which_weights_each_loss_reaches(system: Any, batch: JointBatch) -> None:
    transformer, expert = system
    step = joint_step(tokens_of(transformer), expert, batch, FlowSchedule())
    assert all(not g.any() for g in gradients(expert, step.video_loss).values())
    assert all(g.any() for g in gradients(expert, step.action_loss).values())
    editor = Flux2Release().to_release(gradients(transformer, step.action_loss))
    without_gradient = {n for n, g in editor.items() if not g.any()}
    last = "single_blocks.1"
    assert without_gradient == {
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.weight",
        f"{last}.linear2.weight",
        f"{last}.norm.query_norm.scale",
    }
    rows = editor[f"{last}.linear1.weight"].abs().sum(1)
    assert not rows[:16].any()  # queries
    assert rows[16:48].all()  # keys and values
    assert not rows[48:].any()


def test_padded_action_dimensions_do_not_affect_the_loss() -> None:
    predicted = torch.tensor([[[1.0, 5.0], [2.0, 7.0]]])
    target = torch.zeros(1, 2, 2)
    is_pad, weight = torch.tensor([[False, False]]), torch.ones(1)
    loss = masked_flow_loss(predicted, target, is_pad, weight, torch.tensor([[False, True]]))
    assert loss.item() == pytest.approx((1 + 4) / 2)
