"""Test `cache_study.layer_selection`: layers that predict the actions are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imagewam_cli.cache_study.layer_selection import LayerSketches, choose_layers
from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.kv import LayerKV, PrefixKV

ROWS, LAYERS = 120, 5
INFORMATIVE = (1, 3)


@pytest.fixture(scope="module")
def sample() -> tuple[LayerSketches, np.ndarray, np.ndarray, list[int]]:
    """Two layers each determine half of the actions; the others hold noise."""
    rng = np.random.default_rng(0)
    causes = rng.normal(size=(ROWS, 2))
    maps = rng.normal(size=(LAYERS, 2, 6, 2, 4))
    sketches = LayerSketches()
    kv = []
    for i in range(LAYERS):
        shown = causes[:, INFORMATIVE.index(i)] if i in INFORMATIVE else rng.normal(size=ROWS)
        k, v = (torch.from_numpy((shown[:, None, None, None] * m).astype(np.float32)) for m in maps[i])
        noise = torch.from_numpy(rng.normal(size=k.shape).astype(np.float32))
        kv.append(LayerKV(k + 0.1 * noise, v))
    for first in range(0, ROWS, 32):
        sketches.add(PrefixKV(tuple(LayerKV(x.k[first : first + 32], x.v[first : first + 32]) for x in kv), None))
    state = rng.normal(size=(ROWS, 2))
    actions = causes @ rng.normal(size=(2, 3)) + 0.05 * rng.normal(size=(ROWS, 3))
    return sketches, state, actions, [i // 10 for i in range(ROWS)]


def test_layers_that_predict_the_actions_are_kept(
    sample: tuple[LayerSketches, np.ndarray, np.ndarray, list[int]],
) -> None:
    sketches, state, actions, episodes = sample
    choice = choose_layers(sketches.kernels(), state, actions, episodes, 2)
    assert choice.kept == INFORMATIVE
    assert sorted(choice.removed) == [0, 2, 4]
    assert choice.errors[-1] < choice.errors[0], "removing layers of noise does not reduce the error"
    one = choose_layers(sketches.kernels(), state, actions, episodes, 1)
    assert set(one.kept) < set(INFORMATIVE)
    assert one.errors[-1] > 5 * choice.errors[-1], "one of the two layers is enough, but each determines only half"


def test_all_layers_are_kept_if_requested(
    sample: tuple[LayerSketches, np.ndarray, np.ndarray, list[int]],
) -> None:
    sketches, state, actions, episodes = sample
    choice = choose_layers(sketches.kernels(), state, actions, episodes, LAYERS)
    assert (choice.kept, choice.removed) == (tuple(range(LAYERS)), ())


@pytest.mark.parametrize("keep", [0, LAYERS + 1])
def test_more_layers_than_exist_are_refused(
    sample: tuple[LayerSketches, np.ndarray, np.ndarray, list[int]], keep: int
) -> None:
    sketches, state, actions, episodes = sample
    with pytest.raises(UsageError, match=f"auto:{keep}: the editor has {LAYERS} layers"):
        choose_layers(sketches.kernels(), state, actions, episodes, keep)


def test_one_episode_is_too_few(sample: tuple[LayerSketches, np.ndarray, np.ndarray, list[int]]) -> None:
    sketches, state, actions, _ = sample
    with pytest.raises(UsageError, match="a single episode"):
        choose_layers(sketches.kernels(), state, actions, [0] * ROWS, 2)
