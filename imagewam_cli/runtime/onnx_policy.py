"""Run an exported policy with numpy, Pillow, onnxruntime and tokenizers, without torch and imagewam.

Every ONNX export contains `policy.py`, one file made of this module and the others of its package
(`imagewam_cli.export.runtime_script`). It reads everything that is not in the graphs from `onnx.json`.

    policy = OnnxPolicy.load("exports/my-policy")
    policy.reset()
    action = policy.act(observation)  # observation: .images[camera], .state, .instruction

    python policy.py --image picture.png --state 0.5,0.5,1 --instruction "put the red block on the blue zone"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from imagewam_cli.runtime.actions import ActionQueue, Actions, Session, require_finite
from imagewam_cli.runtime.observation import (
    Array,
    Observation,
    ObservationError,
    ObservationLike,
    ObservationReader,
)

DESCRIPTION = "onnx.json"
VERSION = 1

Float32Array = npt.NDArray[np.float32]

Prefix = Mapping[str, Array]
"""Arrays `layer.{i}.k` and `layer.{i}.v`, float32 (B, P, H, D), and `valid`, bool (B, P), if a layer holds text."""


Encode = Callable[[Sequence[ObservationLike]], Prefix]
"""Encoder of observations into a prefix."""


class OnnxPolicy:
    """Plan action chunks from observations. execute: number of actions to execute before planning again."""

    def __init__(
        self, description: Mapping[str, Any], loop: onnxruntime.InferenceSession, noise: Float32Array, encode: Encode
    ) -> None:
        """description: content of `onnx.json`; loop: session of `loop.onnx`; noise: float32 (T, A)."""
        self.description, self._loop, self._noise, self._encode = description, loop, noise, encode
        self.execute = int(description["execute"])
        self._reader = ObservationReader(tuple(description["cameras"]), tuple(description["state"]["names"]))
        self._queue = ActionQueue(per_thread=True)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        encode: Encode | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> OnnxPolicy:
        """Load the policy exported into `folder`.

        encode: encoder of the prefix, used instead of `prefix.onnx`; required if the export has no such file.
        providers: execution providers of onnxruntime.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the export has a different version, or it has no prefix graph and `encode` is None.
        """
        folder = Path(folder)
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version = description.get("version")
        if version != VERSION:
            raise ValueError(f"{folder / DESCRIPTION} has version {version!r}; this reads version {VERSION}")
        files = description["files"]
        if encode is None:
            if description["prefix"] is None:
                editor = description["editor"]["name"]
                raise ValueError(f"{folder} has no prefix graph: the editor {editor!r} must run in torch")
            tokenizer = (folder / files["tokenizer"]).read_text(encoding="utf-8")
            encode = PrefixGraph(description["prefix"], tokenizer, session(folder / files["prefix"], providers))
        noise = np.load(folder / files["noise"], allow_pickle=False)
        return cls(description, session(folder / files["loop"], providers), noise, encode)

    def chunks(self, observations: Sequence[ObservationLike]) -> Array:
        """Plan chunks (B, T, A) in robot units for B independent scenes, in float32, or float64 where that is needed.

        Raises:
            ObservationError: an observation cannot be used; the message names the camera or the state's dimension.
            PlanError: the planned actions are not finite.
        """
        observations, action = self.read(observations), self.description["action"]
        if not observations:
            return np.empty((0, *self._noise.shape), dtype=np.float32)
        normalized = self.normalized_chunks(self.prefix(observations), self.normalized_state(observations))
        actions = (normalized - np.array(action["offset"])) / np.array(action["scale"])
        for i, constant in enumerate(action.get("constant", ())):  # a constant dimension ignores the model
            if constant is not None:
                actions[..., i] = constant
        return require_finite(np.asarray(actions, dtype=action.get("dtype", "float32")), action["names"])

    def read(self, observations: Sequence[ObservationLike]) -> list[Observation]:
        """Return the observations, checked and converted. Errors are those of `chunks`."""
        return self._reader.read(observations)

    def prefix(self, observations: Sequence[ObservationLike]) -> Prefix:
        """Encode the observations' pictures and instructions into keys and values."""
        return self._encode(observations)

    def normalized_state(self, observations: Sequence[ObservationLike]) -> Float32Array:
        """Return the normalized states, float32 (B, S)."""
        settings = self.description["state"]
        states = np.stack([self._reader.read_state(o.state) for o in observations]).astype(np.float64)
        states = states * np.array(settings["scale"]) + np.array(settings["offset"])
        clamp = settings["clamp"]
        return np.asarray(states if clamp is None else np.clip(states, -clamp, clamp), dtype=np.float32)

    def normalized_chunks(self, prefix: Prefix, state: Float32Array) -> Float32Array:
        """Run `loop.onnx` from the policy's noise; return normalized actions, float32 (B, T, A)."""
        noise = np.repeat(self._noise[None], len(state), axis=0)
        feeds = {**prefix, "state": state, "noise": noise}
        actions: Float32Array = run(self._loop, feeds)["actions"]
        return actions

    def act(self, observation: ObservationLike) -> Actions:
        """Return the next action (A,). Plan a new chunk when no planned action is left or the instruction changed.

        Use one `session` per robot if several robots share the policy: their plans must not be mixed. The policy's own
        plan is continued only in the thread that made it.
        """
        return self._queue.next(observation, self)

    def reset(self) -> None:
        """Discard the planned actions. Call this at the start of every episode."""
        self._queue.clear()

    def session(self) -> Session:
        """Return an independent robot for this policy: its `act` and `reset` have planned actions of their own."""
        return Session(self)


