"""Weights of fewer bits than they were published with, by the libraries' own quantizers, while a model is loaded.

Denoiser and text encoders are quantized, their linear layers alone; the VAE is small and is left as it is. Another
quantization gives another prefix, so it is one of the `PrefixOptions`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from imagewam_cli.editors.settings import Quantization
from imagewam_cli.errors import UsageError, install_hint

_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def require_quantization(quantization: Quantization, device: torch.device) -> None:
    """
    Raises:
        UsageError: its package is not installed, or it does not run on this device.
    """
    if quantization == "none":
        return
    if quantization == "nf4" and device.type != "cuda":
        raise UsageError(
            f"quantization 'nf4' needs a CUDA device, not {device}",
            "use --device cuda, or build the cache with --quantization int8",
        )
    package = _PACKAGES[quantization]
    if find_spec(package) is None:
        raise UsageError(f"quantization {quantization!r} needs {package}", install_hint("quantization"))


def loading_options(
    quantization: Quantization, library: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize. library: diffusers or transformers, whichever has the model: each
    has config classes of its own."""
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # no device_map: with one that names the CPU the quantizer leaves the weights as they are, and says nothing
        return {"quantization_config": library.TorchAoConfig(Int8WeightOnlyConfig())}
    if quantization == "nf4":
        config = library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return {"quantization_config": config, "device_map": {"": str(device)}}
    return {}
