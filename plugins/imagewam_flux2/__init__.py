"""FLUX.2-klein as an imagewam editor. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl

_FAMILY = "Flux2KleinPipeline"
_LOAD = "imagewam_flux2.editor:Flux2Editor.load"


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name=f"flux2-klein-{size}",
            summary=f"FLUX.2 [klein] {size.removeprefix('base-').upper()}, {kind}",
            load=_LOAD,
            family=_FAMILY,
            parameters=parameters,
            repo=f"black-forest-labs/FLUX.2-klein-{size.replace('4b', '4B').replace('9b', '9B')}",
            license=license_,
            components=("transformer", "vae", "text_encoder", "tokenizer"),
        )
        for size, kind, parameters, license_ in (
            ("4b", "step-distilled", 3_876_000_000, "Apache-2.0"),
            ("9b", "step-distilled", 9_079_000_000, "FLUX non-commercial"),
            ("base-4b", "undistilled", 3_876_000_000, "Apache-2.0"),
            ("base-9b", "undistilled", 9_079_000_000, "FLUX non-commercial"),
        )
    ]
