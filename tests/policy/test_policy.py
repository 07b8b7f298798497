"""Test `policy.policy` from images to actions, with a real but untrained editor."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import Observation
from imagewam_cli.editors.diffusers import DiffusersEditor
from imagewam_cli.errors import DatasetError, ImagewamError, RunError
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.policy.policy import Policy, load_policy_editor
from imagewam_cli.prefix.kv import PrefixKV
from tests.support.policies import EXECUTE, HORIZON, INFERENCE_STEPS


def count_plans(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each forward pass of the editor."""
    encode, seen = policy.editor.encode, list[int]()

    def counting(images: Any, instructions: Any) -> PrefixKV:
        seen.append(len(images))
        return encode(images, instructions)

    monkeypatch.setattr(policy.editor, "encode", counting)
    return seen


class TestActing:
    def test_the_editor_runs_once_per_executed_part_of_a_chunk(
        self, policy: Policy, observations: list[Observation], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (policy.chunks([o])[0] for o in observations[:2])
        plans = count_plans(policy, monkeypatch)
        acted = [policy.act(observations[0]) for _ in range(EXECUTE)]
        acted += [policy.act(observations[1]) for _ in range(EXECUTE)]
        assert plans == [1, 1]
        np.testing.assert_array_equal(np.stack(acted), np.concatenate([first[:EXECUTE], second[:EXECUTE]]))

    def test_reset_runs_the_editor_again(
        self, policy: Policy, observation: Observation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plans = count_plans(policy, monkeypatch)
        first = policy.act(observation)
        policy.reset()
        np.testing.assert_array_equal(policy.act(observation), first)
        assert len(plans) == 2

    def test_the_same_observation_gives_the_same_chunk(self, policy: Policy, observation: Observation) -> None:
        torch.manual_seed(0)
        first = policy.chunks([observation])
        torch.manual_seed(1)
        np.testing.assert_array_equal(policy.chunks([observation]), first)

    def test_pictures_in_another_form_act_the_same(self, policy: Policy, observation: Observation) -> None:
        picture = observation.images["top"]
        for form in (picture.transpose(2, 0, 1), picture / np.float32(255), torch.from_numpy(picture.copy())):
            other = dataclasses.replace(observation, images={"top": form, "unused": None})  # type: ignore[dict-item]
            np.testing.assert_array_equal(policy.chunks([other]), policy.chunks([observation]))

    def test_no_observation_gives_no_chunk(self, policy: Policy) -> None:
        assert policy.chunks([]).shape == (0, HORIZON, 3)

    def test_threads_get_the_numbers_of_serial_calls(self, policy: Policy, observations: list[Observation]) -> None:
        expected = [policy.chunks([o]) for o in observations]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                for got, wanted in zip(pool.map(lambda o: policy.chunks([o]), observations), expected, strict=True):
                    np.testing.assert_array_equal(got, wanted)

    def test_a_chunk_has_the_declared_shape(self, policy: Policy, observations: list[Observation]) -> None:
        chunks = policy.chunks(observations)
        assert chunks.shape == (len(observations), HORIZON, 3)
        assert chunks.dtype == np.float32

    def test_a_policy_loaded_twice_acts_the_same(self, run: Path, tiny_weights: Path, observation: Observation) -> None:
        one, two = (Policy.load(folder, weights=tiny_weights) for folder in (run, run / "policy"))
        np.testing.assert_array_equal(one.chunks([observation]), two.chunks([observation]))


class TestNumbers:
    def test_a_chunk_is_the_euler_integral_in_robot_units(self, policy: Policy, observation: Observation) -> None:
        """Recompute a chunk from noise of seed 42 with shift 5 and min-max scaling of state and action."""
        state, action = policy.parts.state_normalizer.stats, policy.parts.action_normalizer.stats
        low, high = np.array(state.min), np.array(state.max)
        normalized = torch.tensor(2 * (observation.state - low) / (high - low) - 1, dtype=torch.float32)[None]
        u = np.linspace(1, 0, INFERENCE_STEPS + 1)
        grid = 5 * u / (1 + 4 * u)
        x = torch.randn(1, HORIZON, 3, generator=torch.Generator().manual_seed(42))
        with torch.no_grad():
            prefix = policy.editor.encode([observation.images], [observation.instruction])
            for now, then in itertools.pairwise(grid):
                x = x + (then - now) * policy.expert(x, torch.tensor([now]).float(), normalized, prefix)
        low, high = np.array(action.min), np.array(action.max)
        expected = (x[0].numpy() + 1) / 2 * (high - low) + low
        np.testing.assert_allclose(policy.chunks([observation])[0], expected, rtol=1e-4, atol=1e-5)

    def test_a_live_prefix_gives_the_same_actions_as_the_cached_one(
        self, policy: Policy, tiny_cache: Path, tabletop: Path
    ) -> None:
        """Cached rows are padded to the cache's longest instruction, live ones are not."""
        reader = CacheReader(tiny_cache)
        rows = [row for row in open_dataset(tabletop).rows(stride=4) if row.frame == 8]
        places = np.nonzero(reader.index.frame == 8)[0]
        for place, row in zip(places, rows, strict=True):
            state, noise = policy.normalized_state([row.observation()]), policy.initial_noise(1)
            with torch.no_grad():
                cached = integrate(
                    policy.expert,
                    noise,
                    state,
                    reader.read(np.array([place])),
                    FlowSchedule(shift=5.0),
                    INFERENCE_STEPS,
                )
            expected = policy.parts.action_normalizer.denormalize(cached[0].numpy())
            np.testing.assert_allclose(policy.chunks([row.observation()])[0], expected, rtol=1e-4, atol=1e-5)

    def test_instructions_of_any_length_in_a_batch_act_as_one_by_one(
        self, policy: Policy, observation: Observation
    ) -> None:
        observed = [
            dataclasses.replace(observation, instruction=text)
            for text in ("stop", "put the red block on the blue zone", "push the green block to the left side")
        ]
        together = policy.chunks(observed)
        alone = np.concatenate([policy.chunks([o]) for o in observed])
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-3  # the instruction has an effect

    def test_scenes_in_a_batch_act_as_one_by_one(self, policy: Policy, observations: list[Observation]) -> None:
        together = policy.chunks(observations)
        alone = np.concatenate([policy.chunks([o]) for o in observations])
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)

    def test_the_state_changes_the_actions(self, policy: Policy, observation: Observation) -> None:
        moved = dataclasses.replace(observation, state=observation.state + np.float32(0.1))
        assert np.abs(policy.chunks([moved]) - policy.chunks([observation])).max() > 1e-3

    def test_with_blank_images_the_image_has_no_effect(
        self, policy: Policy, observations: list[Observation], load_tiny: Any
    ) -> None:
        one = observations[0]
        other = dataclasses.replace(one, images=observations[1].images)
        blind = Policy(policy.parts, policy.expert, load_tiny(blank_images=True))
        np.testing.assert_array_equal(blind.chunks([one]), blind.chunks([other]))
        assert (
            np.abs(policy.chunks([one]) - policy.chunks([other])).max() > 1e-3
        )  # without blanking, the image has an effect


class TestRefusal:
    @pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), ()])
    def test_a_state_of_the_wrong_shape_is_refused_with_both_shapes(
        self, policy: Policy, observation: Observation, shape: tuple[int, ...]
    ) -> None:
        wrong = dataclasses.replace(observation, state=np.zeros(shape, np.float32))
        with pytest.raises(DatasetError) as error:
            policy.act(wrong)
        assert f"state has shape {shape}, but the policy needs (3,)" in error.value.message
        assert "gripper_x" in error.value.message

    def test_a_missing_camera_is_named(self, policy: Policy, observation: Observation) -> None:
        elsewhere = dataclasses.replace(observation, images={"wrist": observation.images["top"]})
        with pytest.raises(DatasetError, match="no picture of camera 'top'; there are: wrist") as error:
            policy.act(elsewhere)
        assert "cameras are named top" in (error.value.hint or "")

    def test_a_state_that_is_not_finite_is_refused_with_its_dimensions(
        self, policy: Policy, observation: Observation
    ) -> None:
        state = observation.state.copy()
        state[[0, 2]] = np.nan, np.inf
        with pytest.raises(DatasetError, match=r"the state is not finite: gripper_x is nan, .* is inf"):
            policy.act(dataclasses.replace(observation, state=state))

    def test_everything_is_checked_before_anything_is_computed(
        self, policy: Policy, observations: list[Observation], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plans = count_plans(policy, monkeypatch)
        empty = dataclasses.replace(observations[1], images={"top": np.zeros((0, 0, 3), np.uint8)})
        with pytest.raises(DatasetError, match=r"observation 1: camera 'top': got an empty picture"):
            policy.chunks([observations[0], empty])
        assert plans == []

    def test_a_plan_that_is_not_finite_is_refused(
        self, policy: Policy, observation: Observation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(policy.parts.action_normalizer), "denormalize", lambda _self, chunk: chunk * np.inf)
        with pytest.raises(RunError, match="not finite: "):
            policy.act(observation)

    def test_another_editor_is_refused_with_both_fingerprints(
        self, run: Path, tiny_weights: Path, tmp_path: Path, load_tiny: Any
    ) -> None:
        """The editors differ in one number of one weight."""
        other = shutil.copytree(tiny_weights, tmp_path / "other")
        path = next((other / "transformer").glob("*.safetensors"))
        tensors = load_file(path)
        name = sorted(tensors)[0]
        tensors[name].view(-1)[0] += 1
        save_file(tensors, path, {"format": "pt"})
        there, here = (load_tiny(weights=folder).weights.sha256 for folder in (tiny_weights, other))
        with pytest.raises(RunError) as error:
            Policy.load(run, weights=other)
        assert f"editor weights is {here[:16]}, but the policy expects {there[:16]}" in error.value.message
        assert "--weights" in (error.value.hint or "")

    def test_other_settings_are_refused_with_both_values(self, loaded: Policy, tiny_weights: Path) -> None:
        reference = loaded.parts.editor
        changed = dataclasses.replace(reference, settings=dataclasses.replace(reference.settings, timestep=0.5))
        with pytest.raises(RunError, match=r"setting 'timestep' is 0\.5, but the policy expects 0\.0"):
            load_policy_editor(changed, weights=tiny_weights)

    def test_unknown_fingerprint_extras_are_refused_with_their_values(
        self, loaded: Policy, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(DiffusersEditor, "fingerprint_extras", lambda _self: {"guidance": 3.5})
        with pytest.raises(RunError, match=r"recipe is \{'guidance': 3\.5\}, but the policy expects None"):
            load_policy_editor(loaded.parts.editor, weights=tiny_weights)

    @pytest.mark.parametrize("name", ["policy.json", "editor.json", "expert.json", "expert.safetensors"])
    def test_a_missing_file_is_named(self, run: Path, tmp_path: Path, name: str) -> None:
        folder = shutil.copytree(run / "policy", tmp_path / "policy")
        (folder / name).unlink()
        with pytest.raises(RunError, match=name.replace(".", r"\.")):
            Policy.load(folder)

    @pytest.mark.parametrize("name", ["expert.json", "expert.safetensors"])
    @pytest.mark.parametrize("size", [0, 50])
    def test_a_truncated_expert_is_a_clear_error(self, run: Path, tmp_path: Path, name: str, size: int) -> None:
        folder = shutil.copytree(run / "policy", tmp_path / "policy")
        os.truncate(folder / name, size)
        with pytest.raises(ImagewamError, match=r"expert\.(json|safetensors)"):
            Policy.load(folder)

    def test_an_expert_of_another_shape_is_refused(self, run: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(run / "policy", tmp_path / "policy")
        tensors = load_file(folder / "expert.safetensors")
        del tensors["head.linear.weight"]
        save_file(tensors, folder / "expert.safetensors")
        with pytest.raises(RunError, match=r"expert\.safetensors does not fit"):
            Policy.load(folder)
