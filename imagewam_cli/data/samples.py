"""Sample observations, stored with a cache and a policy, against which exports and reloaded editors are checked.

Tensors of the file:
    image.<camera>   uint8 (N, H, W, 3)
    state            (N, S), robot units, float32 or float64 as recorded
Metadata: "instructions", a JSON list of N texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagewam_cli.data.types import Observation, Row
from imagewam_cli.errors import DatasetError

SAMPLES = "samples.safetensors"
_IMAGE = "image."


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N observations with the same cameras, image sizes and state dimensions."""

    observations: tuple[Observation, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> Samples:
        """Return the observations of these rows."""
        return cls(observations=tuple(row.observation() for row in rows))

    def to_bytes(self) -> bytes:
        """Return the content of the file that `load` reads."""
        from safetensors.numpy import save

        cameras = self.observations[0].images
        tensors = {_IMAGE + c: np.stack([o.images[c] for o in self.observations]) for c in cameras}
        tensors["state"] = np.stack([o.state for o in self.observations])
        data: bytes = save(tensors, {"instructions": json.dumps([o.instruction for o in self.observations])})
        return data

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read the file.

        Raises:
            DatasetError: the file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                instructions = json.loads((file.metadata() or {})["instructions"])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise DatasetError(f"{path} is missing or damaged: {error}", "train the policy again") from None
        cameras = {name.removeprefix(_IMAGE): images for name, images in tensors.items() if name.startswith(_IMAGE)}
        return cls(
            observations=tuple(
                Observation(
                    images={c: images[i] for c, images in cameras.items()}, state=tensors["state"][i], instruction=text
                )
                for i, text in enumerate(instructions)
            )
        )
