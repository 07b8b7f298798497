"""Checks of the consumers of a prefix: the cache, the action expert and the exporters."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import Editor, PrefixGraph
from imagewam_cli.errors import ConfigError, ExportError, install_hint
from imagewam_cli.expert.attention import Rotary
from imagewam_cli.expert.blocks import ParallelBlock, QKNorm, SequentialBlock
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.export.description import prefix_inputs
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instructions_of
from imagewam_cli.kvcache.building.shard_plan import BuildSettings, plan_build
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.format.manifest import SHARDS
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.policy.loading import prefix_arrays
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import LayerSpec
from imagewam_cli.testing.dataset import MemoryDataset
from imagewam_cli.testing.subject import LONG, SHORT, ContractError, NotApplicable, Subject, require, require_equal

_HORIZON, _DRAWS, _HIDDEN = 3, 2, 32


def a_cache_gives_back_what_was_encoded(subject: Subject) -> None:
    """a float32 cache stores the exact numbers in the number of bytes that `spec` declares"""
    dataset = MemoryDataset((2, 1), size=subject.size, instructions=(SHORT, LONG))
    editor = subject.load(instructions_of(dataset), segments=subject.segments())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        build_cache(dataset, editor, folder, FLOAT32, BuildSettings(batch=1))
        reader = CacheReader(folder)
        read = reader.read(np.arange(len(reader)))
        written = sum(_content_bytes(path) for path in (folder / SHARDS).iterdir())
    fix = (
        "give `encode` and `spec` the same shapes, compute the same numbers in every call, and do not mark a "
        "layer that sees the picture as `by_instruction`"
    )
    for i, row in enumerate(dataset.rows()):
        encoded = _tensors(editor.encode([row.images], [row.instruction]), editor)
        require_equal(_tensors(_row(read, i), editor), encoded, f"row {i} of the cache", fix)
    declared = plan_build(dataset, editor.spec, FLOAT32, BuildSettings()).total_bytes
    require(written == declared, f"the shard holds {written} bytes, but the plan declares {declared}", fix)


def _content_bytes(shard: Path) -> int:
    """Return the bytes of a safetensors file without its header."""
    with shard.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return shard.stat().st_size - 8 - header


def _tensors(prefix: PrefixKV, editor: Editor) -> dict[str, Tensor]:
    """Return K, V and `valid` in float32, under their names in a shard."""
    return {name: torch.from_numpy(x) for name, x in prefix_arrays(prefix, editor.spec.layers).items()}


def _row(prefix: PrefixKV, row: int) -> PrefixKV:
    valid = None if prefix.valid is None else prefix.valid[row : row + 1]
    return PrefixKV(tuple(type(kv)(kv.k[row : row + 1], kv.v[row : row + 1]) for kv in prefix.layers), valid)


def expert_attends_jointly(subject: Subject) -> None:
    """the action expert's attention over cached K and V is one softmax over [prefix | actions]"""
    editor = subject.load((SHORT, LONG), segments=subject.segments())
    prefix = editor.encode(subject.pictures(2), (SHORT, LONG)).to("cpu", torch.float64)
    expert = _expert(editor)
    given, expected = _attention(expert, prefix)
    require_equal(
        given,
        expected,
        "the expert's attention, compared with F.scaled_dot_product_attention",
        "`heads` must be a multiple of `kv_heads`, and `valid` must fit every layer that holds text",
        rounding=True,
    )


def _expert(editor: Editor) -> ActionExpert:
    spec = editor.spec
    try:
        config = ExpertConfig(
            layers=spec.layers, rope=spec.rope, action_dim=2, state_dim=2, horizon=_HORIZON, hidden=_HIDDEN
        )
    except ConfigError as error:
        raise ContractError(error.message, "the axes of `rope` must add up to the size of a head") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ActionExpert(config).double().eval().requires_grad_(False)


