"""Test policies that pass the state as a token of the editor's text: actions, bundle and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imagewam_cli.data.types import Observation
from imagewam_cli.editors.contract import TextToken
from imagewam_cli.editors.text import Text, with_token
from imagewam_cli.errors import DatasetError, RunError, UsageError
from imagewam_cli.expert.checkpoint import load_expert, save_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import initial_noise, integrate
from imagewam_cli.policy.action_transforms import GripperSign
from imagewam_cli.policy.bundle import PROPRIO, ProprioConfig, read_bundle, write_bundle
from imagewam_cli.policy.policy import Policy
from tests.support.policies import observation, random_expert, write_policy

WIDTH, STATE, LENGTH = 96, 3, 24


def linear() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "weight": torch.randn(WIDTH, STATE, generator=generator),
        "bias": torch.randn(WIDTH, generator=generator),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, load_tiny: Any) -> Path:
    """A policy on the small editor whose expert takes no state."""
    path = write_policy(tmp_path_factory.mktemp("proprio") / "policy", load_tiny())
    config = dataclasses.replace(load_expert(path).config, state_dim=0, places=False)
    save_expert(path, config, random_expert(config).state_dict())
    parts = read_bundle(path)
    proprio = ProprioConfig(state_dim=STATE, text_width=WIDTH, placement="packed", text_tokens=LENGTH)
    write_bundle(path, dataclasses.replace(parts, config=dataclasses.replace(parts.config, proprio=proprio)))
    save_file(linear(), path / PROPRIO)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path, tiny_weights: Path) -> Policy:
    return Policy.load(folder, weights=tiny_weights)


def moved(seen: Observation) -> Observation:
    return dataclasses.replace(seen, state=seen.state + np.float32(0.2))


def test_the_prefix_is_that_of_the_text_with_the_token(policy: Policy) -> None:
    """Compare each row with its own text and token, without padding or mask."""
    rows = [observation(0), observation(1, "push")]
    prefix = policy.prefix(rows)
    assert prefix.valid is not None
    weights = linear()
    for i, row in enumerate(rows):
        state = torch.from_numpy(policy.parts.state_normalizer.normalize(row.state))
        states = policy.editor._texts.batch([row.instruction]).embeds  # type: ignore[attr-defined]
        token = (weights["weight"] @ state + weights["bias"])[None, None]
        text = Text(embeds=torch.cat([states, token], dim=1), valid=torch.ones(1, states.shape[1] + 1).bool())
        alone = _run(policy, row, text)
        for whole, kv in zip(prefix.layers, alone, strict=True):
            torch.testing.assert_close(whole.k[i][prefix.valid[i]], kv.k[0], atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(whole.v[i][prefix.valid[i]], kv.v[0], atol=2e-5, rtol=1e-5)


def _run(policy: Policy, row: Observation, text: Text) -> list[Any]:
    from imagewam_cli.prefix.capture import record

    editor: Any = policy.editor
    picture = editor._pixels(editor._picture(row.images))[None]
    with torch.no_grad(), record(editor.denoiser, editor.layer_names, stop_after_last=True) as recording:
        editor.run(picture, text)
    return list(recording.layers.values())


def test_the_chunk_is_what_the_expert_plans_on_that_prefix(policy: Policy) -> None:
    row, config = observation(2), policy.parts.config
    noise = initial_noise(1, config.horizon, 3, config.noise_seed)
    with torch.no_grad():
        chunk = integrate(
            policy.expert, noise, None, policy.prefix([row]), FlowSchedule(shift=config.shift), config.inference_steps
        )
    expected = policy.parts.action_normalizer.denormalize(chunk.numpy())
    np.testing.assert_allclose(policy.chunks([row]), expected, atol=1e-6)


def test_the_state_affects_the_action_only_through_the_text(policy: Policy) -> None:
    row = observation(2)
    assert policy.expert.config.state_dim == 0
    assert np.abs(policy.chunks([row]) - policy.chunks([moved(row)])).max() > 1e-4


def test_missing_or_wrong_token_weights_are_refused(folder: Path, tiny_weights: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "policy"
    shutil.copytree(folder, broken)
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, broken / PROPRIO)
    with pytest.raises(RunError, match="does not fit"):
        Policy.load(broken, weights=tiny_weights)
    (broken / PROPRIO).unlink()
    with pytest.raises(RunError, match="missing"):
        Policy.load(broken, weights=tiny_weights)


def test_an_editor_that_cannot_extend_its_text_is_refused(load_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = load_tiny()
    monkeypatch.setattr(type(editor), "takes_text_token", False)
    token = TextToken(vectors=torch.zeros(1, WIDTH), placement="packed", text_tokens=LENGTH)
    with pytest.raises(UsageError, match="cannot add a token"):
        editor.encode_with([observation(0).images], ["push"], token)


@pytest.mark.parametrize(
    ("placement", "text_tokens", "states", "valid"),
    [
        ("packed", 4, [1, 3, 9, 2, 4], [1, 1, 1, 0, 0]),
        ("appended", 4, [1, 2, 3, 4, 9], [1, 0, 1, 0, 1]),
        ("packed", 6, [1, 3, 9, 2, 4, 0, 0], [1, 1, 1, 0, 0, 0, 0]),
        ("appended", 6, [1, 2, 3, 4, 0, 0, 9], [1, 0, 1, 0, 0, 0, 1]),
        ("packed", 2, [1, 9, 2], [1, 1, 0]),
        ("appended", 2, [1, 2, 9], [1, 0, 1]),
    ],
)
def test_the_token_is_inserted_at_the_configured_position(
    placement: Any, text_tokens: int, states: list[float], valid: list[int]
) -> None:
    text = Text(embeds=torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), valid=torch.tensor([[True, False, True, False]]))
    token = TextToken(vectors=torch.tensor([[9.0]]), placement=placement, text_tokens=text_tokens)
    found = with_token(text, token)
    assert found.embeds[0, :, 0].tolist() == states
    assert found.valid[0].tolist() == [bool(v) for v in valid]


def test_gripper_commands_are_open_or_closed(policy: Policy) -> None:
    parts = dataclasses.replace(policy.parts, action_transforms=(GripperSign(["grip"]),))
    binary = Policy(parts, policy.expert, policy.editor, proprio=policy.proprio)
    recorded = np.array([[0.3, -0.7, 1.0], [0.3, -0.7, 0.0], [0.3, -0.7, 0.6]], dtype=np.float32)
    assert binary.command(recorded)[:, 2].tolist() == [-1.0, 1.0, -1.0]
    assert np.array_equal(binary.command(recorded)[:, :2], recorded[:, :2])
    assert set(np.unique(binary.chunks([observation(0)])[..., 2])) <= {-1.0, 1.0}
    with pytest.raises(DatasetError, match="4 dimensions, but the policy has 3"):
        binary.command(np.zeros((1, 4), dtype=np.float32))
