"""Create a small untrained policy on the small editor and its ONNX export, each once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from imagewam_cli.data.normalization import FieldStats, Normalizer
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.data.types import KeyMap, Observation
from imagewam_cli.editors.contract import Editor
from imagewam_cli.expert.checkpoint import save_expert
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.export import ExportReport
from imagewam_cli.policy.bundle import BundleParts, EditorReference, PolicyConfig, write_bundle
from imagewam_cli.sim.tabletop.render import render
from imagewam_cli.sim.tabletop.scene import sample_scene
from imagewam_cli.sim.tabletop.world import World

STATE_NAMES, ACTION_NAMES = ("gripper_x", "gripper_y", "opening"), ("dx", "dy", "grip")
"""Those of the tabletop."""
EXECUTE, HORIZON, INFERENCE_STEPS = 3, 6, 4
"""Settings of the run that `tests/policy` trains: actions executed per chunk, actions per chunk, and flow steps."""


def observation(seed: int, instruction: str | None = None) -> Observation:
    """Return an observation of a tabletop scene."""
    world = World.start(sample_scene(seed))
    return Observation(
        images={"top": render(world)},
        state=world.state,
        instruction=world.scene.instruction if instruction is None else instruction,
    )


def random_expert(config: ExpertConfig, seed: int = 0) -> ActionExpert:
    """Create an expert without zero weights, so that every path through it affects the result."""
    expert = ActionExpert(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in expert.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return expert


def write_policy(folder: Path, editor: Editor, *, steps: int = 2, samples: int = 3) -> Path:
    """Write a complete policy folder for `editor`, with chunks of 5 actions in `steps` Euler steps."""
    spec = editor.spec
    config = ExpertConfig(
        layers=spec.layers,
        rope=spec.rope,
        places=any(layer.holds_pictures for layer in spec.layers),
        action_dim=3,
        state_dim=3,
        horizon=5,
        hidden=32,
    )
    save_expert(folder, config, random_expert(config).state_dict())
    write_bundle(
        folder,
        BundleParts(
            config=PolicyConfig(
                horizon=5,
                execute=2,
                inference_steps=steps,
                shift=5.0,
                noise_seed=7,
                fps=10.0,
                cameras=spec.cameras,
                state_names=STATE_NAMES,
                action_names=ACTION_NAMES,
                keys=KeyMap(cameras=spec.cameras),
            ),
            editor=EditorReference(
                name=editor.entry.name, settings=editor.settings, spec=spec, fingerprint=editor.fingerprint()
            ),
            state_normalizer=_normalizer((0.0, 0.1, 0.0), (1.0, 0.9, 1.0)),
            action_normalizer=_normalizer((-1.0, -0.5, -1.0), (1.0, 2.0, 1.0)),
        ),
    )
    rows = Samples(observations=tuple(observation(seed) for seed in range(samples)))
    (folder / SAMPLES).write_bytes(rows.to_bytes())
    return folder


def small_policy(tmp_path_factory: Any, load_tiny: Any) -> Path:
    """Write a policy for the small editor, once per session."""
    if "policy" not in _made:
        _made["policy"] = write_policy(tmp_path_factory.mktemp("policies") / "small", load_tiny())
    return cast(Path, _made["policy"])


def exported(tmp_path_factory: Any, policy: Path, weights: Path) -> ExportReport:
    """Export `small_policy` to ONNX, once per session."""
    from imagewam_cli.export.onnx import OnnxExporter

    if "report" not in _made:
        out = tmp_path_factory.mktemp("exports") / "onnx"
        _made["report"] = OnnxExporter().export(policy, out, weights=weights)
    return cast(ExportReport, _made["report"])


_made: dict[str, object] = {}


def _normalizer(low: tuple[float, ...], high: tuple[float, ...]) -> Normalizer:
    middle = tuple(np.mean([low, high], axis=0).tolist())
    stats = FieldStats(min=low, max=high, mean=middle, std=(0.3,) * len(low), q01=low, q99=high)
    return Normalizer(mode="min_max", stats=stats)