def _attention(expert: ActionExpert, prefix: PrefixKV) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return two mappings, layer -> attention output (B N, T, H D): the expert's, and that of one softmax over the
    concatenation."""
    projected: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    norms: dict[str, QKNorm] = {}
    doubles, singles = iter(expert.double_blocks), iter(expert.single_blocks)
    for layer in expert.config.layers:
        before, after, norms[layer.name] = _projections(next(doubles if layer.block == "sequential" else singles))
        before.register_forward_hook(lambda _m, _a, out, at=layer.name: projected.update({at: out}))
        after.register_forward_pre_hook(lambda _m, args, at=layer.name: outputs.update({at: args[0]}))
    generator = torch.Generator().manual_seed(0)
    chunks = prefix.batch * _DRAWS
    shapes = ((chunks, _HORIZON, 2), (chunks,), (chunks, 2))
    expert(*(torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes), prefix)
    expected = {
        layer.name: _one_softmax(
            layer, _own_qkv(layer, projected[layer.name], norms[layer.name], expert.rotary), kv, prefix
        )
        for layer, kv in zip(expert.config.layers, prefix.layers, strict=True)
    }
    return {name: out[..., : expected[name].shape[-1]] for name, out in outputs.items()}, expected


def _projections(block: nn.Module) -> tuple[nn.Module, nn.Module, QKNorm]:
    """Return the module that projects to q, k and v, the one that reads the attention output, and the norm of q and
    k."""
    if isinstance(block, SequentialBlock):
        return block.img_attn.qkv, block.img_attn.proj, block.img_attn.norm
    assert isinstance(block, ParallelBlock)
    return block.linear1, block.linear2, block.norm


def _own_qkv(layer: LayerSpec, projected: Tensor, norm: QKNorm, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v (B N, T, heads, D) of the chunk's tokens, normalized and rotated."""
    counts = (layer.heads, layer.kv_heads, layer.kv_heads)
    chunks, tokens, _ = projected.shape
    used = projected[..., : sum(counts) * layer.head_dim].reshape(chunks, tokens, sum(counts), layer.head_dim)
    q, k, v = torch.split(used, list(counts), dim=2)
    q, k = norm.query_norm(q), norm.key_norm(k)
    return (rotary(q), rotary(k), v) if rotary is not None else (q, k, v)


def _one_softmax(layer: LayerSpec, own: tuple[Tensor, Tensor, Tensor], kv: LayerKV, prefix: PrefixKV) -> Tensor:
    """Return the attention output (B N, T, H D) over [prefix | own], with each prefix repeated for its draws."""
    q, own_k, own_v = own
    k, v = (
        torch.cat([cached.repeat_interleave(_DRAWS, dim=0), own_part], dim=1).repeat_interleave(
            layer.heads // layer.kv_heads, dim=2
        )
        for cached, own_part in ((kv.k, own_k), (kv.v, own_v))
    )
    seen = torch.ones(len(q), 1, 1, k.shape[1], dtype=torch.bool)
    if layer.holds_text and prefix.valid is not None:
        seen[:, 0, 0, : layer.tokens] = prefix.valid.repeat_interleave(_DRAWS, dim=0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.transpose(1, 2).flatten(2)


def graph_equals_encode(subject: Subject) -> None:
    """`prefix_graph`, if the editor has one, equals `encode` in float32 on the CPU"""
    subject = subject.on_cpu_in_float32()
    editor = subject.load()
    try:
        graph = editor.prefix_graph()
    except ExportError as error:
        raise NotApplicable(f"a graph cannot express these settings: {error.message}") from None
    if graph is None:
        raise NotApplicable("it has no graph: exports of its policies need the live editor")
    pictures, instructions = subject.pictures(2), (SHORT, LONG)
    outputs = _run_graph(graph, pictures, instructions)
    encoded = _tensors(editor.encode(pictures, instructions), editor)
    names = ["valid"] if editor.spec.valid_tokens else []
    names += [f"layer.{i}.{part}" for i in range(len(editor.spec.layers)) for part in "kv"]
    fix = "the module returns ([valid,] k_0, v_0, ...), padding zeroed; see `imagewam_cli.editors.contract.PrefixGraph`"
    require(len(outputs) == len(names), f"the graph returns {len(outputs)} tensors, not {len(names)}", fix)
    given = dict(zip(names, (output.float() for output in outputs), strict=True))
    expected = {name: encoded[name].float() for name in names}
    require_equal(given, expected, "the graph, compared with `encode`", fix, rounding=True)


def _run_graph(
    graph: PrefixGraph, pictures: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]
) -> tuple[Tensor, ...]:
    try:
        from imagewam_cli.runtime import onnx_policy
    except ImportError as error:
        raise NotApplicable(f"it needs {error.name}: {install_hint('onnx')}") from None
    inputs = onnx_policy.PrefixGraph(prefix_inputs(graph), graph.tokenizer, graph=None)
    ids, valid = inputs.tokens(instructions)
    image = np.stack([inputs.picture(row) for row in pictures])
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = graph.module(*(torch.from_numpy(x) for x in (image, ids, valid)))
    return outputs
