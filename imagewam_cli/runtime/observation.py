"""Check observations once, before anything is computed, and convert them to what a policy takes.

Robots, simulators and camera drivers give pictures in many forms. A form with one meaning is converted; any other is an
error that names the camera, what came and what is wanted. `Policy` in torch and `OnnxPolicy` read the same way. What no
check can see: pictures in BGR instead of RGB, and depth stored as 8-bit grey.

| given | becomes |
|---|---|
| uint8 (H, W, 3) | itself |
| (3, H, W), (1, H, W, 3), a list, a torch tensor, a Pillow image | uint8 (H, W, 3) |
| grey: uint8 (H, W), (H, W, 1) or (1, H, W) | three equal channels |
| RGBA whose alpha is 255 everywhere | without alpha |
| floats from 0 to 1 | times 255, rounded |
| int32, int64 and their unsigned forms, from 0 to 255 | uint8 |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
"""Numbers in robot units: float32, or float64 where a dataset records or a robot gives float64.

They stay in that precision until they are normalized, because float32 has 0.5 m steps at 4.5 million meters.
"""

_WANTED = "uint8 (height, width, 3), RGB"
_CHANNELS = (1, 3, 4)
_MIN_SIDE = 8
"""Minimum height and width of a picture. Anything smaller is a failed read; and with larger sides, one axis at most can
be the channels."""
_OVERSHOOT = 1e-3
"""How far floats may lie outside 0 to 1, where computing left them."""
_CONVERTED_MODES = dict.fromkeys(("1", "CMYK", "YCbCr", "HSV"), "RGB") | dict.fromkeys(("P", "PA", "LA"), "RGBA")
"""Pillow's modes of 8 bits or fewer -> the mode that shows the same colors."""


class ObservationLike(Protocol):
    """An observation of the robot."""

    @property
    def images(self) -> Mapping[str, Any]:
        """Camera name -> picture, uint8 (H, W, 3) in RGB, or a form that is converted to it."""
        ...

    @property
    def state(self) -> Any:
        """Robot state (S,), in robot units."""
        ...

    @property
    def instruction(self) -> str:
        """Task for the robot, in plain English."""
        ...


@dataclass(frozen=True)
class Observation:
    """The input of a policy at one moment.

    images: camera name -> uint8 (H, W, 3), RGB; state: float32 or float64 (S,) in robot units; instruction: plain
    English.
    """

    images: Mapping[str, npt.NDArray[np.uint8]]
    state: FloatArray
    instruction: str


