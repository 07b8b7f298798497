"""Format `bundle`: a copy of the policy folder, loaded again to check that it plans the same chunks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.errors import ExportError
from imagewam_cli.expert import checkpoint
from imagewam_cli.export import ExportReport
from imagewam_cli.files import atomic_folder, file_sizes
from imagewam_cli.policy.bundle import EDITOR, NORMALIZATION, POLICY, PROPRIO, TRAINING, TUNED, find_bundle
from imagewam_cli.policy.policy import Policy

FILES = (POLICY, checkpoint.CONFIG, checkpoint.WEIGHTS, NORMALIZATION, EDITOR, SAMPLES)
"""Files of every policy folder. Other files, except the optional ones and the folder `TUNED`, are not copied."""
OPTIONAL_FILES = (PROPRIO, TRAINING)


class BundleExporter:
    """An `imagewam_cli.export.Exporter` of policy folders.

    Copies only the fine-tuned editor weights; the bundle refers to the others by name.
    """

    def export(self, policy: Path, out: Path, *, weights: Path | None = None) -> ExportReport:
        """Export as described in `imagewam_cli.export.Exporter.export`. The copy must plan bit-identical chunks."""
        source = find_bundle(policy)
        observations = Samples.load(source / SAMPLES).observations
        with atomic_folder(out) as folder:
            original = Policy.load(source, weights=weights).chunks(observations)
            for name in (*FILES, *(name for name in OPTIONAL_FILES if (source / name).exists())):
                shutil.copyfile(source / name, folder / name)
            if (source / TUNED).is_dir():
                shutil.copytree(source / TUNED, folder / TUNED)
            error = float(np.abs(Policy.load(folder, weights=weights).chunks(observations) - original).max())
            if not error == 0.0:
                raise ExportError(
                    f"the copy plans different chunks from {source}: they differ by {error:.1e}",
                    "export again; the policy may have changed during the export",
                )
            written = file_sizes(folder)
        return ExportReport(folder=out, files=written, errors={"chunk": error})
