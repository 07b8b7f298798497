"""Format `onnx`: a folder that onnxruntime runs without torch.

loop.onnx       noise, state, prefix -> normalized action chunk, all Euler steps
step.onnx       noisy actions, t, state, prefix -> velocity, for custom samplers
prefix.onnx     picture, token ids -> keys and values; only if the editor can be traced
tokenizer.json  the editor's tokenizer; only with prefix.onnx
*.onnx.data     weights of more than 2 GB, which do not fit into an .onnx file; step and loop share one
noise.npy       initial noise of the loop, float32 (T, A), the same at every replan
onnx.json       everything else: names, sizes, normalizers, prompt, picture, editor, measured errors, checksums
editor.json     the editor, its weights and settings
policy.py       the modules of `imagewam_cli.runtime` in one file, which runs the export
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imagewam_cli.config import dump_json
from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.editors.contract import PrefixGraph
from imagewam_cli.errors import ExportError, install_hint
from imagewam_cli.export import TOLERANCE, ExportReport
from imagewam_cli.files import atomic_folder, file_sizes, write_atomically
from imagewam_cli.policy.bundle import EDITOR, find_bundle
from imagewam_cli.policy.policy import Policy
from imagewam_cli.runtime.export_folder import DESCRIPTION, with_checksums

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "tokenizers")

FILES = {"loop": "loop.onnx", "step": "step.onnx", "noise": "noise.npy"}
PREFIX_FILES = {"prefix": "prefix.onnx", "tokenizer": "tokenizer.json"}
WEIGHT_FILES = {"weights": "loop.onnx.data", "prefix_weights": "prefix.onnx.data"}
"""Roles and names of the files. Those of the weights exist only if a graph is too large for one file."""
RUNTIME = "policy.py"


class OnnxExporter:
    """An `imagewam_cli.export.Exporter` to ONNX."""

    def export(self, policy: Path, out: Path, *, weights: Path | None = None) -> ExportReport:
        """Export as described in `imagewam_cli.export.Exporter.export`."""
        _require_packages()
        from imagewam_cli.export.check import measure

        source = find_bundle(policy)
        observations = Samples.load(source / SAMPLES).observations
        with atomic_folder(out) as folder:
            live = Policy.load(source, weights=weights)
            _require_expressible(live)
            prefix, notes = _write_prefix(live, folder)
            description = _write(live, prefix, folder)
            shutil.copyfile(source / EDITOR, folder / EDITOR)
            errors = measure(folder, live, observations)
            for check, error in errors.items():
                if not error <= TOLERANCE:  # also fails for NaN
                    raise ExportError(
                        f"onnx: {check} differs from torch by {error:.1e}, more than {TOLERANCE:.0e}",
                        "nothing was written; please report this bug of the export or of onnxruntime",
                    )
            names = [*description["files"].values(), EDITOR]
            measured = description | {"samples": len(observations), "errors": errors}
            _write_description(folder, with_checksums(measured, folder, names))
            written = file_sizes(folder)
        return ExportReport(folder=out, files=written, errors=errors, notes=notes)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"the ONNX export needs {', '.join(missing)}", install_hint("onnx"))


def _require_expressible(policy: Policy) -> None:
    """Refuse policies that the graphs and the torch-free runtime cannot express, such as imported policies."""
    transforms = policy.parts.action_transforms
    reasons = {
        "its state is a token of the editor's text": policy.parts.config.proprio is not None,
        f"it transforms its actions ({', '.join(t.kind for t in transforms)})": bool(transforms),
        f"it computes in {policy.expert.dtype}": policy.expert.dtype.itemsize < 4,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ExportError(f"the policy cannot be expressed as ONNX: {reason}", "use --format bundle")


def _write_prefix(policy: Policy, folder: Path) -> tuple[PrefixGraph | None, tuple[str, ...]]:
    """Write `prefix.onnx` and `tokenizer.json`. If that is impossible, return None and a note with the reason."""
    from imagewam_cli.export.graphs import trace, traced_prefix

    try:
        graph = policy.editor.prefix_graph()
        if graph is None:
            raise ExportError("the editor has no traceable prefix")
        if policy.editor.settings.quantization != "none":
            raise ExportError("the editor's weights are quantized")
        traced = traced_prefix(graph, policy.expert.config.layers)
    except ExportError as error:
        name = policy.parts.editor.name
        return None, (f"no prefix.onnx: the editor {name!r} must run in torch alongside the graphs; {error.message}",)
    model = trace(traced, PREFIX_FILES["prefix"], folder / WEIGHT_FILES["prefix_weights"])
    _save(model, folder / PREFIX_FILES["prefix"])
    (folder / PREFIX_FILES["tokenizer"]).write_text(graph.tokenizer, encoding="utf-8")
    return graph, ()


def _write(policy: Policy, prefix: PrefixGraph | None, folder: Path) -> dict[str, Any]:
    """Write the other files; return the content of `onnx.json`, which has no measured errors yet."""
    from imagewam_cli.expert.flow import FlowSchedule
    from imagewam_cli.export.description import describe
    from imagewam_cli.export.graphs import OPSET, min_onnxruntime, step_graph, trace
    from imagewam_cli.export.runtime_script import runtime_script
    from imagewam_cli.export.unroll import unroll

    config = policy.parts.config
    levels = FlowSchedule(shift=config.shift).grid(config.inference_steps).tolist()
    step = trace(step_graph(policy.expert), FILES["step"], folder / WEIGHT_FILES["weights"])
    _save(step, folder / FILES["step"])
    _save(unroll(step, levels), folder / FILES["loop"])
    np.save(folder / FILES["noise"], policy.initial_noise(1)[0].numpy(), allow_pickle=False)
    files = FILES if prefix is None else FILES | PREFIX_FILES
    files |= {role: name for role, name in WEIGHT_FILES.items() if (folder / name).exists()}
    oldest = max(min_onnxruntime(_header(folder / name)) for name in files.values() if name.endswith(".onnx"))
    description = describe(policy.parts, prefix, files=files, opset=OPSET, min_onnxruntime=oldest, levels=levels)
    _write_description(folder, description)
    (folder / RUNTIME).write_text(runtime_script(), encoding="utf-8")
    return description


def _header(path: Path) -> ModelProto:
    import onnx

    return onnx.load(path, load_external_data=False)


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    write_atomically(folder / DESCRIPTION, dump_json(description).encode())


def _save(model: ModelProto, path: Path) -> None:
    write_atomically(path, model.SerializeToString())
