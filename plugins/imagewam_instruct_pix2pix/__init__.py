"""InstructPix2Pix as an imagewam editor. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="instruct-pix2pix",
            summary="InstructPix2Pix, on Stable Diffusion 1.5",
            load="imagewam_instruct_pix2pix.editor:InstructPix2PixEditor.load",
            family="StableDiffusionInstructPix2PixPipeline",
            parameters=859_532_484,
            modes=("denoise",),
            repo="timbrooks/instruct-pix2pix",
            license="MIT",
            components=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        )
    ]
