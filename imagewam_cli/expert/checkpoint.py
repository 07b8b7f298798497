"""Save and load an expert: `expert.json` (its config) and `expert.safetensors` (its weights), loaded strictly."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.errors import ConfigError, RunError
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.files import write_atomically

CONFIG = "expert.json"
WEIGHTS = "expert.safetensors"


def save_expert(folder: Path, config: ExpertConfig, weights: dict[str, torch.Tensor]) -> None:
    """Write both files atomically."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save({k: v.detach().cpu().contiguous() for k, v in weights.items()}))
    write_atomically(folder / CONFIG, dump_json(to_dict(config)).encode())


def load_expert(folder: Path, device: str = "cpu") -> ActionExpert:
    """Load the expert of a policy folder, in evaluation mode.

    Raises:
        RunError: a file is missing or damaged, or the weights do not fit the config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise RunError(f"{folder} holds no expert: {name} is missing", "train the policy again")
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        expert = ActionExpert(from_dict(ExpertConfig, values, source=str(folder / CONFIG)))
        expert.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, json.JSONDecodeError, ConfigError, SafetensorError) as error:
        raise RunError(f"{folder / WEIGHTS} does not fit {CONFIG}: {str(error).splitlines()[-1].strip()}") from None
    return expert.eval().requires_grad_(False).to(device)
