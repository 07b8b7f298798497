"""Load the large models of an editor according to `Hardware`, with the offloading of diffusers and accelerate.

group and sequential are diffusers' group offloading, by blocks and by leaves; disk is accelerate's. Transfers do not
overlap with computation: diffusers would learn the order of the layers at the end of a first complete forward
pass, and a recorded forward pass ends early. Only the blocks that the model's class declares as repeated are compiled.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from imagewam_cli.editors.loading.folder import PipelinePart, load_part, randomize
from imagewam_cli.editors.loading.hardware import Hardware
from imagewam_cli.editors.loading.quantization import loading_options, require_quantization
from imagewam_cli.errors import UsageError

if TYPE_CHECKING:
    from diffusers import ModelMixin
from imagewam_cli.prefix.spec import Quantization


def require_device(hardware: Hardware) -> torch.device:
    """Return the device.

    Raises:
        UsageError: this machine does not have the device.
    """
    device = torch.device(hardware.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(
            f"device {hardware.device!r} does not exist: torch finds {found} CUDA devices", "use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' does not exist on this machine", "use --device cpu")
    return device


class Placement:
    """Loads denoiser and text encoders of one editor. Keep it while they are used: it owns the weights on disk."""

    def __init__(self, hardware: Hardware, *, quantization: Quantization, random_weights: bool) -> None:
        """Check the choices before anything is loaded.

        Raises:
            UsageError: this machine does not support a choice, or two choices exclude each other.
        """
        self.hardware, self.quantization, self.random_weights = hardware, quantization, random_weights
        self.device = require_device(hardware)
        require_quantization(quantization, self.device)
        on_disk = hardware.offload == "disk"
        if on_disk and (quantization != "none" or random_weights):
            other = f"--quantization {quantization}" if quantization != "none" else "--random-weights"
            raise UsageError(
                f"--offload disk cannot be combined with {other}: it uses the weights as they are in the files",
                f"omit --offload disk, or omit {other.partition(' ')[0]}",
            )
        if quantization == "nf4" and hardware.offload != "none":
            raise UsageError(
                f"--quantization nf4 cannot be combined with --offload {hardware.offload}: "
                "nf4 weights cannot leave their device",
                "omit --offload, or use --quantization int8",
            )
        if hardware.compile:
            require_compiler(self.device)
        self._disk = tempfile.TemporaryDirectory(prefix="imagewam-offload-") if on_disk else None

    def load(
        self, folder: Path, name: str, kind: type[PipelinePart], dtype: torch.dtype, *, denoiser: bool
    ) -> nn.Module:
        """Load a component of a pipeline folder. denoiser: whether it is the one whose attention is recorded."""
        import diffusers
        import transformers

        library = diffusers if issubclass(kind, diffusers.ModelMixin) else transformers
        options = loading_options(self.quantization, library, self.device, dtype)
        if self._disk is not None:
            options |= {"device_map": {"": "disk"}, "offload_folder": str(Path(self._disk.name) / name)}
        offloaded = self.hardware.offload in ("group", "sequential")
        # a device map already places the model; offloaded models start in main memory
        device = None if "device_map" in options else torch.device("cpu") if offloaded else self.device
        model: nn.Module = load_part(folder, name, kind, device, dtype, **options)
        if self.random_weights:
            randomize(model, seed=0)
        if offloaded:
            offload(model, self.device, blocks=denoiser and self.hardware.offload == "group")
        if denoiser and self.hardware.compile:
            compile_blocks(model)
        return model


def offload(model: nn.Module, device: torch.device, *, blocks: bool) -> None:
    """Keep the weights in main memory and move them to `device` when they are used.

    blocks: move a whole block at a time, for models whose blocks are direct children; otherwise layer by layer.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
    )


def compile_blocks(denoiser: ModelMixin, backend: str = "inductor") -> None:
    """Compile the denoiser's repeated blocks at its first forward pass.

    Raises:
        UsageError: its class declares no repeated blocks.
    """
    if not getattr(denoiser, "_repeated_blocks", None):
        raise UsageError(
            f"{type(denoiser).__name__} does not declare repeated blocks, which --compile needs", "omit --compile"
        )
    denoiser.compile_repeated_blocks(backend=backend)


def require_compiler(device: torch.device, backend: str = "inductor") -> None:
    """Check that torch can compile, by compiling one addition. A missing compiler would otherwise cause an
    error only at the first row.

    Raises:
        UsageError: torch cannot compile here.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(8, device=device))
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().partition("\n")[0]
        raise UsageError(f"torch cannot compile here: {reason}", "install a C++ compiler, or omit --compile") from None
