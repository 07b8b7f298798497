"""`--layers auto:K`: choose the K layers that best predict the actions, or reuse the layers of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewam_cli.cli.output import output

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset
    from imagewam_cli.editors.contract import Editor
    from imagewam_cli.kvcache.format.manifest import Manifest
    from imagewam_cli.kvcache.storage.location import Location

_AUTO = "auto:"


def auto_count(choice: str) -> int | None:
    """Return the K of "auto:K"; None for any other choice.

    Raises:
        UsageError: K is not a positive integer.
    """
    from imagewam_cli.errors import UsageError

    if not choice.startswith(_AUTO):
        return None
    count = choice.removeprefix(_AUTO)
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise UsageError(f"--layers {choice}: auto needs the number of layers to keep", "for example --layers auto:4")
    return int(count)


def recorded_layers(address: Location, manifest: Manifest, count: int) -> str:
    """Return the layers recorded in the cache that a build resumes, so that `auto:K` does not measure again.

    Raises:
        CacheError: the cache has a different number of layers.
    """
    from imagewam_cli.errors import CacheError

    there, layers = len(manifest.spec.layers), manifest.settings.layers
    if there != count:
        raise CacheError(
            f"{address} has {there} layers (--layers {layers}), but --layers {_AUTO}{count} asks for {count}",
            f"resume it with --layers auto:{there}, or choose another folder with --out",
        )
    output.say(f"--layers {_AUTO}{count}: {layers}, the layers of the cache")
    return layers


def measured_layers(editor: Editor, dataset: Dataset, count: int) -> str:
    """Find the best layers by measurement; return them as a value of --layers. editor: loaded with all layers.

    Raises:
        UsageError: the editor has fewer layers, or the dataset is too small to measure on.
    """
    from imagewam_cli.cache_study.layer_selection import measure_layers, sample_rows

    with output.progress(sample_rows(dataset), "row") as bar:
        found = measure_layers(editor, dataset, count, on_rows=bar.update)
    layers = ",".join(str(i) for i in found.kept)
    output.say(
        f"--layers {_AUTO}{count}: {layers} (error of a linear predictor {found.errors[-1]:.3f}, "
        f"{found.errors[0]:.3f} with all {len(editor.spec.layers)})"
    )
    return layers
