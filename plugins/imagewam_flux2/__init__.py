"""Entries of the FLUX.2-klein editors. The code is in `editor`."""

from __future__ import annotations

from imagewam_cli.plugin import Component, EditorDefaults, EditorEntry, ModeDefaults, hookimpl

_SIZES = {
    "4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
}
_PARAMETERS = {"4b": (3_875_544_576, 4_022_468_096), "9b": (9_078_581_248, 8_190_735_360)}
"""Numbers of parameters of the transformer and the text encoder."""
PIXELS_PER_TOKEN = 16
DEFAULTS = EditorDefaults(
    modes={
        "prefix": ModeDefaults(timestep=0.0, segments=("text", "reference")),
        "denoise": ModeDefaults(timestep=1.0, segments=("text", "target", "reference")),
    },
    camera_size=(512, 512),
    size_multiple=PIXELS_PER_TOKEN,
    max_text_tokens=512,
    camera_layouts=("tile", "separate", "head-over-wrists"),
    roundings=("exact", "published-bf16"),
)
"""Defaults of FLUX.2-klein; `editor` gives the reasons."""
_LICENSES = {"4b": "Apache-2.0", "9b": "FLUX non-commercial"}
_GATED = {"4b": None, "9b": True}  # public sources disagree about 4b


def components(transformer: int, text_encoder: int, *, vae: int) -> dict[str, Component]:
    """Return the components of a FLUX.2-klein pipeline with these numbers of parameters."""
    return {
        "transformer": Component("diffusers:Flux2Transformer2DModel", transformer),
        "vae": Component("diffusers:AutoencoderKLFlux2", vae),
        "text_encoder": Component("transformers:Qwen3ForCausalLM", text_encoder),
        "tokenizer": Component("transformers:AutoTokenizer"),
    }


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name=f"flux2-klein-{line}{size}",
            summary=f"FLUX.2 [klein] {size.upper()}, {kind}",
            load="imagewam_flux2.editor:Flux2Editor",
            family="Flux2KleinPipeline",
            defaults=DEFAULTS,
            components=components(*_PARAMETERS[size], vae=84_046_115),
            config={**_SIZES[size], "guidance_embeds": False},
            repo=f"black-forest-labs/FLUX.2-klein-{line}{size.upper()}",
            license=_LICENSES[size],
            gated=_GATED[size],
            gated_source="github.com/utensils/mold/pull/123" if _GATED[size] else "",
        )
        for line, kind in (("", "step-distilled"), ("base-", "undistilled"))
        for size in ("4b", "9b")
    ]
