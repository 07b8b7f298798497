"""`--layers auto:K`: the K layers that tell most of the actions, measured, or those that a cache already has."""

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
    """K of `auto:K`; None: another choice.

    Raises:
        UsageError: not a number from 1.
    """
    from imagewam_cli.errors import UsageError

    if not choice.startswith(_AUTO):
        return None
    count = choice.removeprefix(_AUTO)
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise UsageError(f"--layers {choice}: auto needs a number of layers", "as --layers auto:4")
    return int(count)


def recorded_layers(place: Location, manifest: Manifest, count: int) -> str:
    """What the cache has in place of `auto:K`: a build that goes on does not measure again, and cannot choose others.

    Raises:
        CacheError: it has another number of layers.
    """
    from imagewam_cli.errors import CacheError

    there, layers = len(manifest.spec.layers), manifest.settings.layers
    if there != count:
        raise CacheError(
            f"{place} is a cache of {there} layers (--layers {layers}), this build would choose {count}",
            f"ask for --layers auto:{there} to go on with it, or choose another folder with --out",
        )
    output.say(f"--layers {_AUTO}{count}: {layers}, as the cache has them")
    return layers


def measured_layers(editor: Editor, dataset: Dataset, count: int) -> str:
    """As a list for --layers, said aloud. editor: with all of its layers.

    Raises:
        UsageError: there are not so many, or the dataset is too small to measure on.
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
