"""`imagewam info`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagewam_cli.cli.dataset_info import dataset_text, dataset_values
from imagewam_cli.cli.dataset_options import DatasetOptions, takes_dataset_options
from imagewam_cli.cli.options import FormatName, FormatOption
from imagewam_cli.cli.output import bytes_text, output
from imagewam_cli.cli.policy_info import describe_bundle, describe_export, describe_run_policy
from imagewam_cli.kvcache.storage.location import Location, location

if TYPE_CHECKING:
    from imagewam_cli.data.types import KeyMap
    from imagewam_cli.kvcache.format.manifest import BuildPart, Manifest

_JSON_ONLY = ("fingerprint", "sha256", "policy")
"""Keys of policies and runs that are printed only as JSON."""

_SENTENCES = 5
"""Number of sentences of a cache that are printed; --format json prints all."""


@takes_dataset_options(only_with="a dataset")
def info_command(
    *,
    path: Annotated[
        str,
        typer.Argument(metavar="FOLDER|URL", help="A dataset, cache, run, policy or export, or the URL of a cache."),
    ],
    reading: DatasetOptions,
    format: FormatOption = FormatName.human,
) -> None:
    """Describe a dataset, cache, run, policy or export.

    For a cache, also reports whether it is complete and whether a file has the wrong size or a broken header;
    `imagewam cache verify` reads every byte.

    Examples:
        imagewam info caches/tiny-tabletop
    """
    from imagewam_cli.workspace import DATASET_MARKER, marker_of

    address = location(path)
    if isinstance(address, Path) and marker_of(address) == DATASET_MARKER:
        values = dataset_values(address, reading)
        output.result(values, dataset_text(values), format.value)
        return
    reading.require_unused("a dataset")
    values = _cache(address) if isinstance(address, str) else describe(address)
    hidden = () if values["kind"] == "cache" else _JSON_ONLY
    text = "\n".join(f"{key}: {_text(key, value)}" for key, value in _shortened(values).items() if key not in hidden)
    output.result(values, text, format.value)


def describe(path: Path) -> dict[str, Any]:
    """Describe the content of a folder as JSON values.

    Raises:
        UsageError: the folder does not exist, or imagewam did not create it.
    """
    from imagewam_cli.errors import UsageError
    from imagewam_cli.workspace import (
        CACHE_MARKER,
        DATASET_MARKER,
        ONNX_MARKER,
        PART_MARKER,
        POLICY_MARKER,
        RUN_MARKER,
        marker_of,
    )

    describe_functions: dict[str, Callable[[Path], dict[str, Any]]] = {
        DATASET_MARKER: _dataset,
        CACHE_MARKER: _cache,
        PART_MARKER: _cache,
        RUN_MARKER: _run,
        ONNX_MARKER: describe_export,
        POLICY_MARKER: describe_bundle,
    }
    marker = marker_of(path)
    if marker is not None:
        return describe_functions[marker](path)
    if not path.exists():
        raise UsageError(f"{path} does not exist", "`imagewam list` shows what exists")
    raise UsageError(f"{path} is not a dataset, cache, run, policy or export", "`imagewam list` shows what exists")


def _dataset(path: Path) -> dict[str, Any]:
    return dataset_values(path, DatasetOptions())


def _cache(address: Location) -> dict[str, Any]:
    from imagewam_cli.kvcache.building.verify import verify_cache
    from imagewam_cli.kvcache.format.manifest import MANIFEST, BuildPart
    from imagewam_cli.kvcache.storage.manifests import manifest_at, manifests_at, storage_at

    storage = storage_at(address)
    manifest, damages = manifest_at(storage), verify_cache(address, rows=False)
    listings = dict(manifests_at(storage))
    merged = listings.pop(MANIFEST, None) is not None
    parts = {BuildPart.named(name): part.rows for name, part in listings.items()}
    spec = manifest.spec
    return {
        "kind": "cache",
        "editor": manifest.fingerprint.get("editor"),
        "dataset": manifest.dataset.path,
        "keys": _keys(manifest.dataset.keys),
        "episodes": manifest.dataset.selected or f"all {manifest.dataset.episodes}",
        "sentences": list(manifest.instructions),
        "rows": manifest.rows,
        "of": manifest.total_rows,
        "complete": manifest.complete,
        "parts": {f"{part.index}/{part.count}": rows for part, rows in parts.items()},
        "damage": [f"{damage.file}: {damage.what}" for damage in damages],
        "next": _advice(address, manifest, list(parts), merged=merged, damaged=bool(damages)),
        "bytes": sum(entry.bytes for entry in manifest.entries),
        "shards": len(manifest.shards),
        "codec": manifest.codec,
        "mode": spec.mode,
        "timestep": spec.timestep,
        "text_padding": spec.text_padding,
        "segments": list(dict.fromkeys(s.name for layer in spec.layers for s in layer.segments)),
        "layers": [f"{layer.name} {layer.heads}x{layer.head_dim}, {layer.tokens} tokens" for layer in spec.layers],
        "fingerprint": manifest.digest,
    }


def _keys(keys: KeyMap) -> dict[str, str]:
    """Return the features that were read, as the options name them."""
    return {"state": keys.state, "action": keys.action, "instruction": keys.instruction or "the task of each frame"}


def _advice(
    address: Location, manifest: Manifest, parts: Sequence[BuildPart], *, merged: bool, damaged: bool
) -> list[str]:
    """Return the next steps for a damaged, unfinished or unmerged cache. merged: some parts were merged before."""
    from imagewam_cli.kvcache.format.manifest import repair_hint

    advice = [repair_hint(address)] if damaged else []
    counts = {part.count for part in parts}
    known = len(counts) == 1 and not merged
    every = {f"{i}/{count}" for count in counts for i in range(count)} if known else set()
    absent = sorted(every - {f"{part.index}/{part.count}" for part in parts})
    if not manifest.complete:
        missing = f"{manifest.total_rows - manifest.rows} rows are missing: "
        begun = f"not started: part {', '.join(absent)}; " if absent else ""
        advice.append(f"{missing}{begun}run the same `imagewam cache` command again to resume")
    return advice + ([f"`imagewam cache merge {address}` joins the parts"] if parts else [])


def _run(path: Path) -> dict[str, Any]:
    import json

    from imagewam_cli.training.metrics import read_metrics

    metrics = read_metrics(path / "metrics.jsonl")
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    result = json.loads((path / "result.json").read_text(encoding="utf-8")) if (path / "result.json").exists() else None
    last = metrics[-1]["step"] if metrics else 0
    return {"kind": "run", **run, "last_step": last, **describe_run_policy(path), "result": result}


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with a list of many sentences cut for people."""
    sentences = values.get("sentences", [])
    if len(sentences) <= _SENTENCES:
        return values
    return values | {"sentences": [*sentences[:_SENTENCES], f"... ({len(sentences)} in all)"]}


def _text(key: str, value: Any) -> str:
    if key == "files":
        value = {name: bytes_text(size) for name, size in value.items()}
    if isinstance(value, list):
        return ", ".join(str(v) for v in value) or "none"
    return (", ".join(f"{k} {v}" for k, v in value.items()) or "none") if isinstance(value, dict) else str(value)
