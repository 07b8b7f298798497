"""The command line of an export's `policy.py`: plan one chunk and print it as JSON.

Exit code 2 means wrong arguments, 1 an export that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from imagewam_cli.runtime.actions import PlanError
from imagewam_cli.runtime.export_folder import ExportFolderError
from imagewam_cli.runtime.observation import Observation, ObservationError
from imagewam_cli.runtime.onnx_policy import OnnxPolicy


def main() -> None:
    """Run the command line."""
    arguments = _parser().parse_args()
    warnings.showwarning = lambda message, *_details, **_more: print(f"warning: {message}", file=sys.stderr)
    try:
        policy = OnnxPolicy.load(arguments.folder)
        observation = Observation(
            images=_pictures(arguments.image, policy.description["cameras"]),
            state=np.array(_state(arguments.state)),
            instruction=arguments.instruction,
        )
        chunk = policy.chunks([observation])[0]
    except ObservationError as error:
        _fail(error.message, error.hint, 2)
    except ExportFolderError as error:
        _fail(error.message, error.hint, 1)
    except PlanError as error:
        _fail(str(error), "check the state and the pictures", 1)
    except ModuleNotFoundError as error:
        _fail(f"the package {error.name} is missing", f"pip install {error.name}", 1)
    description = policy.description
    result = {"action_names": description["action"]["names"], "fps": description["fps"], "actions": chunk.tolist()}
    print(json.dumps(result, allow_nan=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Print the action chunk that an exported policy plans, as JSON.")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="[CAMERA=]FILE",
        help="picture file; repeat for each camera, in order",
    )
    parser.add_argument("--state", default="", help="--state=X,Y,...: numbers in robot units")
    parser.add_argument("--instruction", required=True)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder of the export; default: the folder of this file",
    )
    return parser


def _state(text: str) -> list[float]:
    """Parse comma-separated numbers. Raises: ObservationError: a part is no number."""
    numbers = []
    for part in text.split(",") if text.strip() else ():
        try:
            numbers.append(float(part))
        except ValueError:
            raise ObservationError(f"--state: {part!r} is not a number", "--state=X,Y,... in robot units") from None
    return numbers


def _pictures(values: Sequence[str], cameras: Sequence[str]) -> dict[str, Any]:
    """Open the pictures by camera. Values without a camera name belong to the remaining cameras in order.

    Raises:
        ObservationError: the number of pictures or a camera is wrong, or a file is no picture.
    """
    from PIL import Image

    if len(values) != len(cameras):
        raise ObservationError(f"{len(values)} picture(s) for {len(cameras)} camera(s): {', '.join(cameras)}")
    named, unnamed = {}, []
    for value in values:
        name, separator, file = value.partition("=")
        if not separator or name not in cameras:
            unnamed.append(value)
        elif name in named:
            raise ObservationError(f"camera {name!r} has two pictures", f"the cameras are {', '.join(cameras)}")
        else:
            named[name] = file
    files = named | dict(zip([camera for camera in cameras if camera not in named], unnamed, strict=True))
    images = {}
    for camera, file in files.items():
        try:
            with Image.open(file) as picture:
                picture.load()
                images[camera] = picture.copy()
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's errors for damaged files
            raise ObservationError(f"camera {camera!r}: {file} is no readable picture: {error}") from None
    return images


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
