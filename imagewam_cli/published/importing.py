"""Import a published checkpoint as a policy folder: editor, expert, state token, normalizers, settings.

The import is strict: it writes nothing unless the checkpoint has exactly the expected tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagewam_cli.data.normalization import FieldStats, Normalizer
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.data.types import Observation
from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.editors.loading.folder import require_names
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import ConfigError, EditorError
from imagewam_cli.expert.checkpoint import save_expert
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.files import atomic_folder, file_sizes
from imagewam_cli.policy.bundle import (
    PROPRIO,
    TUNED,
    BundleParts,
    EditorReference,
    PolicyConfig,
    ProprioConfig,
    write_bundle,
)
from imagewam_cli.prefix.rounding import EXACT, ROUNDINGS, Rounding
from imagewam_cli.prefix.spec import ComputeDtype, KVSpec, RoundingName
from imagewam_cli.published.checkpoint import Checkpoint, read_checkpoint
from imagewam_cli.published.robots import PROMPT, Robot
from imagewam_cli.published.settings import TrainSettings
from imagewam_cli.published.statistics import read_statistics

SHIFT, NOISE_SEED = 5.0, 42
"""Settings of the published evaluation, in which every chunk starts from the same noise."""
_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An imported policy. sizes: sizes of the editor, such as "double blocks": 5; files: name -> size in bytes."""

    folder: Path
    rounding: RoundingName
    sizes: Mapping[str, int]
    files: Mapping[str, int]


def import_policy(
    checkpoint: Path,
    statistics: Path,
    out: Path,
    *,
    editor: str,
    robot: Robot,
    train: TrainSettings,
    rounding: RoundingName | None = None,
    weights: Path | None = None,
    hardware: Hardware = CPU,
) -> Imported:
    """Import a checkpoint into the policy folder `out`.

    rounding: None for the one that computes in the checkpoint's dtype, or exact if there is none.
    weights: a diffusers folder of the editor, used for its VAE, text encoder and sizes; the denoiser comes from the
        checkpoint.

    Raises:
        RunError: the file is not a checkpoint.
        EditorError: the checkpoint's tensors do not fit the editor.
        DatasetError: the statistics are missing or damaged.
        ConfigError: the statistics or the robot have different dimensions from the checkpoint.
        UsageError: `out` is not empty, or the editor has no published checkpoints.
    """
    kind = installed_editor(editor)
    found = read_checkpoint(checkpoint)
    state, action = read_statistics(statistics)
    _require_dimensions(found, state, action, robot)
    rounding = rounding or _rounding_of(found).name
    options = _prefix_options(robot, rounding, found)
    with atomic_folder(out) as folder:
        editor_sizes = kind.write_released(found.editor, folder / TUNED, weights=weights)
        loaded = kind.load(options, instructions=(), weights=weights, hardware=hardware, tuned=folder / TUNED)
        config = _policy_config(robot, train, found, editor_sizes)
        expert = expert_config(found.expert, loaded.spec, config.horizon, rounding)
        save_expert(folder, expert, dict(found.expert))
        if found.proprio is not None:
            _save(folder / PROPRIO, found.proprio)
        reference = EditorReference(
            name=editor,
            settings=loaded.settings,
            spec=loaded.spec,
            fingerprint=loaded.fingerprint(),
            tuned=True,
        )
        normalizers = (Normalizer(mode=robot.normalization, stats=stats, rule="absolute") for stats in (state, action))
        parts = BundleParts(
            config=config,
            editor=reference,
            state_normalizer=next(normalizers),
            action_normalizer=next(normalizers),
            action_transforms=robot.action_transforms,
        )
        write_bundle(folder, parts)
        (folder / SAMPLES).write_bytes(random_samples(robot, state).to_bytes())
        written = file_sizes(folder)
    return Imported(folder=out, rounding=rounding, sizes=editor_sizes, files=written)


