"""Device, offloading and compilation do not change a prefix, and missing hardware is reported before loading."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors import SafetensorError
from torch import nn

from imagewam_cli.cli.app import run
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.loading.folder import load_part
from imagewam_cli.editors.loading.hardware import CPU, Hardware
from imagewam_cli.editors.loading.placement import Placement, compile_blocks, require_compiler, require_device
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import EditorError, UsageError
from imagewam_cli.kvcache.format.provenance import fingerprint_digest
from imagewam_cli.prefix.capture import record
from imagewam_cli.prefix.kv import LayerKV

INSTRUCTIONS = ("put the red block on the blue zone", "go")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")


def load(weights: Path, instructions: Sequence[str] = (), hardware: Hardware = CPU, **settings: Any) -> Any:
    chosen = PrefixOptions(image_size=(64, 64), cameras=("top",), **settings)
    return load_editor("tiny", chosen, instructions=instructions, weights=weights, hardware=hardware)


def rows(editor: Any) -> Any:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return editor.encode([{"top": picture}] * 2, INSTRUCTIONS)


def difference(one: Any, other: Any) -> float:
    pairs = zip(one.layers, other.layers, strict=True)
    return max(float((getattr(a, x) - getattr(b, x)).abs().max()) for a, b in pairs for x in ("k", "v"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:one"}, "unknown device 'cuda:one'"),
        ({"device": "cuda", "offload": "disk"}, "--offload disk cannot be combined with --device cuda"),
        ({"device": "mps", "offload": "group"}, "--offload group cannot be combined with --device mps"),
        ({"offload": "group", "compile": True}, "--compile cannot be combined with --offload group"),
    ],
)
def test_invalid_hardware_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Hardware(**values)


@without_cuda
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(UsageError, match="torch finds 0 CUDA devices"):
        require_device(Hardware(device="cuda:1"))


@without_cuda
def test_cache_and_eval_refuse_a_missing_device(
    tabletop: Path, policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["cache", "--editor", "tiny", "--dataset", str(tabletop), "--out", str(tmp_path / "c")]
    for command in (cache, ["eval", "--policy", str(policy_folder)]):
        assert run([*command, "--device", "cuda"]) == 2
        assert "error: device 'cuda' does not exist" in capsys.readouterr().err
        assert run([*command, "--offload", "gruop"]) == 2
        assert "offload is 'gruop'" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("offload", ["group", "sequential", "disk"])
@pytest.mark.parametrize("instructions", [(), INSTRUCTIONS], ids=["live", "announced"])
def test_offloading_does_not_change_the_prefix(tiny_weights: Path, offload: Any, instructions: Any) -> None:
    plain = load(tiny_weights, instructions)
    editor = load(tiny_weights, instructions, Hardware(offload=offload))
    expected = rows(plain)
    for _ in range(2):  # recording stops a forward early, which must not affect the next one
        assert difference(rows(editor), expected) < 1e-5
    assert fingerprint_digest(editor.fingerprint()) == fingerprint_digest(plain.fingerprint())


def test_weights_are_offloaded_by_block_or_by_layer_or_to_disk(tiny_weights: Path) -> None:
    def is_offloaded(module: nn.Module) -> bool:
        return hasattr(module, "_diffusers_hook")

    for offload, by_block in (("group", True), ("sequential", False)):
        part = load(tiny_weights, hardware=Hardware(offload=offload)).part
        block = part["transformer"].transformer_blocks[0]
        assert (is_offloaded(block), is_offloaded(block.attn.to_q)) == (by_block, not by_block)
        assert is_offloaded(part["text_encoder"].model.layers[0].self_attn.q_proj)
    part = load(tiny_weights, hardware=Hardware(offload="disk")).part
    for name in ("transformer", "text_encoder"):
        assert {p.device.type for p in part[name].parameters()} == {"meta"}


def test_random_weights_cannot_be_offloaded_to_disk(tiny_weights: Path) -> None:
    with pytest.raises(UsageError, match="--offload disk cannot be combined with --"):
        load(tiny_weights, hardware=Hardware(offload="disk"), random_weights=True)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")
DISK_FULL_IN_RUST = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("raised", "cause", "expected"),
    [
        (OUT_OF_MEMORY, None, OUT_OF_MEMORY),
        (DISK_FULL, None, DISK_FULL),
        (OSError("Unable to load weights"), OUT_OF_MEMORY, OUT_OF_MEMORY),
        (SafetensorError(DISK_FULL_IN_RUST), None, OSError),
        (OSError("Unable to load weights"), None, EditorError),
        (RuntimeError("size mismatch"), None, EditorError),
    ],
)
def test_a_full_disk_or_device_is_not_blamed_on_the_folder(
    tmp_path: Path, raised: Exception, cause: Exception | None, expected: Any
) -> None:
    class Part(nn.Module):
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> None:
            raise raised from cause

    with pytest.raises(expected if isinstance(expected, type) else type(expected)) as error:
        load_part(tmp_path, "unet", Part, "cpu", torch.float32)
    if isinstance(expected, Exception):
        assert error.value is expected
    elif expected is OSError:
        assert error.value.errno == errno.ENOSPC
    else:
        assert error.value.hint is not None
        assert "fetch the editor again" in error.value.hint


class TestCompile:
    DOUBLE, SINGLE = 2, 10
    """More layers than torch compiles graphs for one function (8) before it gives up."""

    @pytest.fixture
    def denoiser(self) -> Any:
        torch.manual_seed(0)
        model = Flux2Transformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=self.DOUBLE,
            num_single_layers=self.SINGLE,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        return model.eval().requires_grad_(False)

    def recorded(self, model: Any, *, early: bool) -> dict[str, LayerKV]:
        names = [f"transformer_blocks.{i}.attn" for i in range(self.DOUBLE)]
        names += [f"single_transformer_blocks.{i}.attn" for i in range(self.SINGLE)]
        random = torch.Generator().manual_seed(1)
        with record(model, names, stop_after_last=early) as recording:
            model(
                hidden_states=torch.randn(1, 6, 8, generator=random),
                encoder_hidden_states=torch.randn(1, 5, 12, generator=random),
                timestep=torch.zeros(1),
                img_ids=torch.zeros(6, 4),
                txt_ids=torch.zeros(5, 4),
                guidance=None,
            )
        return recording.layers

    def test_compiled_blocks_record_the_same_bits_and_do_not_recompile(self, denoiser: Any) -> None:
        from torch._dynamo.utils import counters

        expected = self.recorded(denoiser, early=False)
        compile_blocks(denoiser, backend="eager")
        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for early in (True, False, True):
                found = self.recorded(denoiser, early=early)
                assert found.keys() == expected.keys()
                for name, kv in expected.items():
                    torch.testing.assert_close(found[name].k, kv.k, rtol=0, atol=0)
                    torch.testing.assert_close(found[name].v, kv.v, rtol=0, atol=0)
                graphs = counters["stats"]["unique_graphs"]
                assert graphs > 0
            assert self.recorded(denoiser, early=True).keys() == expected.keys()
            assert counters["stats"]["unique_graphs"] == graphs, "a further row compiles nothing"

    def test_a_model_without_named_blocks_cannot_be_compiled(self) -> None:
        with pytest.raises(UsageError, match="Linear does not declare repeated blocks"):
            compile_blocks(nn.Linear(1, 1))

    def test_a_missing_compiler_is_refused(self) -> None:
        def broken(graph: Any, inputs: Any) -> Any:
            raise RuntimeError("no compiler here")

        with pytest.raises(UsageError, match="torch cannot compile here: no compiler here"):
            require_compiler(torch.device("cpu"), backend=broken)  # type: ignore[arg-type]

    def test_the_compiler_is_tried_before_weights_are_loaded(
        self, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(device: torch.device) -> None:
            raise UsageError("no compiler here")

        monkeypatch.setattr("imagewam_cli.editors.loading.placement.require_compiler", missing)
        monkeypatch.setattr("imagewam_cli.editors.diffusers.load_part", lambda *_: pytest.fail("loaded"))
        monkeypatch.setattr("imagewam_cli.editors.loading.placement.load_part", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(UsageError, match="no compiler here"):
            load(tiny_weights, hardware=Hardware(compile=True))


class TestQuantization:
    def test_quantization_without_torchao_names_the_extra(
        self, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("imagewam_cli.editors.loading.quantization.find_spec", lambda _: None)
        with pytest.raises(UsageError, match="needs torchao") as error:
            load(tiny_weights, quantization="int8")
        assert error.value.hint == "pip install 'imagewam[quantization]'"

    def test_nf4_needs_a_cuda_device(self, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("imagewam_cli.editors.loading.quantization.find_spec", lambda _: True)
        with pytest.raises(UsageError, match="'nf4' needs a CUDA device, got cpu"):
            load(tiny_weights, quantization="nf4")

    def test_nf4_cannot_be_offloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("imagewam_cli.editors.loading.quantization.find_spec", lambda _: True)
        monkeypatch.setattr("imagewam_cli.editors.loading.placement.require_device", lambda _: torch.device("cuda"))
        with pytest.raises(UsageError, match="--quantization nf4 cannot be combined with --offload"):
            Placement(Hardware(device="cuda", offload="group"), quantization="nf4", random_weights=False)

    def test_random_weights_are_not_quantized(self) -> None:
        with pytest.raises(UsageError, match="--random-weights cannot be combined with --quantization"):
            PrefixOptions(random_weights=True, quantization="int8")

    @needs_torchao
    def test_int8_rounds_linear_weights_to_the_nearest_step(self, tiny_weights: Path) -> None:
        plain, quantized = load(tiny_weights), load(tiny_weights, quantization="int8")
        exact, found = rows(plain), rows(quantized)
        for name, block in (("transformer", "transformer_blocks.0.attn.to_q"), ("text_encoder", "model.layers.0.mlp")):
            weights = dict(plain.part[name].named_parameters())
            rounded = {k: w for k, w in quantized.part[name].named_parameters() if hasattr(w, "qdata")}
            assert any(k.startswith(block) for k in rounded)
            for k, w in rounded.items():
                steps = weights[k].abs().amax(dim=1, keepdim=True) * 2 / 255
                assert bool(((w.dequantize() - weights[k]).abs() <= 0.51 * steps).all())
                weights[k].copy_(w.dequantize())
        plain._texts._cached.clear()
        assert difference(found, rows(plain)) < 1e-4
        assert difference(found, exact) > 1e-3
        assert fingerprint_digest(plain.fingerprint()) != fingerprint_digest(quantized.fingerprint())

    @needs_torchao
    def test_quantized_weights_can_be_offloaded(self, tiny_weights: Path) -> None:
        expected = rows(load(tiny_weights, quantization="int8"))
        for offload in ("group", "sequential"):
            hardware = Hardware(offload=offload)  # type: ignore[arg-type]
            assert difference(rows(load(tiny_weights, hardware=hardware, quantization="int8")), expected) < 1e-5
