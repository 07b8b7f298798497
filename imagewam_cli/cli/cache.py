"""`imagewam cache`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from imagewam_cli.cli.options import (
    CompileOption,
    DeviceOption,
    FormatName,
    FormatOption,
    OffloadOption,
    WeightsOption,
    chosen_hardware,
    existing_dataset,
    listed,
    require_at_least_one,
    require_positive,
    size_of,
)
from imagewam_cli.cli.output import bytes_text, output, seconds_text


def cache_command(
    editor: Annotated[str, typer.Option("--editor", help="Which editor; see `imagewam editors`.")] = "tiny",
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="A LeRobot dataset; without it, embedded demonstrations are recorded."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the cache; by default caches/EDITOR-DATASET.")
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="prefix or denoise; by default the editor's.")] = None,
    timestep: Annotated[float | None, typer.Option("--timestep", help="In [0, 1]; by default the editor's.")] = None,
    layers: Annotated[str, typer.Option("--layers", help="all, every:N, or a list like 0,4,9.")] = "all",
    segments: Annotated[
        str | None, typer.Option("--segments", help="Kinds of tokens to keep: text,reference,target.")
    ] = None,
    text_padding: Annotated[
        str | None, typer.Option("--text-padding", help="trim or keep; by default the editor's.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="How numbers are stored: float32, bfloat16, float16.")
    ] = "bfloat16",
    compute_dtype: Annotated[
        str | None,
        typer.Option("--compute-dtype", help="How the editor computes: float32, bfloat16, float16."),
    ] = None,
    quantization: Annotated[
        str, typer.Option("--quantization", help="The editor's weights in fewer bits: none, int8, nf4.")
    ] = "none",
    stride: Annotated[int, typer.Option("--stride", help="Keep every N-th frame.")] = 1,
    camera: Annotated[
        list[str] | None, typer.Option("--camera", help="Cameras to use, in order; by default all.")
    ] = None,
    image_size: Annotated[str | None, typer.Option("--image-size", help="HEIGHTxWIDTH that the editor sees.")] = None,
    camera_layout: Annotated[
        str | None, typer.Option("--camera-layout", help="tile, separate or head-over-wrists; by default the editor's.")
    ] = None,
    state_key: Annotated[
        str, typer.Option("--state-key", help="The dataset's name for the state.")
    ] = "observation.state",
    action_key: Annotated[str, typer.Option("--action-key", help="The dataset's name for the action.")] = "action",
    batch: Annotated[int, typer.Option("--batch", help="Rows per forward pass.")] = 16,
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="About how large a shard becomes.")] = 256.0,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="Ablation: the editor sees a grey picture.")
    ] = False,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Ablation: an untrained editor.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print bytes and time, write nothing.")] = False,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    compile: CompileOption = False,
    format: FormatOption = FormatName.human,
) -> None:
    """Precompute an editor's prefix keys and values over a dataset.

    The same command continues an interrupted build.

    Example: imagewam cache --editor tiny --dataset datasets/tabletop --out caches/tiny-tabletop
    """
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.data.types import KeyMap
    from imagewam_cli.editor import TYPICAL_TEXT, PrefixSettings
    from imagewam_cli.errors import EditorError, UsageError
    from imagewam_cli.kvcache.build import BuildSettings, build_cache, instructions_of, plan_build
    from imagewam_cli.registry import Registry

    require_at_least_one(stride=stride, batch=batch)
    require_positive(shard_mb=shard_mb)
    registry = Registry.installed()
    kind, codec, entry = registry.editors.load(editor), registry.codecs.load(dtype), registry.editors.get(editor)
    hardware, build = (
        chosen_hardware(device, offload, compile),
        BuildSettings(stride=stride, batch=batch, shard_mb=shard_mb),
    )
    if dataset is None:
        if plan:
            raise UsageError("--plan needs --dataset", "demonstrations are recorded for a build alone")
        kind.require_weights(entry, weights)  # before demonstrations are recorded for nothing
        dataset = _demonstrations()
    rows = open_dataset(
        existing_dataset(dataset), KeyMap(state=state_key, action=action_key, cameras=tuple(camera or ()))
    )
    settings = _settings(
        PrefixSettings,
        mode=mode,
        timestep=timestep,
        layers=layers,
        segments=listed(segments),
        text_padding=text_padding,
        image_size=size_of(image_size),
        camera_layout=camera_layout,
        compute_dtype=compute_dtype,
        quantization=quantization,
        cameras=tuple(rows.info.cameras),
        blank_images=blank_images,
        random_weights=random_weights,
    )
    try:
        kind.require_weights(entry, weights)
    except EditorError as error:
        described = kind.describe(entry, settings) if plan else None
        if described is None:
            raise
        output.say(
            f"{error.message}: without them the time is not known, and trimmed text counts as {TYPICAL_TEXT} tokens"
        )
        _print_plan(plan_build(rows, described, codec, build), None, format)
        return
    loaded = kind.load(entry, settings, instructions=instructions_of(rows), weights=weights, hardware=hardware)
    planned = plan_build(rows, loaded.spec, codec, build)
    if plan:
        _print_plan(planned, _seconds_per_row(loaded, rows, batch), format)
        return
    folder = out if out is not None else _default_folder(editor, dataset)
    output.say(
        f"{folder}: {planned.rows} rows, {bytes_text(planned.bytes_per_row)} each, "
        f"{bytes_text(planned.total_bytes)} in all"
    )
    with output.progress(planned.rows, "row") as bar:
        bar.set_postfix_str(f"{bytes_text(planned.bytes_per_row)}/row", refresh=False)
        manifest = build_cache(rows, loaded, folder, codec, build, on_rows=bar.update)
    values = {
        "cache": str(folder),
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": sum(s.bytes for s in manifest.shards),
        "fingerprint": manifest.digest,
    }
    output.result(values, f"{folder}: {manifest.rows} rows in {len(manifest.shards)} shards", format.value)


def _demonstrations() -> Path:
    """The embedded demonstrations, recorded when first needed."""
    from imagewam_cli.cli.record import record_demonstrations
    from imagewam_cli.workspace import DEMONSTRATIONS

    if not (DEMONSTRATIONS / "meta" / "info.json").exists():
        output.say(f"no --dataset: recording 200 tabletop demonstrations into {DEMONSTRATIONS}")
        record_demonstrations(DEMONSTRATIONS, "tabletop", 200, 0, "h264")
    else:
        output.say(f"no --dataset: using {DEMONSTRATIONS}")
    return DEMONSTRATIONS


def _default_folder(editor: str, dataset: Path) -> Path:
    from imagewam_cli.workspace import CACHES

    return CACHES / f"{editor}-{dataset.resolve().name}"


def _settings(into: Any, **values: Any) -> Any:
    from imagewam_cli.config import from_dict

    return from_dict(
        into, {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}, source="command line"
    )


def _seconds_per_row(editor: Any, dataset: Any, batch: int) -> float:
    """Measured on a few batches of the first episode, until they are in main memory, as a build needs them: a device
    that computes on its own has then finished."""
    from itertools import islice

    rows = list(islice(dataset.rows(episodes=[dataset.episodes()[0].index]), batch))
    images, instructions = [r.images for r in rows], [r.instruction for r in rows]
    editor.encode(images, instructions).to("cpu")
    started = time.monotonic()
    for _ in range(2):
        editor.encode(images, instructions).to("cpu")
    return (time.monotonic() - started) / (2 * len(rows))


def _print_plan(plan: Any, per_row: float | None, format: FormatName) -> None:
    values = {
        "rows": plan.rows,
        "shards": len(plan.shards),
        "bytes_per_row": plan.bytes_per_row,
        "total_bytes": plan.total_bytes,
        "seconds_per_row": per_row,
        "seconds": None if per_row is None else per_row * plan.rows,
    }
    text = (
        f"{plan.rows} rows in {len(plan.shards)} shards\n"
        f"{bytes_text(plan.bytes_per_row)} per row, {bytes_text(plan.total_bytes)} in all"
    )
    if per_row is not None:
        text += f"\n{1000 * per_row:.1f} ms per row on this machine, about {seconds_text(per_row * plan.rows)}"
    output.result(values, text, format.value)
