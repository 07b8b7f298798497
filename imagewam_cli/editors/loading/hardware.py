"""The hardware that an editor runs on. It affects speed and memory but not the prefix, so it is not recorded.

Choices that change the numbers (`compute_dtype`, `quantization`) are in `PrefixOptions`. Imports no torch; `placement`
applies the choice.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import Literal

from imagewam_cli.errors import UsageError

Offload = Literal["none", "group", "sequential", "disk"]
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Device, offloading and compilation of an editor's models."""

    device: str = "cpu"
    """cpu, cuda, cuda:1, mps."""
    offload: Offload = "none"
    """Location of idle weights of denoiser and text encoders. none: on the device. group: in main memory; each block
    of the denoiser moves to the device when it runs. sequential: the same layer by layer, with the least memory on the
    device. disk: in files; each layer is read when it runs, for machines without enough main memory."""
    compile: bool = False
    """Whether to compile the denoiser's repeated blocks. The first rows are slow; K and V are equal up to rounding."""

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"unknown device {self.device!r}", "use cpu, cuda, cuda:1 (and so on) or mps")
        if self.offload == "disk" and self.device != "cpu":
            raise UsageError(
                f"--offload disk cannot be combined with --device {self.device}",
                "use --offload sequential, or --device cpu",
            )
        if self.offload != "none" and self.device == "mps":
            raise UsageError(
                f"--offload {self.offload} cannot be combined with --device mps, which shares its memory with the CPU",
                "omit --offload",
            )
        if self.offload != "none" and self.compile:
            raise UsageError(
                f"--compile cannot be combined with --offload {self.offload}: offloaded blocks cannot be compiled",
                "omit --compile or --offload",
            )


CPU = Hardware()


def find_resource_error(error: BaseException | None) -> BaseException | None:
    """Return the error of a full disk or memory in the chain of causes of `error`; None if there is none.

    Libraries wrap these errors in their own. A full disk is an OSError with ENOSPC; for memory see `is_out_of_memory`.
    """
    while error is not None:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return error
        if f"(os error {errno.ENOSPC})" in str(error):  # safetensors reports it only in its text
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the device or the machine ran out of memory.

    The device raises torch.OutOfMemoryError, but mps raises a plain RuntimeError.
    """
    message = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return message or type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
