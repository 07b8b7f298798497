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
from imagewam_cli.editor import Editor, PrefixKV
from imagewam_cli.errors import DatasetError, RunError
from imagewam_cli.expert.checkpoint import load_expert
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert
from imagewam_cli.expert.sampler import initial_noise, integrate
from imagewam_cli.hardware import CPU, Hardware
from imagewam_cli.kvcache.manifest import fingerprint_digest
from imagewam_cli.placement import require_device
from imagewam_cli.policy.acting import ChunkPolicy
from imagewam_cli.policy.bundle import BundleParts, EditorReference, find_bundle, read_bundle
from imagewam_cli.registry import Registry


class Policy(ChunkPolicy):
    """Editor, expert and normalisers, ready to act."""

    def __init__(self, parts: BundleParts, expert: ActionExpert, editor: Editor, device: str = "cpu") -> None:
        self.parts, self.expert, self.editor, self.device = parts, expert, editor, device
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
        return cls(parts, expert, load_editor(parts.editor, hardware=hardware, weights=weights), hardware.device)

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
        return self.parts.action_normalizer.denormalize(chunk.cpu().numpy())

    def prefix(self, observations: Sequence[Observation]) -> PrefixKV:
        """What the editor leaves of these pictures and instructions, float32."""
        prefix = self.editor.encode([o.images for o in observations], [o.instruction for o in observations])
        return prefix.to(self.device, torch.float32)

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
        """float32 (count, T, A); the same at every replan."""
        config = self.parts.config
        return initial_noise(count, config.horizon, len(config.action_names), config.noise_seed).to(self.device)


def load_editor(reference: EditorReference, *, hardware: Hardware = CPU, weights: Path | None = None) -> Editor:
    """The editor of a policy, checked against the fingerprint that it was trained with.

    Raises:
        RunError: other weights or settings; both values are given.
    """
    catalog = Registry.installed().editors
    kind = catalog.load(reference.name)
    editor: Editor = kind.load(
        catalog.get(reference.name), reference.settings, instructions=(), weights=weights, hardware=hardware
    )
    found, expected = editor.fingerprint(), dict(reference.fingerprint)
    if fingerprint_digest(found) != fingerprint_digest(expected):
        different = next((k for k in expected if found.get(k) != expected[k]), "fingerprint")
        raise RunError(
            f"the editor {reference.name!r} is not the one that the policy was trained on: {different} is "
            f"{_short(found.get(different))}, the policy expects {_short(expected.get(different))}",
            "pass the right weights with --weights DIR, or train the policy again",
        )
    return editor


def _short(value: object) -> str:
    """The start of a checksum, anything else in full."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else str(value)
