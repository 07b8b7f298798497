"""Run an exported policy with numpy, Pillow, onnxruntime and tokenizers, without torch and imagewam.

Every ONNX export contains `policy.py`, one file made of this module and the others of its package
(`imagewam_cli.export.runtime_script`). It reads everything that is not in the graphs from `onnx.json`.

    policy = OnnxPolicy.load("exports/my-policy")
    policy.reset()
    action = policy.act(observation)  # observation: .images[camera], .state, .instruction

    python policy.py --image picture.png --state 0.5,0.5,1 --instruction "put the red block on the blue zone"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imagewam_cli.runtime.actions import ActionQueue, Actions, Session, require_finite
from imagewam_cli.runtime.export_folder import DESCRIPTION as DESCRIPTION
from imagewam_cli.runtime.export_folder import ExportFolder, ExportFolderError
from imagewam_cli.runtime.observation import Array, Observation, ObservationLike, ObservationReader
from imagewam_cli.runtime.observation import ObservationError as ObservationError

if TYPE_CHECKING:
    import onnxruntime

CPU = ("CPUExecutionProvider",)

Float32Array = npt.NDArray[np.float32]

Prefix = Mapping[str, Array]
"""Arrays `layer.{i}.k` and `layer.{i}.v`, float32 (B, P, H, D), and `valid`, bool (B, P), if a layer holds text."""


Encode = Callable[[Sequence[ObservationLike]], Prefix]
"""Encoder of observations into a prefix."""

Provider = str | tuple[str, Mapping[str, Any]]
"""An execution provider of onnxruntime: its name, or its name and options."""

PREFIX_ROLES = ("prefix", "prefix_weights", "tokenizer")
"""Roles of the files that only the prefix graph needs."""


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
        folder: Path | str | ExportFolder,
        *,
        encode: Encode | None = None,
        providers: Sequence[Provider] = CPU,
    ) -> OnnxPolicy:
        """Load the policy exported into `folder`.

        encode: encoder of the prefix, used instead of `prefix.onnx`; required if the export has no such file.
        providers: execution providers of onnxruntime: names, or pairs of a name and options.

        Raises:
            ExportFolderError: a file is missing or is not the one that was exported, the export has a different version
                or needs a newer onnxruntime, an execution provider is unknown, or the export has no prefix graph and
                `encode` is None.
            ModuleNotFoundError: onnxruntime, tokenizers or Pillow is not installed.
        """
        import onnxruntime

        if not isinstance(folder, ExportFolder):
            folder = ExportFolder.open(folder)
            for note in folder.notes:
                warnings.warn(note, stacklevel=2)
        description = folder.description
        folder.require_onnxruntime(onnxruntime.__version__)
        if encode is None and description["prefix"] is None:
            editor = description["editor"]["name"]
            raise ExportFolderError(f"{folder.path} has no prefix graph: the editor {editor!r} must run in torch")
        folder.verify(optional=("step",) if encode is None else ("step", *PREFIX_ROLES))
        if encode is None:
            tokenizer = folder.file("tokenizer").read_text(encoding="utf-8")
            encode = PrefixGraph(description["prefix"], tokenizer, session(folder.file("prefix"), providers))
        noise = np.load(folder.file("noise"), allow_pickle=False)
        return cls(description, session(folder.file("loop"), providers), noise, encode)

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


def session(path: Path, providers: Sequence[Provider] = CPU) -> onnxruntime.InferenceSession:
    """Open an onnxruntime session.

    Raises:
        ExportFolderError: the file is missing or damaged, or an execution provider is unknown.
    """
    import onnxruntime

    if not path.is_file():
        raise ExportFolderError(f"{path} is missing", "copy the whole export folder again")
    chosen = [providers] if isinstance(providers, str) else list(providers)
    available = onnxruntime.get_available_providers()
    for provider in chosen:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:  # onnxruntime would only warn, and use the CPU
            raise ExportFolderError(
                f"this onnxruntime has no execution provider {name!r}",
                f"it has {', '.join(available)}; others need another package, such as onnxruntime-gpu",
            )
    try:
        return onnxruntime.InferenceSession(str(path), providers=chosen)
    except _errors() as error:
        reason = str(error).partition("\n")[0]
        raise ExportFolderError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path}: {reason}",
            "install a newer onnxruntime, or copy the whole export folder again",
        ) from None


def run(graph: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph and return all outputs by name. Feeds that are not inputs of the graph are ignored."""
    wanted = {i.name for i in graph.get_inputs()}
    values = graph.run(None, {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip((o.name for o in graph.get_outputs()), values, strict=True))


def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of onnxruntime, which have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def _resized(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize a picture (H, W, 3) to `size` = (width, height), bilinear."""
    from PIL import Image

    picture = Image.fromarray(image)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR))
