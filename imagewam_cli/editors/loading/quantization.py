"""Quantize weights while a model is loaded, with the libraries' own quantizers.

Only the linear layers of denoiser and text encoders are quantized; the VAE is small. Quantization changes the prefix,
so it is one of the `PrefixOptions`.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch

from imagewam_cli.errors import UsageError, install_hint
from imagewam_cli.prefix.spec import Quantization

_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def require_quantization(quantization: Quantization, device: torch.device) -> None:
    """Check that this machine supports a quantization.

    Raises:
        UsageError: its package is not installed, or it does not run on this device.
    """
    if quantization == "none":
        return
    if quantization == "nf4" and device.type != "cuda":
        raise UsageError(
            f"quantization 'nf4' needs a CUDA device, got {device}",
            "use --device cuda, or build the cache with --quantization int8",
        )
    package = _PACKAGES[quantization]
    if find_spec(package) is None:
        raise UsageError(f"quantization {quantization!r} needs {package}", install_hint("quantization"))


def loading_options(
    quantization: Quantization, library: ModuleType, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """Return the arguments of `from_pretrained` that quantize.

    library: diffusers or transformers, whichever defines the model; each has its own config classes.
    """
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # no device_map: if it names the CPU, the quantizer silently leaves the weights as they are
        return {"quantization_config": library.TorchAoConfig(Int8WeightOnlyConfig())}
    if quantization == "nf4":
        config = library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return {"quantization_config": config, "device_map": {"": str(device)}}
    return {}
