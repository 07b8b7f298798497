"""Test the optimizer against torch's AdamW and Muon, stepped by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from imagewam_cli.training.optimizer import ExpertOptimizer
from imagewam_cli.training.recipe import OptimizerRecipe

RECIPE = OptimizerRecipe(learning_rate=0.01, weight_decay=0.1)
X = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(5, 6)]), "head": nn.Linear(6, 2)})


def loss(net: nn.ModuleDict) -> Tensor:
    hidden = net["blocks"][0](X)  # type: ignore[index]
    out: Tensor = net["head"](hidden.tanh()).square().mean()
    return out


def test_matrices_of_blocks_use_muon_and_the_rest_adamw() -> None:
    ours, theirs = model(), model()
    optimizer = ExpertOptimizer(ours, RECIPE)
    matrix = theirs["blocks"][0].weight  # type: ignore[index]
    rest = [p for p in theirs.parameters() if p is not matrix]
    muon = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=RECIPE.betas)
    for _ in range(3):
        for net, parts in ((ours, [optimizer]), (theirs, [muon, adamw])):
            for part in parts:
                part.zero_grad()  # type: ignore[attr-defined]
            loss(net).backward()
            for part in parts:
                part.step()  # type: ignore[attr-defined]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adamw_can_be_used_for_all_parameters() -> None:
    ours, theirs = model(), model()
    recipe = OptimizerRecipe(name="adamw", learning_rate=0.01, weight_decay=0.1)
    optimizer = ExpertOptimizer(ours, recipe)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, betas=recipe.betas)
    for _ in range(3):
        optimizer.zero_grad()
        loss(ours).backward()
        optimizer.step()
        adamw.zero_grad()
        loss(theirs).backward()
        adamw.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loaded_state_gives_the_same_steps(name: str) -> None:
    recipe = OptimizerRecipe(name=name, learning_rate=0.01)  # type: ignore[arg-type]
    ours = model()
    optimizer = ExpertOptimizer(ours, recipe)
    loss(ours).backward()
    optimizer.step()
    copied = copy.deepcopy(ours)
    other = ExpertOptimizer(copied, recipe)
    other.load({name: value.clone() for name, value in optimizer.state().items()})
    for net, used in ((ours, optimizer), (copied, other)):
        used.set_rate(0.005)
        used.zero_grad()
        loss(net).backward()
        used.step()
    for one, same in zip(ours.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, same)


def test_state_of_another_model_is_refused() -> None:
    net = model()
    optimizer = ExpertOptimizer(net, RECIPE)
    loss(net).backward()
    optimizer.step()
    whole = optimizer.state()
    with pytest.raises(KeyError, match=r"tail\.weight"):
        optimizer.load(whole | {"tail.weight/exp_avg": torch.zeros(1)})
    part = {path: value for path, value in whole.items() if not path.startswith("head.bias/")}
    with pytest.raises(KeyError, match=r"no optimizer state for head\.bias"):
        optimizer.load(part)
