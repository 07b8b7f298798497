"""What an editor runs on: a choice that changes how fast and with how much memory, not which prefix it gives.

So it is recorded nowhere. What changes the numbers (`compute_dtype`, `quantization`) is a `PrefixSettings`. Imports no
torch; `placement` carries it out.
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
    """Where the models of an editor live and how they run."""

    device: str = "cpu"
    """cpu, cuda, cuda:1, mps."""
    offload: Offload = "none"
    """Where the weights of denoiser and text encoders wait. none: on the device. group: in main memory, and each of the
    denoiser's blocks comes to the device for its turn. sequential: the same layer by layer, with the least memory on
    the device. disk: in files, each layer read for its turn, on a machine without enough main memory."""
    compile: bool = False
    """Compile the denoiser's repeated blocks. Slow at the first rows; K and V agree to rounding."""

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"unknown device {self.device!r}", "use cpu, cuda, cuda:1 (and so on) or mps")
        if self.offload == "disk" and self.device != "cpu":
            raise UsageError("offload 'disk' works on the CPU alone", "use --offload sequential, or --device cpu")
        if self.offload != "none" and self.device == "mps":
            raise UsageError(
                "mps shares its memory with the CPU: there is nowhere to offload to", "leave --offload out"
            )
        if self.offload != "none" and self.compile:
            raise UsageError("blocks whose weights come and go are not compiled", "leave out --compile or --offload")


CPU = Hardware()


def lack(error: BaseException | None) -> BaseException | None:
    """A full disk or memory, where that is what `error` is or came from; libraries put errors of their own in front.

    A full disk is an OSError with ENOSPC; a full memory is what `is_out_of_memory` says.
    """
    while error is not None:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return error
        if f"(os error {errno.ENOSPC})" in str(error):  # safetensors' only sign of it
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device (torch.OutOfMemoryError; on mps a plain RuntimeError) or of the machine."""
    said = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return said or type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