class PrefixGraph:
    """Encode observations with `prefix.onnx`, without the editor's code."""

    def __init__(self, settings: Mapping[str, Any], tokenizer: str, graph: onnxruntime.InferenceSession) -> None:
        """settings: `prefix` in `onnx.json`; tokenizer: text of `tokenizer.json`; graph: session of `prefix.onnx`."""
        from tokenizers import Tokenizer

        self._settings, self._graph = settings, graph
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(settings["max_tokens"])

    def __call__(self, observations: Sequence[ObservationLike]) -> Prefix:
        ids, valid = self.tokens([o.instruction for o in observations])
        image = np.stack([self.picture(o.images) for o in observations])
        return run(self._graph, {"image": image, "token_ids": ids, "token_valid": valid})

    def picture(self, images: Mapping[str, npt.NDArray[np.uint8]]) -> Float32Array:
        """Return the cameras' pictures side by side, float32 (3, H, W) in [-1, 1]."""
        cameras, height, width = self._settings["cameras"], self._settings["height"], self._settings["width"]
        tile = (width // len(cameras), height)
        picture = np.concatenate([_resized(images[c], tile) for c in cameras], axis=1)
        if self._settings["grey"] is not None:
            picture = np.full_like(picture, self._settings["grey"])
        scaled = picture.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))

    def tokens(self, instructions: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return token ids (B, L), padded at the end, and a mask (B, L) that is False at padding."""
        before, after = self._settings["before"], self._settings["after"]
        rows = [self._tokenizer.encode(before + instruction + after).ids for instruction in instructions]
        length = self._settings["pad_to"] or max(len(row) for row in rows)
        ids = np.full((len(rows), length), self._settings["pad_id"], dtype=np.int64)
        valid = np.zeros((len(rows), length), dtype=np.bool_)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            valid[i, : len(row)] = True
        return ids, valid


def session(path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> onnxruntime.InferenceSession:
    """Open an onnxruntime session.

    Raises:
        FileNotFoundError: the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return onnxruntime.InferenceSession(str(path), providers=list(providers))


def run(graph: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph and return all outputs by name. Feeds that are not inputs of the graph are ignored."""
    wanted = {i.name for i in graph.get_inputs()}
    values = graph.run(None, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip((o.name for o in graph.get_outputs()), values, strict=True))


def _resized(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize a picture (H, W, 3) to `size` = (width, height), bilinear."""
    picture = Image.fromarray(image)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Print the action chunk that an exported policy plans, as JSON.")
    parser.add_argument(
        "--image",
        action="append",
        required=True,
        metavar="[CAMERA=]FILE",
        help="picture file; repeat for each camera, in order",
    )
    parser.add_argument("--state", default="", help="--state=X,Y,...: numbers in robot units")
    parser.add_argument("--instruction", required=True)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(__file__).parent,
        help="folder of the export; default: the folder of this file",
    )
    return parser


def _pictures(values: Sequence[str], cameras: Sequence[str]) -> dict[str, npt.NDArray[np.uint8]]:
    """Read the pictures by camera. Values without a camera name belong to the cameras in order."""
    if len(values) != len(cameras):
        raise ObservationError(f"{len(values)} picture(s) for {len(cameras)} camera(s): {', '.join(cameras)}")
    images = {}
    for camera, value in zip(cameras, values, strict=True):
        name, separator, file = value.partition("=")
        named = bool(separator) and name in cameras
        with Image.open(file if named else value) as picture:
            images[name if named else camera] = np.asarray(picture.convert("RGB"))
    return images


def main() -> None:
    """Run the command line."""
    parser = _arguments()
    arguments = parser.parse_args()
    try:
        policy = OnnxPolicy.load(arguments.folder)
        observation = Observation(
            images=_pictures(arguments.image, policy.description["cameras"]),
            state=np.array([float(x) for x in arguments.state.split(",") if x], dtype=np.float64),
            instruction=arguments.instruction,
        )
        chunk = policy.chunks([observation])[0]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = policy.description["action"]["names"]
    print(json.dumps({"action_names": names, "fps": policy.description["fps"], "actions": chunk.tolist()}))


if __name__ == "__main__":
    main()
