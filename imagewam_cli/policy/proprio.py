"""The robot's state as one trainable token in the editor's text, as in published policies.

Only live policies can use it: K and V of the whole prefix then depend on the state and on trained weights, so they
cannot be cached. A bundle stores the weights in `proprio.safetensors` and the `ProprioConfig` in `policy.json`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from imagewam_cli.editors.contract import TextToken
from imagewam_cli.errors import RunError
from imagewam_cli.policy.bundle import PROPRIO, ProprioConfig


class ProprioEncoder(nn.Module):
    """A linear map from the normalized state to one token as wide as the text states."""

    def __init__(self, config: ProprioConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.text_width, config.state_dim))
        self.bias = nn.Parameter(torch.zeros(config.text_width))

    def forward(self, state: Tensor) -> Tensor:
        """Map states (B, S) to tokens (B, text_width)."""
        return nn.functional.linear(state.to(self.weight.dtype), self.weight, self.bias)

    def token(self, state: Tensor) -> TextToken:
        """Return the text token of normalized states (B, S)."""
        config = self.config
        return TextToken(vectors=self(state), placement=config.placement, text_tokens=config.text_tokens)


def load_proprio(folder: Path, config: ProprioConfig, device: str, dtype: torch.dtype) -> ProprioEncoder:
    """Load the encoder of a policy folder.

    Raises:
        RunError: the file is missing or does not fit `config`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    encoder = ProprioEncoder(config)
    try:
        encoder.load_state_dict(load_file(folder / PROPRIO))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder / PROPRIO} is missing or does not fit policy.json: {str(error).splitlines()[-1].strip()}",
            "import the checkpoint again, or copy the whole folder",
        ) from None
    return encoder.eval().requires_grad_(False).to(device, dtype)
