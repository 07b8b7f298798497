"""Built-in entries, added through the same hooks as a plugin's."""

from __future__ import annotations

from imagewam_cli.hookspecs import CodecEntry, DatasetFormatEntry, EnvironmentEntry, ExporterEntry, hookimpl

_CODECS = "imagewam_cli.kvcache.codecs"


@hookimpl
def imagewam_environments() -> list[EnvironmentEntry]:
    return [
        EnvironmentEntry(
            name="tabletop",
            summary="blocks, zones and a gripper, seen from above; needs no OpenGL",
            load="imagewam_cli.sim.tabletop.env:TabletopEnvironment",
            requires="imagewam[sim]",
        )
    ]


@hookimpl
def imagewam_dataset_formats() -> list[DatasetFormatEntry]:
    return [
        DatasetFormatEntry(
            name="lerobot",
            summary="LeRobot v2.0, v2.1 and v3.0 (parquet with MP4 or images)",
            load="imagewam_cli.data.formats:LeRobotFormat",
        )
    ]


@hookimpl
def imagewam_exporters() -> list[ExporterEntry]:
    return [
        ExporterEntry(
            name="bundle",
            summary="one folder with weights, config, statistics and editor, for `Policy.load`",
            load="imagewam_cli.export.bundle:BundleExporter",
        ),
        ExporterEntry(
            name="onnx",
            summary="ONNX graphs for onnxruntime: the Euler loop, a single step, and the prefix where it can be traced",
            load="imagewam_cli.export.onnx:OnnxExporter",
        ),
    ]


@hookimpl
def imagewam_codecs() -> list[CodecEntry]:
    return [
        CodecEntry(name="fp32", summary="4 bytes per number, lossless", load=f"{_CODECS}.cast:FLOAT32"),
        CodecEntry(name="bf16", summary="2 bytes per number, 8 bits of mantissa", load=f"{_CODECS}.cast:BFLOAT16"),
        CodecEntry(name="fp16", summary="2 bytes per number, 11 bits of mantissa", load=f"{_CODECS}.cast:FLOAT16"),
        CodecEntry(
            name="fp8", summary="1 byte per number (e4m3), one scale per row and head", load=f"{_CODECS}.float8:FLOAT8"
        ),
        CodecEntry(
            name="int8",
            summary="1 byte per number, in groups of 64: keys by channel, values by token",
            load=f"{_CODECS}.integer:INT8",
        ),
        CodecEntry(name="int4", summary="half a byte per number, grouped like int8", load=f"{_CODECS}.integer:INT4"),
        CodecEntry(
            name="pca2",
            summary="an eighth of the size of bf16: principal axes of the dataset's rows",
            load=f"{_CODECS}.pca:PCA2",
        ),
        CodecEntry(
            name="pca1", summary="a sixteenth of the size of bf16, otherwise like pca2", load=f"{_CODECS}.pca:PCA1"
        ),
        CodecEntry(
            name="pca0.5",
            summary="a thirty-second of the size of bf16, otherwise like pca2",
            load=f"{_CODECS}.pca:PCA_HALF",
        ),
    ]
