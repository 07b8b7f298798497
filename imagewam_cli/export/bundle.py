"""Format `bundle`: the policy folder itself, copied whole and loaded again to see that it plans the same chunks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.errors import ExportError
from imagewam_cli.expert import checkpoint
from imagewam_cli.export import ExportReport
from imagewam_cli.files import atomic_folder, file_sizes
from imagewam_cli.policy.bundle import EDITOR, NORMALIZATION, POLICY, PROPRIO, TUNED, find_bundle
from imagewam_cli.policy.policy import Policy

FILES = (POLICY, checkpoint.CONFIG, checkpoint.WEIGHTS, NORMALIZATION, EDITOR, SAMPLES)
"""What a policy folder consists of, with the parts of the editor in `TUNED`; whatever else lies there stays behind."""
SOMETIMES = (PROPRIO,)


class BundleExporter:
    """An `imagewam_cli.export.Exporter`. Weights of the editor that are not the policy's own are not copied: the bundle
    names them."""

    def export(self, policy: Path, out: Path, *, weights: Path | None = None) -> ExportReport:
        """See `imagewam_cli.export.Exporter.export`. The copy must give equal chunks, to the last bit."""
        source = find_bundle(policy)
        observations = Samples.load(source / SAMPLES).observations
        with atomic_folder(out) as folder:
            original = Policy.load(source, weights=weights).chunks(observations)
            for name in (*FILES, *(name for name in SOMETIMES if (source / name).exists())):
                shutil.copyfile(source / name, folder / name)
            if (source / TUNED).is_dir():
                shutil.copytree(source / TUNED, folder / TUNED)
            error = float(np.abs(Policy.load(folder, weights=weights).chunks(observations) - original).max())
            if not error == 0.0:
                raise ExportError(
                    f"the copied policy plans other chunks than {source}: they differ by {error:.1e}",
                    "was the policy written to meanwhile? export it again",
                )
            written = file_sizes(folder)
        return ExportReport(folder=out, files=written, errors={"chunk": error})
