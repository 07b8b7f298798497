"""Every component is what its config says: folders of tiny real pipelines, damaged in one place each, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagewam_cli.editors.installed import installed_editor, load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import EditorError, ImagewamWarning
from tests.support.editors import flux2, flux_kontext, instruct_pix2pix, longcat, qwen, sdxl

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "flux-kontext": flux_kontext.build,
    "instruct-pix2pix": instruct_pix2pix.build,
    "sdxl-instruct-pix2pix": sdxl.build,
    "flux2-klein-4b": flux2.build,
    "qwen-image-edit": qwen.build,
    "longcat-image-edit": longcat.build,
}
DENOISER = "transformer/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
T5 = "text_encoder_2/model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pipelines(editor)` returns the editor's tiny pipeline, built once. Read-only."""
    home = tmp_path_factory.mktemp("pipelines")
    return lambda name: home / name if (home / name).exists() else BUILDERS[name](home / name)


@pytest.fixture
def copy(pipelines: Callable[[str], Path], tmp_path: Path) -> Folder:
    """`copy(editor)` returns a private copy of the editor's tiny pipeline."""
    return lambda name: Path(shutil.copytree(pipelines(name), tmp_path / name))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path, stem: str) -> Path:
    """Split the weights into two files; return their index."""
    whole = folder / f"{stem}.safetensors"
    tensors, places = load_file(whole), {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        name = f"{stem}-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(names, name)
    whole.unlink()
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def require(name: str, folder: Path) -> None:
    installed_editor(name).require_weights(folder)


def load(name: str, folder: Path) -> Any:
    options = PrefixOptions(cameras=("top",), image_size=(64, 64), compute_dtype="float32")
    return load_editor(name, options, weights=folder)


def matrices(tensors: dict[str, Tensor]) -> Iterator[str]:
    return (name for name, value in tensors.items() if value.ndim == 2)


@pytest.mark.parametrize("name", BUILDERS)
def test_sound_pipelines_pass_in_silence(
    pipelines: Callable[[str], Path], name: str, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines(name)
    capfd.readouterr()
    require(name, folder)
    load(name, folder)
    assert not [w for w in recwarn if w.category is ImagewamWarning]
    assert capfd.readouterr() == ("", "")


def scaled_fp8(suffix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scaled = {n: tensors[n].to(torch.float8_e4m3fn) for n in matrices(tensors)}
        return tensors | scaled | {n.replace(".weight", suffix): torch.ones(()) for n in scaled}

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def with_extra(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: torch.ones(2) for name in names}


def nf4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name in matrices(tensors):
        packed[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        packed[f"{name}.absmax"] = torch.zeros(4)
        packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
    return tensors | packed


FOREIGN: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (DENOISER, scaled_fp8(".weight_scale"), "unexpected .*weight_scale.*fp8.* with scales"),
    (T5, scaled_fp8(".scale_weight"), "text_encoder_2 .*fp8.* with scales"),
    (DENOISER, nf4, "another shape .*quantized by bitsandbytes"),
    (DENOISER, renamed(".to_k.weight", ".to_k.qweight"), "quantized by GPTQ"),
    (DENOISER, renamed(".to_k.weight", ".to_k.weight_qdata"), "quantized by torchao"),
    (DENOISER, renamed(".to_k.", ".to_k.base_layer."), "a LoRA beside its base layers"),
    (DENOISER, with_extra("transformer_blocks.0.attn.to_k.lora_A.weight"), "1 tensor is unexpected .*a LoRA"),
    (DENOISER, lambda _: {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2)}, "kohya"),
    (DENOISER, prefixed("model.diffusion_model."), "ComfyUI"),
    (DENOISER, renamed("single_transformer_blocks.", "single_blocks."), "Black Forest Labs"),
    (DENOISER, prefixed("_orig_mod."), "names begin with '_orig_mod.'"),
    (DENOISER, renamed("transformer_blocks.1.", "transformer_blocks.7."), "missing .* unexpected"),
    (T5, lambda t: t | {n: t[n].to(torch.int8) for n in matrices(t)}, "14 tensors are stored as I8"),
    (DENOISER, lambda t: t | {"x_embedder.weight": torch.zeros(0, 16)}, r"is \[0, 16\] instead of \[32, 16\]"),
]


@pytest.mark.parametrize(("file", "change", "message"), FOREIGN)
def test_weights_of_another_kind_are_named(
    copy: Folder, file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    folder = copy("flux-kontext")
    rewrite(folder / file, change)
    with pytest.raises(EditorError, match=message) as caught:
        require("flux-kontext", folder)
    assert str(folder / Path(file).parent) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("editor", "config", "changes", "message"),
    [
        ("flux-kontext", "transformer", {"num_layers": 1}, "2 blocks 'transformer_blocks' where config.json says 1"),
        ("flux-kontext", "transformer", {"num_layers": 4}, "64 tensors are missing .* config.json says 4"),
        ("instruct-pix2pix", "text_encoder", {"num_hidden_layers": 1}, "16 tensors are unexpected .* says 1"),
        ("flux-kontext", "transformer", {"num_attention_heads": 4}, "another size of the model"),
        ("instruct-pix2pix", "text_encoder", {"hidden_size": 32}, "another size of the model"),
        ("flux-kontext", "transformer", {"quantization_config": {"quant_method": "torchao"}}, "quantized by torchao"),
        ("flux-kontext", "transformer", {"_class_name": "FluxControlNetModel"}, "describes FluxControlNetModel"),
        ("flux-kontext", "text_encoder_2", {"model_type": "umt5"}, "describes umt5"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_named(
    copy: Folder, editor: str, config: str, changes: dict[str, Any], message: str
) -> None:
    folder = copy(editor)
    configure(folder / config / "config.json", **changes)
    with pytest.raises(EditorError, match=f"{config}.*{message}"):
        require(editor, folder)


def test_swapped_text_encoders_are_named(copy: Folder) -> None:
    for editor, message in (("flux-kontext", "describes t5"), ("sdxl-instruct-pix2pix", "'text_projection.weight'")):
        folder = copy(editor)
        for old, new in (("text_encoder", "x"), ("text_encoder_2", "text_encoder"), ("x", "text_encoder_2")):
            (folder / old).rename(folder / new)
        with pytest.raises(EditorError, match=message):
            require(editor, folder)


def test_another_class_in_the_index_is_named(copy: Folder) -> None:
    folder = copy("flux-kontext")
    configure(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(EditorError, match="names AutoencoderTiny for vae/, and the editor needs AutoencoderKL"):
        require("flux-kontext", folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def link_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def only_variant(path: Path) -> None:
    path.rename(path.with_suffix(".fp16.safetensors"))


def only_pickle(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def only_lora(path: Path) -> None:
    path.rename(path.with_name("pytorch_lora_weights.safetensors"))


@pytest.mark.parametrize("file", [UNET, "text_encoder/model.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"is cut off: it has [\d,]+ of [\d,]+ bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is cut off: it has 100 bytes"),
        (lambda path: path.write_bytes(bytes(range(1, 200))), "is damaged or not a safetensors file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text(POINTER), "is a Git LFS pointer"),
        (lambda path: path.write_text("<!DOCTYPE html>"), "is a web page"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "is a GGUF file"),
        (link_nowhere, "is a link to a file that does not exist"),
        (only_variant, "only as a variant"),
        (only_pickle, "a format that can run arbitrary code"),
        (only_lora, "but not the weights that it belongs to"),
        (Path.unlink, "has no weights"),
    ],
)
def test_damaged_and_missing_weight_files_are_named(
    copy: Folder, file: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = copy("instruct-pix2pix")
    damage(folder / file)
    with pytest.raises(EditorError, match=message) as caught:
        require("instruct-pix2pix", folder)
    assert str((folder / file).parent) in caught.value.message


@pytest.mark.parametrize(("part", "stem"), [("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")])
class TestShards:
    def test_complete_shards_are_read(self, copy: Folder, part: str, stem: str) -> None:
        folder = copy("flux-kontext")
        shard(folder / part, stem)
        require("flux-kontext", folder)
        load("flux-kontext", folder)

    def test_missing_shards_and_tensors_are_named(self, copy: Folder, part: str, stem: str) -> None:
        folder = copy("flux-kontext")
        index = shard(folder / part, stem)
        second = folder / part / f"{stem}-00002-of-00002.safetensors"
        rewrite(second, lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]})
        with pytest.raises(EditorError, match=f"{second.name} lacks the tensor"):
            require("flux-kontext", folder)
        second.unlink()
        with pytest.raises(EditorError, match="lacks 1 of its 2 weight files"):
            require("flux-kontext", folder)
        index.unlink()
        with pytest.raises(EditorError, match=r"parts of its weights but not .*index\.json"):
            require("flux-kontext", folder)

    def test_shards_outside_the_folder_are_refused(self, copy: Folder, part: str, stem: str) -> None:
        folder = copy("flux-kontext")
        index = shard(folder / part, stem)
        index.write_text(index.read_text().replace(f"{stem}-00002", f"../{stem}-00002"))
        with pytest.raises(EditorError, match="outside its folder"):
            require("flux-kontext", folder)


class TestHarmlessExtras:
    def test_towers_and_buffers_that_a_text_encoder_does_not_use_pass(self, copy: Folder) -> None:
        folder = copy("instruct-pix2pix")
        extras = ("vision_model.embeddings.class_embedding", "logit_scale", "visual_projection.weight")
        rewrite(folder / "text_encoder/model.safetensors", with_extra(*extras, "text_model.embeddings.position_ids"))
        require("instruct-pix2pix", folder)

    def test_the_decoder_and_tied_weights_of_a_complete_t5_pass(self, copy: Folder) -> None:
        folder = copy("flux-kontext")

        def complete(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            tied = {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
            decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
            return tensors | tied | decoder

        rewrite(folder / T5, complete)
        require("flux-kontext", folder)

    def test_a_tied_head_may_be_stored(self, copy: Folder) -> None:
        folder = copy("flux2-klein-4b")
        head = "lm_head.weight"
        rewrite(folder / "text_encoder/model.safetensors", lambda t: t | {head: t["model.embed_tokens.weight"].clone()})
        require("flux2-klein-4b", folder)

    def test_attention_of_old_vaes_is_renamed_as_diffusers_does(self, copy: Folder) -> None:
        folder = copy("instruct-pix2pix")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for new, before in old.items():
                tensors = {n.replace(f".{new}.", f".{before}."): value for n, value in tensors.items()}
            return tensors

        rewrite(folder / "vae/diffusion_pytorch_model.safetensors", rename)
        require("instruct-pix2pix", folder)


def test_fp8_without_scales_is_converted_aloud(copy: Folder) -> None:
    folder = copy("flux-kontext")
    rewrite(folder / DENOISER, lambda t: t | {n: t[n].to(torch.float8_e4m3fn) for n in matrices(t)})
    with pytest.warns(ImagewamWarning, match=r"transformer stores 44 tensors in 8 bits \(float8_e4m3fn\) without"):
        require("flux-kontext", folder)


def test_weights_that_are_no_numbers_are_named(copy: Folder) -> None:
    for file, value in ((DENOISER, float("nan")), ("text_encoder/model.safetensors", float("inf"))):
        folder = copy("flux-kontext")
        broken = next(matrices(load_file(folder / file)))
        rewrite(folder / file, lambda t, n=broken, v=value: t | {n: torch.full_like(t[n], v)})  # type: ignore[misc]
        with pytest.raises(EditorError, match="has NaN or infinite values"):
            load("flux-kontext", folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("place", [".", "transformer", "text_encoder"])
def test_a_lora_that_is_not_applied_is_said(copy: Folder, place: str) -> None:
    folder = copy("flux-kontext")
    save_file(
        {"transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(4, 32)}, folder / place / "my_lora.safetensors"
    )
    with pytest.warns(ImagewamWarning, match=r"my_lora\.safetensors is a LoRA, which is not applied"):
        require("flux-kontext", folder)


def test_a_second_set_of_weights_is_said(copy: Folder) -> None:
    folder = copy("flux-kontext")
    shutil.copy(folder / DENOISER, folder / "transformer" / "model-old.safetensors")
    with pytest.warns(ImagewamWarning, match=r"several sets of weights: .* is read, model-old\.safetensors is not"):
        require("flux-kontext", folder)


class TestNotAFolder:
    def test_a_single_file_is_described(self, pipelines: Callable[[str], Path], tmp_path: Path) -> None:
        lora = tmp_path / "lora.safetensors"
        save_file({"transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(4)}, lora)
        gguf, pickle = tmp_path / "model.gguf", tmp_path / "model.ckpt"
        gguf.write_bytes(b"GGUF")
        torch.save({}, pickle)
        for path, message in ((lora, "a single file of 1 tensors; they seem to hold a LoRA"), (gguf, "is a GGUF file")):
            with pytest.raises(EditorError, match=message) as caught:
                require("flux-kontext", path)
            assert "FluxKontextPipeline" in (caught.value.hint or "")
        with pytest.raises(EditorError, match="is a pickle of PyTorch"):
            require("flux-kontext", pickle)
        with pytest.raises(EditorError, match=r"it has lora\.safetensors, which is a single file"):
            require("flux-kontext", tmp_path)

    def test_one_component_is_described(self, pipelines: Callable[[str], Path]) -> None:
        folder = pipelines("flux-kontext") / "transformer"
        with pytest.raises(EditorError, match=r"is one component \(FluxTransformer2DModel\), not a whole pipeline"):
            require("flux-kontext", folder)


def unlink(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def without_letters(folder: Path) -> None:
    path = folder / "tokenizer/tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < 80 or i >= 512}
    path.write_text(json.dumps(values))


def without_picture_token(folder: Path) -> None:
    configure(folder / "processor/tokenizer.json", added_tokens=[])
    configure(folder / "processor/tokenizer_config.json", extra_special_tokens=[])


def swap_tokenizers(folder: Path) -> None:
    for old, new in (("tokenizer", "x"), ("tokenizer_2", "tokenizer"), ("x", "tokenizer_2")):
        (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("editor", "damage", "message"),
    [
        ("instruct-pix2pix", unlink("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
        ("flux-kontext", unlink("tokenizer_2/tokenizer.json"), "tokenizer_2 has no vocabulary"),
        ("flux2-klein-4b", unlink("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
        ("qwen-image-edit", unlink("processor/tokenizer.json"), "processor has no vocabulary"),
        ("longcat-image-edit", unlink("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
        ("qwen-image-edit", unlink("processor/preprocessor_config.json"), "processor lacks preprocessor_config"),
        ("longcat-image-edit", unlink("text_processor/preprocessor_config.json"), "lacks preprocessor_config"),
        ("flux2-klein-4b", unlink("tokenizer/chat_template.jinja"), "tokenizer has no chat template"),
        ("flux2-klein-4b", unlink("tokenizer/tokenizer_config.json"), "lacks tokenizer_config.json"),
        ("instruct-pix2pix", unlink("scheduler/scheduler_config.json"), "scheduler_config.json cannot be read"),
        ("instruct-pix2pix", lambda f: (f / "tokenizer/tokenizer.json").write_text(POINTER), "is a Git LFS pointer"),
        ("instruct-pix2pix", lambda f: cut(f / "tokenizer/tokenizer.json"), "is damaged"),
        ("instruct-pix2pix", without_letters, "cannot write 13 of 26 letters"),
        ("qwen-image-edit", without_picture_token, "has no token for pictures"),
        ("flux-kontext", swap_tokenizers, "describes T5Tokenizer, and the editor needs CLIPTokenizer"),
    ],
)
def test_broken_tokenizers_and_processors_are_named(
    copy: Folder, editor: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = copy(editor)
    damage(folder)
    with pytest.raises(EditorError, match=message) as caught:
        load(editor, folder)
    assert caught.value.hint


def test_a_tokenizer_of_another_size_is_named(copy: Folder) -> None:
    folder = copy("instruct-pix2pix")
    configure(folder / "text_encoder/config.json", vocab_size=300)
    rewrite(
        folder / "text_encoder/model.safetensors",
        lambda t: {n: v[:300] if "token_embedding" in n else v for n, v in t.items()},
    )
    with pytest.raises(EditorError, match="tokens up to number 513, but its text encoder knows 300"):
        load("instruct-pix2pix", folder)


@pytest.mark.parametrize(
    ("editor", "config", "changes", "message"),
    [
        ("flux-kontext", "text_encoder_2", {"d_model": 32}, "text states is 32 of the former and 24 of the latter"),
        ("flux-kontext", "text_encoder", {"hidden_size": 24}, "pooled text is 24 of the former and 20"),
        ("flux-kontext", "vae", {"latent_channels": 8}, "vae and transformer .* tokens is 32 of the former and 16"),
        ("flux2-klein-4b", "text_encoder", {"hidden_size": 64}, "text states is 192 of the former and 96"),
        ("qwen-image-edit", "vae", {"z_dim": 8}, "tokens is 32 of the former and 16"),
        ("longcat-image-edit", "vae", {"latent_channels": 8}, "tokens is 32 of the former and 16"),
        ("sdxl-instruct-pix2pix", "text_encoder", {"hidden_size": 32}, "text states is 48 of the former and 40"),
        ("instruct-pix2pix", "vae", {"latent_channels": 8}, "noise and picture is 16 of the former and 8"),
    ],
)
def test_components_that_do_not_belong_together_are_named(
    pipelines: Callable[[str], Path], editor: str, config: str, changes: dict[str, Any], message: str
) -> None:
    kind: Any = installed_editor(editor)
    models = [n for n, part in kind.part_classes().items() if issubclass(part, torch.nn.Module)]
    configs = {n: json.loads((pipelines(editor) / n / "config.json").read_text()) for n in models}

    def require_all() -> None:
        for size in kind.shared_sizes():
            size.require(configs)

    require_all()
    configs[config] |= changes
    with pytest.raises(EditorError, match=message):
        require_all()
