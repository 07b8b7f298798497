"""`Policy`: a trained policy in torch. The editor encodes pictures and instruction, the expert denoises a chunk.

policy = Policy.load("runs/my-run")
policy.reset()
action = policy.act(Observation(images={"top": picture}, state=state, instruction="put the red block on the blue zone"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from imagewam_cli.data.types import FloatArray, KeyMap, Observation
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.loading.placement import require_device
from imagewam_cli.errors import RunError, warn
from imagewam_cli.expert.checkpoint import load_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.expert.sampler import initial_noise, integrate
from imagewam_cli.kvcache.format.provenance import Provenance
from imagewam_cli.policy.acting import ChunkPolicy, own_errors
from imagewam_cli.policy.action_transforms import apply_all
from imagewam_cli.policy.bundle import (
    TUNED,
    BundleParts,
    EditorReference,
    TrainingRecord,
    find_bundle,
    inherited_faults,
    read_bundle,
)
from imagewam_cli.policy.matching import Interface
from imagewam_cli.policy.proprio import ProprioEncoder, load_proprio
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.runtime.actions import require_finite
from imagewam_cli.runtime.observation import ObservationLike, ObservationReader


class Policy(ChunkPolicy):
    """An editor, an expert, normalizers and action transforms, ready to act."""

    def __init__(
        self,
        parts: BundleParts,
        expert: ActionExpert,
        editor: Editor,
        device: str = "cpu",
        proprio: ProprioEncoder | None = None,
    ) -> None:
        """proprio: encoder of the state token, if the state is a token of the editor's text."""
        self.parts, self.expert, self.editor, self.device, self.proprio = parts, expert, editor, device, proprio
        self.execute = parts.config.execute
        self._schedule = FlowSchedule(shift=parts.config.shift)
        self._reader = ObservationReader(parts.config.cameras, parts.config.state_names)

    @classmethod
    def load(cls, folder: Path | str, *, hardware: Hardware = CPU, weights: Path | None = None) -> Policy:
        """Load the policy of a run or bundle folder.

        hardware: where the editor runs; the expert runs on the same device. weights: a diffusers folder of the editor;
        None: the embedded weights or those in the Hub's cache.

        Raises:
            UsageError: this machine lacks the device.
            RunError: the folder contains no policy, or the editor is not the one that the policy was trained with.
        """
        bundle = find_bundle(Path(folder))
        parts = read_bundle(bundle)
        for fault in inherited_faults(parts):
            warn(f"{bundle}: {fault}")
        require_device(hardware)
        expert = load_expert(bundle, hardware.device)
        found = parts.config.proprio
        proprio = None if found is None else load_proprio(bundle, found, hardware.device, expert.dtype)
        editor = load_policy_editor(parts.editor, hardware=hardware, weights=weights, bundle=bundle)
        policy = cls(parts, expert, editor, hardware.device, proprio)
        policy.folder = Path(folder)
        return policy

    @property
    def interface(self) -> Interface:
        config = self.parts.config
        return Interface(
            what=str(self.folder or "the policy"),
            cameras=config.cameras,
            state_names=config.state_names,
            action_names=config.action_names,
            fps=config.fps,
            # only imported policies have these, and their names and rate are those of a preset
            nominal=config.proprio is not None or self.parts.editor.tuned,
        )

    @property
    def training(self) -> TrainingRecord | None:
        return self.parts.training

    @property
    def horizon(self) -> int:
        """Number of actions in a chunk."""
        return self.parts.config.horizon

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that an observation must have."""
        return self.parts.config.cameras

    @property
    def keys(self) -> KeyMap | None:
        """The dataset's features that the policy was trained on; None if they were not recorded."""
        return self.parts.config.keys

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        """Plan a chunk of commands for each observation, (B, T, A) in robot units.

        They are float32, or float64 where float32 would round what the dataset records (`Normalizer.dtype`).

        Raises:
            DatasetError: an observation cannot be used; the message names the camera or the state's dimension.
            RunError: the planned actions are not finite.
        """
        observations = self.read(observations)
        if not observations:
            return np.empty((0, self.horizon, len(self.parts.config.action_names)), dtype=np.float32)
        state = self.normalized_state(observations)
        with torch.no_grad():
            prefix = self.prefix(observations)
            noise = self.initial_noise(len(observations))
            chunk = integrate(self.expert, noise, state, prefix, self._schedule, self.parts.config.inference_steps)
        actions = self.parts.action_normalizer.denormalize(chunk.float().cpu().numpy())
        with own_errors():
            return require_finite(self.command(actions), self.parts.config.action_names)

    def read(self, observations: Sequence[ObservationLike]) -> list[Observation]:
        with own_errors():
            return self._reader.read(observations)

    def command(self, actions: FloatArray) -> FloatArray:
        """Convert actions (..., A), as a dataset records them, to commands with the policy's action transforms.

        Raises:
            DatasetError: the actions and the policy differ in the number of dimensions.
        """
        return apply_all(self.parts.action_transforms, actions, self.parts.config.action_names)

    def prefix(self, observations: Sequence[Observation]) -> PrefixKV:
        """Encode the observations with the editor, in the expert's precision.

        The state is part of the prefix only if it is a token of the text (`proprio`).
        """
        images, instructions = [o.images for o in observations], [o.instruction for o in observations]
        if self.proprio is None:
            prefix = self.editor.encode(images, instructions)
        else:
            with torch.no_grad():
                token = self.proprio.token(self.normalized_state(observations))
            prefix = self.editor.encode_with(images, instructions, token)
        return prefix.to(self.device, self.expert.dtype)

    def normalized_state(self, observations: Sequence[Observation]) -> torch.Tensor:
        """Return the normalized states, float32 (B, S)."""
        with own_errors():
            states = np.stack([self._reader.read_state(o.state) for o in observations])
        return torch.from_numpy(self.parts.state_normalizer.normalize(states)).to(self.device)

    def initial_noise(self, count: int) -> torch.Tensor:
        """Return the initial noise, (count, T, A) in the expert's precision; it is the same at every replan."""
        config = self.parts.config
        noise = initial_noise(count, config.horizon, len(config.action_names), config.noise_seed)
        return noise.to(self.device, self.expert.dtype)


def load_policy_editor(
    reference: EditorReference, *, hardware: Hardware = CPU, weights: Path | None = None, bundle: Path | None = None
) -> Editor:
    """Load the editor of a policy, and check it against the fingerprint that the policy was trained with.

    bundle: the policy's folder; needed if it contains fine-tuned parts of the editor.

    Raises:
        RunError: the editor has different weights or settings; the message gives both values.
    """
    tuned = bundle / TUNED if bundle is not None and reference.tuned else None
    editor = load_editor(reference.name, reference.settings, weights=weights, hardware=hardware, tuned=tuned)
    expected, found = Provenance(fingerprint=reference.fingerprint), Provenance(fingerprint=editor.fingerprint())
    for different in expected.differences(found):
        raise RunError(
            f"the editor {reference.name!r} is not the one that the policy was trained on: {different.what} is "
            f"{different.here}, but the policy expects {different.there}",
            "pass the right weights with --weights DIR, or train the policy again",
        )
    if expected.counted_unused_weights(found):
        warn(
            f"the policy was made by an older imagewam, whose digest of the weights of {reference.name!r} counted "
            "files that are not used, such as a LoRA: the weights are the same"
        )
    return editor
