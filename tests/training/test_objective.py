"""Test `training.objective` against the same formulas in float64 numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.training.data import Batch, ExpertData
from imagewam_cli.training.objective import Validation, flow_loss, validate
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import TrainRecipe

Array = npt.NDArray[np.float64]


@pytest.fixture
def batch(source: CachedPrefixes, recipe: TrainRecipe) -> Batch:
    """A batch of five rows; the last two chunks are padded."""
    return ExpertData(source, recipe).batch(np.array([0, 10, 19, 6, 15]))


@pytest.fixture
def expert(source: CachedPrefixes) -> ActionExpert:
    """An expert with all weights random, so that every input has an effect."""
    spec = source.info.spec
    expert = ActionExpert(
        ExpertConfig(layers=spec.layers, rope=spec.rope, action_dim=3, state_dim=2, horizon=4, hidden=16)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return expert


def linear(noisy: Tensor, t: Tensor, state: Tensor, prefix: PrefixKV) -> Tensor:
    """Replace the expert by a known function of every input except the prefix."""
    return 0.5 * noisy + t[:, None, None] - 0.1 * state.sum(-1)[:, None, None]


def losses_by_hand(actions: Array, noise: Array, u: Array, state: Array, pad: npt.NDArray[np.bool_]) -> list[float]:
    """Return the loss of `linear` for each chunk, as in arXiv 2606.19531 with shift 5."""
    grid = np.arange(1, 1001) / 1000
    bells = bell(5 * grid / (1 + 4 * grid))
    losses = []
    for i in range(len(actions)):
        t = 5 * u[i] / (1 + 4 * u[i])
        noisy = (1 - t) * actions[i] + t * noise[i]
        predicted = 0.5 * noisy + t - 0.1 * state[i].sum()
        error = ((predicted - (noise[i] - actions[i])) ** 2).mean(axis=1)
        weight = (bell(t) - bells.min()) / (bells - bells.min()).mean()
        losses.append(float(weight * error[~pad[i]].mean()))
    return losses


def bell(t: Array) -> Array:
    return np.exp(-2 * (t - 0.5) ** 2)


@pytest.mark.parametrize("draws", [1, 3])
def test_the_loss_equals_the_formula_in_numpy(batch: Batch, draws: int) -> None:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(5 * draws, 4, 3, generator=generator).double().numpy()
    u = torch.rand(5 * draws, generator=generator).double().numpy()
    actions, state, pad = (x.numpy().repeat(draws, axis=0) for x in (batch.actions, batch.state, batch.is_pad))
    assert pad.any()

    loss = flow_loss(linear, batch, FlowSchedule(shift=5.0), draws, torch.Generator().manual_seed(5))

    assert float(loss) == pytest.approx(np.mean(losses_by_hand(actions, noise, u, state, pad)), rel=1e-5)


def test_padded_actions_do_not_count(batch: Batch) -> None:
    spoiled = batch.actions.clone()
    spoiled[batch.is_pad] += 100.0
    before, after = (
        flow_loss(linear, b, FlowSchedule(), 2, torch.Generator().manual_seed(0))
        for b in (batch, dataclasses.replace(batch, actions=spoiled))
    )
    assert torch.equal(before, after)


def test_draws_that_share_a_prefix_equal_repeated_rows(batch: Batch, expert: ActionExpert) -> None:
    """Three draws per row give the same loss as a batch that repeats each row three times."""
    prefix = batch.prefix
    assert prefix.valid is not None
    tripled = Batch(
        prefix=PrefixKV(
            tuple(LayerKV(kv.k.repeat_interleave(3, dim=0), kv.v.repeat_interleave(3, dim=0)) for kv in prefix.layers),
            prefix.valid.repeat_interleave(3, dim=0),
        ),
        state=batch.state.repeat_interleave(3, dim=0),
        actions=batch.actions.repeat_interleave(3, dim=0),
        is_pad=batch.is_pad.repeat_interleave(3, dim=0),
        row=batch.row.repeat(3),
    )
    shared = flow_loss(expert, batch, FlowSchedule(), 3, torch.Generator().manual_seed(1))
    alone = flow_loss(expert, tripled, FlowSchedule(), 1, torch.Generator().manual_seed(1))
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)


def test_more_draws_estimate_the_same_loss_with_less_variance(batch: Batch, expert: ActionExpert) -> None:
    def estimates(draws: int, count: int) -> Array:
        with torch.no_grad():
            return np.array(
                [
                    float(flow_loss(expert, batch, FlowSchedule(), draws, torch.Generator().manual_seed(seed)))
                    for seed in range(count)
                ]
            )

    one, many = estimates(1, 200), estimates(16, 50)
    assert many.mean() == pytest.approx(one.mean(), rel=4 * one.std() / one.mean() / np.sqrt(200) + 0.02)
    assert many.std() < 0.5 * one.std()  # 16 draws divide the standard deviation by 4 in expectation


def test_the_error_of_the_best_constant_chunk_equals_a_hand_computation() -> None:
    # Two chunks of two steps and one dimension. The second step of the second chunk is padding.
    batch = hand_batch(actions=[[[1.0], [5.0]], [[3.0], [99.0]]], pad=[[False, False], [False, True]])
    # Step 0: the mean of 1 and 3 is 2, errors 1 and 1. Step 1: the mean of 5 alone is 5, error 0. Three steps count.
    assert validate(still, [batch], FlowSchedule(), steps=1, noise_seed=0).constant_error == pytest.approx(2 / 3)


def test_the_constant_chunk_is_shared_by_all_batches() -> None:
    batches = [hand_batch(actions=[[[value]]], pad=[[False]]) for value in (1.0, 2.0, 6.0)]
    # mean 3, errors 4, 1, 9
    assert validate(still, batches, FlowSchedule(), steps=1, noise_seed=0).constant_error == pytest.approx(14 / 3)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_action_error_of_a_constant_velocity_equals_a_hand_computation(batch: Batch, steps: int) -> None:
    """Integrating a velocity c from t = 1 to 0 gives noise - c on any grid."""

    def constant(noisy: Tensor, t: Tensor, state: Tensor, prefix: PrefixKV) -> Tensor:
        return torch.full_like(noisy, 0.25)

    noise = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(9)).double().numpy()
    squares = ((noise - 0.25 - batch.actions.double().numpy()) ** 2).mean(axis=-1)
    found = validate(constant, [batch], FlowSchedule(), steps=steps, noise_seed=9)
    assert found.action_error == pytest.approx(squares[~batch.is_pad.numpy()].mean(), rel=1e-5)


def test_validation_weighs_rows_equally_for_any_batch_size() -> None:
    one = hand_batch(actions=[[[1.0]], [[2.0]], [[4.0]]], pad=[[False]] * 3)
    parts = [hand_batch(actions=[[[1.0]], [[2.0]]], pad=[[False]] * 2), hand_batch(actions=[[[4.0]]], pad=[[False]])]
    whole, split = (validate(still, batches, FlowSchedule(), steps=2, noise_seed=0) for batches in ([one], parts))
    assert split.action_error == pytest.approx(whole.action_error)
    assert split.constant_error == pytest.approx(whole.constant_error)


def test_the_validation_loss_is_the_same_each_time(batch: Batch, expert: ActionExpert) -> None:
    torch.manual_seed(0)
    one = validate(expert, [batch, batch], FlowSchedule(), steps=2, noise_seed=0)
    torch.manual_seed(1)
    assert validate(expert, [batch, batch], FlowSchedule(), steps=2, noise_seed=0) == one


def test_the_ratio_is_relative_to_the_constant_chunk() -> None:
    assert Validation(loss=0.0, action_error=1.5, constant_error=2.0).ratio == 0.75


def still(noisy: Tensor, t: Tensor, state: Tensor, prefix: PrefixKV) -> Tensor:
    return torch.zeros_like(noisy)


def hand_batch(*, actions: list[list[list[float]]], pad: list[list[bool]]) -> Batch:
    count = len(actions)
    nothing = PrefixKV((LayerKV(torch.zeros(count, 1, 1, 2), torch.zeros(count, 1, 1, 2)),), None)
    return Batch(
        prefix=nothing,
        state=torch.zeros(count, 2),
        actions=torch.tensor(actions),
        is_pad=torch.tensor(pad),
        row=np.arange(count),
    )
