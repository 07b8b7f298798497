"""Compare FLUX.2's prefix with numbers from the published code: text with the state token, mask, keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from imagewam_cli.editors.contract import TokenPlacement
from imagewam_cli.editors.settings import PrefixOptions, resolve
from imagewam_cli.errors import UsageError
from imagewam_cli.expert.model import to_bfloat16
from imagewam_cli.prefix.rotary import rotary_tables
from imagewam_cli.prefix.spec import RopeSpec
from imagewam_cli.registry import Registry
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.tokens import ACTION_T, RoundedPositions, text_ids
from tests.support.editors import published

TOLERANCE = 5e-5
BF16_TOLERANCE = 0.07
"""Two bfloat16 steps for keys of size 8. Summing in another order already gives one step."""
CASES: tuple[tuple[str, TokenPlacement], ...] = (
    ("infer_proprio_pack", "packed"),
    ("infer_proprio_pack_holes", "packed"),
    ("infer_proprio_append_left", "appended"),
)
ROPE = RopeSpec(axes=(4, 8, 12, 8), theta=2000.0, action_axis=1, action_ids=(ACTION_T, 0, 0, 0))

KLEIN = Registry.installed().editors.get("flux2-klein-4b")


@pytest.fixture(scope="module")
def transformer() -> Any:
    return published.transformer()


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_text_with_the_state_token_equals_the_published(name: str, placement: TokenPlacement) -> None:
    case = published.case(name)
    text = published.text(case, placement)
    torch.testing.assert_close(text.embeds, case["txt.context_after_proprio"], atol=1e-6, rtol=0)
    assert torch.equal(text.valid, case["txt.mask_after_proprio"])


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_mask_keys_and_values_equal_the_published(transformer: Any, name: str, placement: TokenPlacement) -> None:
    case = published.case(name)
    found = published.prefix(transformer, case, placement)
    assert torch.equal(found.valid[:, None, :].expand_as(case["mask.prefill"]), case["mask.prefill"])
    assert published.kv_error(case, found) < TOLERANCE


def test_another_token_placement_changes_the_prefix(transformer: Any) -> None:
    case = published.case("infer_proprio_pack")
    assert published.kv_error(case, published.prefix(transformer, case, "appended")) > 0.1


@pytest.mark.parametrize(
    "weight",
    ["img_in", "txt_in", "double_stream_modulation_txt.lin", "double_blocks.0.txt_attn.qkv", "single_blocks.0.linear2"],
)
def test_a_weight_changed_by_one_percent_is_noticed(weight: str) -> None:
    model = published.transformer()
    weights = published.released()
    weights[f"{weight}.weight"] = 1.01 * weights[f"{weight}.weight"]
    model.load_state_dict(Flux2Release().from_release(weights))
    case = published.case("infer_proprio_pack")
    assert published.kv_error(case, published.prefix(model, case, "packed")) > 20 * TOLERANCE


def test_published_rounding_is_at_least_as_close_as_exact() -> None:
    model = published.transformer()
    to_bfloat16(model)
    case = published.case("infer_proprio_pack_bf16")
    exact = published.kv_error(case, published.prefix(model, case, "packed"))
    model.pos_embed = RoundedPositions(dataclasses.replace(ROPE, rounding="published-bf16"))
    rounded = published.kv_error(case, published.prefix(model, case, "packed"))
    assert rounded < BF16_TOLERANCE
    assert rounded <= exact


def test_rounded_positions_equal_the_published_bit_for_bit() -> None:
    case = published.case("infer_proprio_pack_bf16")
    ids = text_ids(301)
    cos, sin = rotary_tables(ids, ROPE.axes, ROPE.theta, "published-bf16")
    assert torch.equal(cos, case["longtext.cos"].float())
    assert torch.equal(sin, case["longtext.sin"].float())
    exact, _ = rotary_tables(ids, ROPE.axes, ROPE.theta, "exact")
    assert (exact - cos).abs().max() > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ("a", "b")}, "takes 3 cameras, got 2"),
        ({"cameras": ("a", "b", "c"), "image_size": (288, 240)}, "use the nearest valid size: --image-size 288x256"),
        ({"cameras": ("a",), "camera_layout": "stacked"}, "not available for flux"),
        (
            {"cameras": ("a",), "camera_layout": "tile", "rounding": "published-bf16", "compute_dtype": "float32"},
            "bf16",
        ),
    ],
)
def test_incompatible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    options = PrefixOptions(**({"camera_layout": "head-over-wrists"} | change))
    with pytest.raises(UsageError) as raised:
        resolve(options, KLEIN)
    assert message in f"{raised.value.message} {raised.value.hint}"


def test_head_over_wrists_has_its_own_default_size() -> None:
    options = PrefixOptions(camera_layout="head-over-wrists", cameras=("head", "left", "right"))
    assert resolve(options, KLEIN).image_size == (768, 512)
