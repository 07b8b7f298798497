"""Entry of the LongCat-Image-Edit editor. The code is in `editor`."""

from __future__ import annotations

from imagewam_cli.plugin import Component, EditorDefaults, EditorEntry, ModeDefaults, hookimpl

_DEFAULTS = EditorDefaults(
    modes={
        "prefix": ModeDefaults(timestep=1.0, segments=("text", "reference")),
        "denoise": ModeDefaults(timestep=1.0, segments=("text", "target", "reference"), kept=("text", "reference")),
    },
    camera_size=(512, 512),
    size_multiple=16,
    max_text_tokens=512,
)
"""`imagewam_cli.editors.joint` gives the reasons."""


@hookimpl
def imagewam_editors() -> list[EditorEntry]:
    return [
        EditorEntry(
            name="longcat-image-edit",
            summary="LongCat-Image-Edit, whose text encoder sees the picture",
            load="imagewam_longcat.editor:LongCatEditor",
            family="LongCatImageEditPipeline",
            defaults=_DEFAULTS,
            components={
                "transformer": Component("diffusers:LongCatImageTransformer2DModel", 6_270_668_864),
                "vae": Component("diffusers:AutoencoderKL", 83_819_683),
                "text_encoder": Component("transformers:Qwen2_5_VLForConditionalGeneration", 8_292_166_656),
                "tokenizer": Component("transformers:Qwen2Tokenizer"),
                # only the picture half of the processor is used, always with Pillow: torchvision, if installed, would
                # resize to different pixels. transformers 5.4 exports this class only with torchvision
                "text_processor": Component(
                    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil"
                ),
            },
            config={"num_layers": 10, "num_single_layers": 20},
            repo="meituan-longcat/LongCat-Image-Edit",
            gated=False,
            gated_source="the repository's page",
            license="Apache-2.0",
        )
    ]
