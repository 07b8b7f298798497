"""`Policy`: a trained policy on torch. Pictures and instruction become a prefix, the expert denoises a chunk on it.

policy = Policy.load("runs/my-run")
policy.reset()
action = policy.act(Observation(images={"top": picture}, state=state, instruction="put the red block on the blue zone"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from imagewam_cli.data.types import Float32Array, Observation
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.loading.placement import require_device
from imagewam_cli.errors import DatasetError, RunError
from imagewam_cli.expert.checkpoint import load_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.expert.sampler import initial_noise, integrate
from imagewam_cli.kvcache.format.manifest import fingerprint_digest
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.bundle import TUNED, BundleParts, EditorReference, find_bundle, read_bundle
from imagewam_cli.policy.proprio import ProprioEncoder, load_proprio
from imagewam_cli.prefix.kv import PrefixKV


class Policy(ChunkPolicy):
    """Editor, expert and normalisers, ready to act."""

    def __init__(
        self,
        parts: BundleParts,
        expert: ActionExpert,
        editor: Editor,
        device: str = "cpu",
        proprio: ProprioEncoder | None = None,
    ) -> None:
        """proprio: where the state is a token of the editor's text."""
        self.parts, self.expert, self.editor, self.device, self.proprio = parts, expert, editor, device, proprio
        self.execute = parts.config.execute
        self._schedule = FlowSchedule(shift=parts.config.shift)
        self.reset()

    @classmethod
    def load(cls, folder: Path | str, *, hardware: Hardware = CPU, weights: Path | None = None) -> Policy:
        """The policy of a run or bundle folder.

        hardware: of the editor; the expert runs on the same device. weights: a diffusers folder of the editor, where
        it is not the embedded one or in the Hub's cache.

        Raises:
            UsageError: this machine has no such device.
            RunError: no policy there, or the editor found is not the one that the policy was trained on.
        """
        bundle = find_bundle(Path(folder))
        parts = read_bundle(bundle)
        require_device(hardware)
        expert = load_expert(bundle, hardware.device)
        found = parts.config.proprio
        proprio = None if found is None else load_proprio(bundle, found, hardware.device, expert.dtype)
        editor = load_policy_editor(parts.editor, hardware=hardware, weights=weights, bundle=bundle)
        return cls(parts, expert, editor, hardware.device, proprio)

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""
        return self.parts.config.horizon

    @property
    def cameras(self) -> tuple[str, ...]:
        """Pictures that an observation must have."""
        return self.parts.config.cameras

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        """(B, T, A) in robot units."""
        state = self.normalized_state(observations)
        with torch.no_grad():
            prefix = self.prefix(observations)
            noise = self.initial_noise(len(observations))
            chunk = integrate(self.expert, noise, state, prefix, self._schedule, self.parts.config.inference_steps)
        return self.command(self.parts.action_normalizer.denormalize(chunk.float().cpu().numpy()))

    def command(self, actions: Float32Array) -> Float32Array:
        """Grippers from [0, 1], 1 open, to -1 open, 1 closed; the rest is sent as it is.

        Raises:
            DatasetError: A is not the policy's.
        """
        grippers, dimensions = list(self.parts.config.grippers), len(self.parts.config.action_names)
        if not grippers:
            return actions
        if actions.shape[-1] != dimensions:
            raise DatasetError(f"actions have {actions.shape[-1]} dimensions, the policy's have {dimensions}")
        sent = actions.copy()
        sent[..., grippers] = -np.sign(2 * actions[..., grippers] - 1)
        return sent

    def prefix(self, observations: Sequence[Observation]) -> PrefixKV:
        """What the editor leaves of these pictures and instructions, and of the state where it is a token of the
        text; in the expert's precision."""
        images, instructions = [o.images for o in observations], [o.instruction for o in observations]
        if self.proprio is None:
            prefix = self.editor.encode(images, instructions)
        else:
            with torch.no_grad():
                token = self.proprio.token(self.normalized_state(observations))
            prefix = self.editor.encode_with(images, instructions, token)
        return prefix.to(self.device, self.expert.dtype)

    def normalized_state(self, observations: Sequence[Observation]) -> torch.Tensor:
        """float32 (B, S)."""
        names = self.parts.config.state_names
        for o in observations:
            if o.state.shape != (len(names),):
                raise DatasetError(
                    f"state has shape {o.state.shape}, the policy needs ({len(names)},): {', '.join(names)}"
                )
        states = np.stack([o.state for o in observations])
        return torch.from_numpy(self.parts.state_normalizer.normalize(states)).to(self.device)

    def initial_noise(self, count: int) -> torch.Tensor:
        """(count, T, A) in the expert's precision; the same at every replan."""
        config = self.parts.config
        noise = initial_noise(count, config.horizon, len(config.action_names), config.noise_seed)
        return noise.to(self.device, self.expert.dtype)


def load_policy_editor(
    reference: EditorReference, *, hardware: Hardware = CPU, weights: Path | None = None, bundle: Path | None = None
) -> Editor:
    """The editor of a policy, checked against the fingerprint that it was trained with.

    bundle: the policy's folder, where it holds parts of the editor itself.

    Raises:
        RunError: other weights or settings; both values are given.
    """
    tuned = bundle / TUNED if bundle is not None and reference.tuned else None
    editor = load_editor(reference.name, reference.settings, weights=weights, hardware=hardware, tuned=tuned)
    found, expected = editor.fingerprint(), dict(reference.fingerprint)
    if fingerprint_digest(found) != fingerprint_digest(expected):
        different = next((k for k in {**expected, **found} if found.get(k) != expected.get(k)), "fingerprint")
        raise RunError(
            f"the editor {reference.name!r} is not the one that the policy was trained on: {different} is "
            f"{_short(found.get(different))}, the policy expects {_short(expected.get(different))}",
            "pass the right weights with --weights DIR, or train the policy again",
        )
    return editor


def _short(value: object) -> str:
    """The start of a checksum, anything else in full."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else str(value)
