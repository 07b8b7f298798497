"""`editors.settings`: options completed with an editor's defaults, and records of older versions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from imagewam_cli.config import from_dict, to_dict
from imagewam_cli.editors.settings import PrefixOptions, PrefixSettings, resolve
from imagewam_cli.errors import UsageError
from imagewam_cli.registry import Registry

KLEIN = Registry.installed().editors.get("flux2-klein-4b")
RECORDED = {
    "mode": "prefix",
    "timestep": 0.0,
    "layers": "all",
    "segments": ["text", "reference"],
    "text_padding": "keep",
    "image_size": [512, 512],
    "camera_layout": "tile",
    "compute_dtype": "bfloat16",
    "quantization": "none",
    "pool": 1,
    "rounding": "exact",
    "prompt_template": None,
    "cameras": ["top"],
    "blank_images": False,
    "random_weights": False,
}
"""Settings as caches record them since version 0.1. The fingerprint hashes them, so names and order must not change."""


def test_settings_are_recorded_under_the_same_names_in_the_same_order() -> None:
    settings = resolve(PrefixOptions(), KLEIN)
    assert list(to_dict(settings).items()) == list(RECORDED.items())
    assert [f.name for f in dataclasses.fields(PrefixOptions)] == list(RECORDED)


def test_resolve_keeps_complete_settings() -> None:
    settings = resolve(PrefixOptions(timestep=0.5, segments=("reference", "text")), KLEIN)
    assert settings.segments == ("text", "reference")
    assert resolve(settings, KLEIN) == settings


@pytest.mark.parametrize("missing", [{"rounding": None}, {"camera_layout": None, "compute_dtype": None}])
def test_records_with_missing_choices_are_completed(missing: dict[str, Any]) -> None:
    recorded = from_dict(PrefixOptions, RECORDED | missing, source="fingerprint")
    assert to_dict(resolve(recorded, KLEIN)) == RECORDED
    without = {key: value for key, value in RECORDED.items() if key not in missing}
    assert from_dict(PrefixOptions, without, source="fingerprint") == recorded


def test_complete_settings_need_every_choice() -> None:
    with pytest.raises(TypeError, match="rounding"):
        PrefixSettings(**{key: value for key, value in RECORDED.items() if key != "rounding"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": ()}, "no segment is chosen"),
        ({"rounding": "published-bf16", "compute_dtype": "float32"}, "requires --compute-dtype bfloat16, got float32"),
        ({"camera_layout": "head-over-wrists", "cameras": ("a", "b")}, "takes 3 cameras, got 2"),
    ],
)
def test_incompatible_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(PrefixOptions(**options), KLEIN)
