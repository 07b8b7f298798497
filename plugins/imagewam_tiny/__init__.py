"""`tiny`: the embedded editor, a trained miniature of FLUX.2-klein for 128-pixel tabletop pictures.

Its folder `weights/` is an ordinary diffusers pipeline, loaded by the same class as FLUX.2-klein. How it was made:
`train`.
"""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="tiny",
            summary="embedded miniature of FLUX.2-klein, trained on tabletop edits",
            load="imagewam_tiny.editor:TinyEditor",
            family="Flux2KleinPipeline",
            components={"transformer": 4_190_720, "vae": 854_508, "text_encoder": 499_776, "tokenizer": 0},
            license="Apache-2.0",
            gated=False,
            gated_source="it comes with the plugin",
        )
    ]