def expert_config(weights: Mapping[str, Tensor], spec: KVSpec, horizon: int, rounding: RoundingName) -> ExpertConfig:
    """Return the config of a published expert, from its weights and the editor's layers.

    Raises:
        EditorError: a weight is missing, is unknown or has a different shape.
    """
    try:
        hidden, action_dim = weights["action_encoder.weight"].shape
        inner = weights["double_blocks.0.img_mlp.2.weight"].shape[1]
    except KeyError as error:
        raise EditorError(
            f"the checkpoint's expert lacks {error}", "choose the editor that it was trained on with --editor"
        ) from None
    config = ExpertConfig(
        layers=spec.layers,
        rope=spec.rope,
        action_dim=action_dim,
        state_dim=0,
        horizon=horizon,
        hidden=hidden,
        mlp_ratio=inner / hidden,
        rounding=rounding,
    )
    with torch.device("meta"):
        expected = ActionExpert(config).state_dict()
    require_names(weights, expected, "the checkpoint's expert does not fit the editor's layers")
    return config


def random_samples(robot: Robot, state: FieldStats) -> Samples:
    """Return random observations for the self-check of an export, because a checkpoint contains no pictures."""
    rng = np.random.default_rng(0)
    height, width = robot.image_size
    return Samples(
        observations=tuple(
            Observation(
                images={camera: rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for camera in robot.cameras},
                state=rng.uniform(state.min, state.max).astype(np.float32),
                instruction="put the red block on the blue zone",
            )
            for _ in range(_SAMPLES)
        )
    )


def _require_dimensions(found: Checkpoint, state: FieldStats, action: FieldStats, robot: Robot) -> None:
    encoder = found.expert.get("action_encoder.weight")
    if encoder is None:
        return  # `expert_config` reports everything that is missing
    state_dim = state.dim if found.proprio is None else found.proprio["weight"].shape[1]
    for what, learned, gathered, named in (
        ("action", encoder.shape[1], action.dim, len(robot.action_names)),
        ("state", state_dim, state.dim, len(robot.state_names)),
    ):
        if learned != gathered:
            raise ConfigError(
                f"the statistics have {gathered} {what} dimensions, but the checkpoint has {learned}",
                "pass the dataset_stats.json that was published with the checkpoint",
            )
        if learned != named:
            raise ConfigError(
                f"the robot has {named} {what} dimensions, but the checkpoint has {learned}",
                "choose a different --robot",
            )


def _trained_in(found: Checkpoint) -> ComputeDtype:
    return "bfloat16" if found.bfloat16 else "float32"


def _rounding_of(found: Checkpoint) -> Rounding:
    """Return the rounding that the checkpoint was trained with, which computes everything in the checkpoint's dtype."""
    return next((r for r in ROUNDINGS.values() if r.compute_dtype == _trained_in(found)), EXACT)


def _prefix_options(robot: Robot, rounding: RoundingName, found: Checkpoint) -> PrefixOptions:
    return PrefixOptions(
        mode="prefix",
        timestep=0.0,
        text_padding="trim",
        image_size=robot.image_size,
        camera_layout=robot.camera_layout,
        compute_dtype=ROUNDINGS[rounding].compute_dtype or _trained_in(found),
        rounding=rounding,
        prompt_template=PROMPT,
        cameras=robot.cameras,
    )


def _policy_config(
    robot: Robot, train: TrainSettings, found: Checkpoint, editor_sizes: Mapping[str, int]
) -> PolicyConfig:
    horizon = train.horizon or robot.horizon
    return PolicyConfig(
        horizon=horizon,
        execute=min(robot.execute, horizon),
        inference_steps=train.inference_steps,
        shift=SHIFT,
        noise_seed=NOISE_SEED,
        fps=robot.fps,
        cameras=robot.cameras,
        state_names=robot.state_names,
        action_names=robot.action_names,
        proprio=None if found.proprio is None else _proprio_config(found.proprio, train, editor_sizes),
    )


def _proprio_config(
    proprio: Mapping[str, Tensor], train: TrainSettings, editor_sizes: Mapping[str, int]
) -> ProprioConfig:
    width, state_dim = proprio["weight"].shape
    text = editor_sizes.get("text channels", width)
    if width != text:
        raise EditorError(f"the proprio encoder gives {width} channels, but the editor's text has {text}")
    return ProprioConfig(
        state_dim=state_dim, text_width=width, placement=train.placement, text_tokens=train.text_tokens
    )


def _save(path: Path, weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, path)
