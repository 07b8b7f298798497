"""Create a KV specification with one layer, the smallest that `cache_study` can measure."""

from __future__ import annotations

from imagewam_cli.prefix.spec import KVSpec, LayerSpec, SegmentSpec

TEXT, GRID, HEADS, SIZE = 5, (4, 6), 2, 8
"""Number of text tokens, reference grid, number of heads, and head size."""


def layer(*, text: bool = True) -> LayerSpec:
    segments = (SegmentSpec(name="reference", tokens=24, grid=GRID),)
    return LayerSpec(
        name="a",
        block="sequential",
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=SIZE,
        segments=((SegmentSpec(name="text", tokens=TEXT),) if text else ()) + segments,
    )


def spec_of(one: LayerSpec) -> KVSpec:
    return KVSpec(
        mode="prefix",
        timestep=0.0,
        layers=(one,),
        rope=None,
        text_padding="trim",
        cameras=("top",),
        image_size=(64, 96),
        prompt_template="{instruction}",
    )