class ObservationError(ValueError):
    """An observation that a policy cannot use. message: what came and what is wanted; hint: what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class ObservationReader:
    """The observations that a policy takes: pictures of `cameras`, and a state with these dimensions.

    Other cameras are ignored. A policy without state dimensions ignores the state.
    """

    cameras: tuple[str, ...]
    state_names: tuple[str, ...]

    def read(self, observations: Iterable[ObservationLike]) -> list[Observation]:
        """Return the observations with their values checked and converted.

        Raises:
            ObservationError: an observation cannot be used.
        """
        if isinstance(observations, Mapping) or hasattr(observations, "state"):
            raise ObservationError("a single observation came, but a list of them is wanted", "pass [observation]")
        given = list(observations)
        found = []
        for number, observation in enumerate(given):
            try:
                found.append(self.read_one(observation))
            except ObservationError as error:
                if len(given) == 1:
                    raise
                raise ObservationError(f"observation {number}: {error.message}", error.hint) from None
        return found

    def read_one(self, observation: ObservationLike) -> Observation:
        """Return one observation with its values checked and converted. Errors are those of `read`."""
        wanted = ("images", "state", "instruction") if self.state_names else ("images", "instruction")
        missing = [name for name in wanted if not hasattr(observation, name)]
        if missing:
            kind = type(observation).__name__
            keys = f" with the keys {', '.join(map(str, observation))}" if isinstance(observation, Mapping) else ""
            raise ObservationError(
                f"an observation of type {kind}{keys} has no attribute {missing[0]!r}",
                "pass Observation(images=..., state=..., instruction=...)",
            )
        return Observation(
            images=self.read_images(observation.images),
            state=self.read_state(getattr(observation, "state", None)),
            instruction=read_instruction(observation.instruction),
        )

    def read_images(self, images: Mapping[str, Any]) -> dict[str, npt.NDArray[np.uint8]]:
        """Return the picture of each camera, uint8 (H, W, 3)."""
        if not isinstance(images, Mapping):
            raise ObservationError(
                f"images is {_type(images)}, but a mapping from camera to picture is wanted",
                f"pass images={{{self.cameras[0]!r}: picture}}" if self.cameras else None,
            )
        missing = [camera for camera in self.cameras if camera not in images]
        if missing:
            raise ObservationError(
                f"no picture of camera {missing[0]!r}; there are: {', '.join(map(str, images)) or 'none'}",
                f"the policy's cameras are named {', '.join(self.cameras)}; name the pictures like them",
            )
        return {camera: read_picture(images[camera], camera) for camera in self.cameras}

    def read_state(self, state: Any) -> FloatArray:
        """Return the state (S,), in float64 if it came in more than 32 bits, otherwise in float32."""
        names = self.state_names
        if not names:
            return np.zeros(0, dtype=np.float32)
        values = _array(state, "state", f"numbers ({len(names)},)")
        if values.shape != (len(names),):
            raise ObservationError(
                f"state has shape {values.shape}, but the policy needs ({len(names)},): {', '.join(names)}"
            )
        if values.dtype.kind not in "fiu":
            raise ObservationError(
                f"state has the type {values.dtype}, but the policy needs numbers: {', '.join(names)}",
                "convert it with np.asarray(state, dtype=np.float32)",
            )
        finite = np.isfinite(values)
        if not finite.all():
            wrong = ", ".join(f"{names[i]} is {values[i]}" for i in np.flatnonzero(~finite))
            raise ObservationError(
                f"the state is not finite: {wrong}", "do not act on this observation; check the robot's sensors"
            )
        short = values.dtype.kind == "f" and values.dtype.itemsize <= 4
        return np.ascontiguousarray(values, dtype=np.float32 if short else np.float64)


def read_instruction(instruction: object) -> str:
    """Return the instruction.

    Raises:
        ObservationError: it is empty or not a string.
    """
    if not isinstance(instruction, str):
        raise ObservationError(f"instruction is {_type(instruction)}, but a sentence is wanted")
    if not instruction.strip():
        raise ObservationError("instruction is empty, but a sentence is wanted", "say what the robot shall do")
    return instruction


def read_picture(picture: Any, camera: str) -> npt.NDArray[np.uint8]:
    """Return a picture as uint8 (H, W, 3). Raises: ObservationError, as `ObservationReader.read`."""
    pixels = _pillow(picture, camera) if hasattr(picture, "getbands") else _array(picture, _name(camera), _WANTED)
    given = f"{pixels.dtype} {pixels.shape}"
    while pixels.ndim > 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim > 3:
        raise _refused(camera, given, "pass the pictures of a batch in one observation each")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3:
        raise _refused(camera, given)
    if pixels.size == 0:
        raise _refused(camera, f"an empty picture, {given}", "the camera's read failed; do not act on it")
    if pixels.shape[2] not in _CHANNELS and pixels.shape[0] in _CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    height, width, channels = pixels.shape
    if channels not in _CHANNELS or min(height, width) < _MIN_SIDE:
        small = min(height, width) < _MIN_SIDE
        raise _refused(camera, given, f"a picture has at least {_MIN_SIDE} x {_MIN_SIDE} pixels" if small else None)
    values = pixels if pixels.dtype == np.uint8 else _bytes(pixels, camera, given)
    if channels == 4:
        alpha = values[:, :, 3]
        if alpha.min() < 255:
            raise _refused(
                camera,
                f"{given} with a fourth channel from {alpha.min()} to {alpha.max()}",
                "if that is alpha and the colors are right without it, pass the first three channels",
            )
        values = values[:, :, :3]
    if channels == 1:
        values = np.repeat(values, 3, axis=2)
    return np.ascontiguousarray(values)


def _bytes(pixels: Array, camera: str, given: str) -> npt.NDArray[np.uint8]:
    """Convert a picture (H, W, C) of another type to uint8."""
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind not in "fiu" or size < 2:
        raise _refused(camera, given)
    if pixels.shape[2] == 1 or (kind in "iu" and size == 2):
        raise _refused(camera, given, "one channel that is not uint8, or 16 bits, may be depth; convert it to uint8")
    low, high = float(pixels.min()), float(pixels.max())
    given = f"{given} from {low:g} to {high:g}"
    if kind in "iu":
        if low < 0 or high > 255:
            raise _refused(camera, given)
        return pixels.astype(np.uint8)
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # also refuses NaN
        hint = "floats must be from 0 to 1; if these are from 0 to 255, pass picture.round().astype(np.uint8)"
        raise _refused(camera, given, hint)
    if high == 1 and ((pixels == 0) | (pixels == 1)).all():
        raise _refused(
            camera, f"{given} without any value between", "0 to 1 and 0 to 255 are both possible; pass uint8"
        )
    return np.rint(pixels.clip(0, 1) * 255.0).astype(np.uint8)


def _pillow(picture: Any, camera: str) -> Array:
    """Return the pixels of a Pillow image, uint8 (H, W) or (H, W, 3 or 4)."""
    if picture.mode in _CONVERTED_MODES:
        picture = picture.convert(_CONVERTED_MODES[picture.mode])
    if picture.mode not in ("L", "RGB", "RGBA"):  # I;16, I and F: more than 8 bits, which Pillow would cut off
        raise _refused(
            camera, f"a picture of mode {picture.mode}", "more than 8 bits of one channel may be depth; convert it"
        )
    return np.asarray(picture)


def _array(value: Any, name: str, wanted: str) -> Array:
    """Return an array, a list or a tensor as an array."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ObservationError(f"{name} has masked values; wanted {wanted}")
    if value is None or isinstance(value, str | bytes | Mapping):
        raise ObservationError(f"{name} is {_type(value)}; wanted {wanted}")
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, without importing torch
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value  # numpy has no such type
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ObservationError(f"{name} is {_type(value)} that numpy cannot read ({reason}); wanted {wanted}") from None


def _refused(camera: str, given: str, hint: str | None = None) -> ObservationError:
    return ObservationError(f"{_name(camera)}: got {given}; wanted {_WANTED}", hint)


def _name(camera: str) -> str:
    return f"camera {camera!r}"


def _type(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
