"""FLUX.2-klein as an imagewam editor. See `editor` for the code; this module only says what there is."""

from __future__ import annotations

from imagewam_cli.hookspecs import EditorEntry, hookimpl

_SIZES = {
    "4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
}
_COMPONENTS = {
    "4b": {"transformer": 3_875_544_576, "vae": 84_046_115, "text_encoder": 4_022_468_096, "tokenizer": 0},
    "9b": {"transformer": 9_078_581_248, "vae": 84_046_115, "text_encoder": 8_190_735_360, "tokenizer": 0},
}
_LICENSES = {"4b": "Apache-2.0", "9b": "FLUX non-commercial"}
_GATED = {"4b": None, "9b": True}  # of 4b public sources say both


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name=f"flux2-klein-{line}{size}",
            summary=f"FLUX.2 [klein] {size.upper()}, {kind}",
            load="imagewam_flux2.editor:Flux2Editor",
            family="Flux2KleinPipeline",
            components=_COMPONENTS[size],
            config={**_SIZES[size], "guidance_embeds": False},
            modes=("prefix", "denoise"),
            repo=f"black-forest-labs/FLUX.2-klein-{line}{size.upper()}",
            license=_LICENSES[size],
            gated=_GATED[size],
            gated_source="github.com/utensils/mold/pull/123" if _GATED[size] else "",
        )
        for line, kind in (("", "step-distilled"), ("base-", "undistilled"))
        for size in ("4b", "9b")
    ]
