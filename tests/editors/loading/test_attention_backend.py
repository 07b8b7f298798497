"""Editors compute with torch's attention, whatever the environment or a config asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from transformers import CLIPTextConfig, CLIPTextModel

from imagewam_cli.editors.loading.attention_backend import BACKEND, override_environment
from imagewam_cli.editors.loading.folder import load_part
from imagewam_cli.errors import ImagewamWarning

CODE = """
import sys, numpy
from pathlib import Path
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
options = PrefixOptions(image_size=(64, 64), cameras=("top",))
editor = load_editor("tiny", options, instructions=["go"], weights=Path(sys.argv[1]))
picture = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
print(float(editor.encode([{"top": picture}], ["go"]).layers[0].k.double().sum()))
"""


def encoded(load_tiny: Any) -> Any:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return load_tiny(["go"]).encode([{"top": picture}], ["go"])


@pytest.mark.parametrize("backend", ["flash", "sage", "xformers", "flex", "_native_math"])
def test_a_backend_that_diffusers_was_imported_with_changes_nothing(
    load_tiny: Any, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plain = encoded(load_tiny)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName(backend))
    monkeypatch.setattr(_AttentionBackendRegistry, "_checks_enabled", True)
    other = encoded(load_tiny)
    for a, b in zip(plain.layers, other.layers, strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)


@pytest.mark.parametrize("backend", ["flash", "no such backend"])
def test_a_backend_of_the_environment_is_overridden_aloud(tiny_weights: Path, load_tiny: Any, backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tiny_weights)],
        env=os.environ | {BACKEND: backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{BACKEND}={backend} is not used: editors compute with torch's attention" in done.stderr
    assert float(done.stdout) == pytest.approx(float(encoded(load_tiny).layers[0].k.double().sum()), rel=1e-6)


def test_the_native_backend_is_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv(BACKEND, "native")
    override_environment()
    monkeypatch.delenv(BACKEND)
    override_environment()
    assert not recwarn.list


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_attention_of_a_config_is_overridden_aloud(tmp_path: Path, key: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(vocab_size=9, max_position_embeddings=9, **sizes)).save_pretrained(tmp_path / "text")
    tokens = torch.arange(5)[None]
    plain = load_part(tmp_path, "text", CLIPTextModel, torch.device("cpu"), torch.float32)(tokens)[0]
    config = tmp_path / "text" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: "flash_attention_2"}))
    with pytest.warns(ImagewamWarning, match=f"{key} 'flash_attention_2' in .* is not used"):
        model = load_part(tmp_path, "text", CLIPTextModel, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model(tokens)[0], plain)
