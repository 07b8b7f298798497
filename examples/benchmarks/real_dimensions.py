"""Run editors at their released sizes: check the bytes per row, and measure speed and memory.

    python examples/benchmarks/real_dimensions.py --editor instruct-pix2pix --out real --rows 32 --compute-dtype float32
    python examples/benchmarks/real_dimensions.py --editor flux2-klein-4b --out real --rows 2
    python examples/benchmarks/real_dimensions.py --editor flux2-klein-4b --out real --rows 2 --codecs int4 pca1

Writes a pipeline folder with random weights (2 GB and 8 GB, kept for the next run), and encodes rows with it in a
separate process. Denoiser and VAE have the released sizes. The text encoder has the released depth and state width but
narrow layers, and the tokenizer is small; neither affects the size of a row. Images are scenes of the tabletop. With
--codecs, also prints the bytes and the attention error of each codec on the last rows; codecs that need fitting are
fitted to twelve other rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from imagewam_cli.cache_study.fidelity import compare_candidates, storage_candidates
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import Editor
from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.files import write_atomically
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.registry import Registry
from imagewam_cli.sim.tabletop.env import TabletopEnvironment

SIZES = {"instruct-pix2pix": (256, 256), "flux2-klein-4b": (224, 448)}
"""(height, width) of each editor's input: a square image, and two cameras of LIBERO side by side."""
SMALL_SIZES = {"instruct-pix2pix": (128, 128), "flux2-klein-4b": (32, 64)}
_FITTED = 12
"""Number of rows that codecs are fitted to."""
INSTRUCTION = "put the red block on the blue zone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--editor", required=True, choices=list(SIZES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16", "float16"], help="by default the editor's")
    parser.add_argument("--codecs", nargs="+", default=[], help="codecs whose attention error is measured too")
    parser.add_argument("--small", action="store_true", help="use tiny sizes, only to check that it runs")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.out / (arguments.editor + ("-small" if arguments.small else ""))
    if arguments.measure:
        size = (SMALL_SIZES if arguments.small else SIZES)[arguments.editor]
        settings = PrefixOptions(
            image_size=size, cameras=("top",), text_padding="trim", compute_dtype=arguments.compute_dtype
        )
        found = measure(arguments.editor, folder, settings, arguments.rows, arguments.batch, arguments.codecs)
        print(json.dumps(found))
        return
    if not (folder / "model_index.json").exists():
        entry = Registry.installed().editors.get(arguments.editor)
        PIPELINES[arguments.editor](entry, folder, arguments.small)
    # a new process, because the peak memory of a process never falls
    command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    print(report(json.loads(done.stdout.splitlines()[-1])))


def report(found: dict[str, Any]) -> str:
    """Format the measurements; fail if the size of a row is not the one that its layout declares."""
    if found["row_bytes"] != found["declared_bytes"]:
        raise SystemExit(f"a row has {found['row_bytes']} bytes, but its layout declares {found['declared_bytes']}")
    return (
        f"{found['editor']}, {found['dtype']}, {found['size'][0]}x{found['size'][1]} pixels, batch {found['batch']}, "
        f"{found['threads']} threads\n"
        f"weights {found['weight_bytes'] / 1e9:.2f} GB, loaded in {found['load_seconds']:.1f} s\n"
        f"{found['rows']} rows in {found['seconds']:.1f} s: {found['rows'] / found['seconds']:.2f} rows/s\n"
        f"one row: {found['row_bytes'] / 1e6:.2f} MB, as its layout declares\n"
        f"peak memory: {found['peak_bytes'] / 1e9:.2f} GB"
        + "".join(
            f"\n{codec}: {size / 1e6:.2f} MB per row, attention error {100 * error:.1f} %"
            for codec, (size, error) in found["codecs"].items()
        )
    )


def measure(
    name: str, folder: Path, settings: PrefixOptions, rows: int, batch: int, codecs: Sequence[str]
) -> dict[str, Any]:
    """Load the editor and encode rows, counting the bytes of K and V as computed."""
    size = settings.image_size
    assert size is not None
    started = time.perf_counter()
    editor = load_editor(name, settings, instructions=(INSTRUCTION,), weights=folder)
    loaded = time.perf_counter()
    pictures = scenes(rows)
    groups = [pictures[start : start + batch] for start in range(0, rows, batch)]
    for group in groups:
        prefix = encoded(editor, group)
    seconds = time.perf_counter() - loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held = sum(x.nbytes for kv in prefix.layers for x in (kv.k, kv.v))
    weights = sum(p.nbytes for m in editor.part.values() if isinstance(m, torch.nn.Module) for p in m.parameters())
    return {
        "editor": name,
        "dtype": str(editor.settings.compute_dtype),
        "size": size,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "weight_bytes": weights,
        "load_seconds": loaded - started,
        "rows": rows,
        "seconds": seconds,
        "row_bytes": held // len(groups[-1]),
        "declared_bytes": editor.spec.bytes_per_row(prefix.layers[0].k.element_size()),
        "peak_bytes": peak,
        "codecs": errors(editor, prefix, codecs) if codecs else {},
    }


def scenes(count: int, first: int = 0) -> list[UInt8Image]:
    """Render one scene of the tabletop per seed, starting at seed `first`."""
    environment = TabletopEnvironment()
    return [environment.reset(first + i, "train").images["top"] for i in range(count)]


def encoded(editor: Editor, pictures: Sequence[UInt8Image]) -> PrefixKV:
    return editor.encode([{"top": picture} for picture in pictures], [INSTRUCTION] * len(pictures))


def errors(editor: Editor, prefix: PrefixKV, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return codec -> (bytes per row, attention error averaged over layers)."""
    codecs = [Registry.installed().codecs.load(name) for name in names]
    samples = [encoded(editor, [picture]) for picture in scenes(_FITTED, first=1000)]
    exact = prefix.to("cpu", torch.float32)
    found = compare_candidates(editor.spec, exact, storage_candidates(editor.spec, codecs, samples, pools=(1,)))
    return {x.codec: (x.bytes_per_row, x.attention) for x in found}


def random_model(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Create a model without ever holding it in float32: norms are 1, other weights normal with deviation 0.02."""
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in _state(model):
            if not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.02)
            else:
                tensor.fill_(0.0 if name.endswith(("bias", "mean")) else 1.0)
    return model.eval()


def _state(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def instruct_pix2pix(entry: EditorEntry, folder: Path, small: bool) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    narrow = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32} if small else {}
    unet = {**entry.config, **narrow}
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    channels = (32,) * 4 if small else (128, 256, 512, 512)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=unet["cross_attention_dim"],
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=1,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    parts = {
        "tokenizer": CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear"),
        "text_encoder": _initialized(CLIPTextModel, text),
        "vae": random_model(AutoencoderKL, _autoencoder(channels), torch.float16),
        "unet": random_model(UNet2DConditionModel, unet, torch.float16),
    }
    save(entry, folder, parts)


def _initialized(kind: Any, config: Any) -> Any:
    """Create a small model with its class's own initialization, because it has buffers with a meaning."""
    torch.manual_seed(0)
    return kind(config).eval()


def _autoencoder(channels: tuple[int, ...]) -> dict[str, Any]:
    """Return the config of Stable Diffusion's VAE with these channels."""
    return {
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
    }


def flux2_klein(entry: EditorEntry, folder: Path, small: bool) -> None:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from imagewam_tiny.architecture import build_tokenizer

    narrow = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 96}
    config = {**entry.config, **(narrow if small else {})}
    tokenizer = build_tokenizer()
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=config["joint_attention_dim"] // 3,
        intermediate_size=64,
        num_hidden_layers=28,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
    )
    channels = {"block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4} if small else {}
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": _initialized(Qwen3ForCausalLM, text),
        "vae": random_model(AutoencoderKLFlux2, channels, torch.bfloat16),
        "transformer": random_model(Flux2Transformer2DModel, config, torch.bfloat16),
    }
    save(entry, folder, parts)


def save(entry: EditorEntry, folder: Path, parts: dict[str, Any]) -> None:
    """Write the parts as a pipeline folder. The index comes last, so a folder that has one is complete."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.save_pretrained(folder / name, max_shard_size="2GB")
        else:
            part.save_pretrained(folder / name)
    write_atomically(folder / "model_index.json", json.dumps({"_class_name": entry.family}).encode())


PIPELINES: dict[str, Callable[[EditorEntry, Path, bool], None]] = {
    "instruct-pix2pix": instruct_pix2pix,
    "flux2-klein-4b": flux2_klein,
}

if __name__ == "__main__":
    main()
