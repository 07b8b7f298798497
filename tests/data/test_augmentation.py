"""Test `data.augmentation`: what a view changes, what it keeps, and what it depends on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from imagewam_cli.data.augmentation import Augmentation, augmented
from imagewam_cli.data.types import Row

STILL = Augmentation(variants=2, changed=0.0, crop=1.0, turn=0.0)
"""With all ranges at 0, no pixel changes."""


def row(number: int = 3) -> Row:
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for camera in ("top", "wrist")}
    return Row(
        row=number,
        episode=0,
        frame=number,
        timestamp=0.0,
        instruction="go",
        state=np.zeros(2, np.float32),
        action=np.ones(2, np.float32),
        images=images,
    )


def views(augmentation: Augmentation, number: int = 3) -> list[Row]:
    return list(augmented([row(number)], augmentation))


def test_the_first_view_is_the_recorded_row_and_all_views_keep_state_and_action() -> None:
    found = views(Augmentation(variants=4))
    assert [r.variant for r in found] == [0, 1, 2, 3]
    assert all(np.array_equal(found[0].images[c], row().images[c]) for c in ("top", "wrist"))
    assert all((r.row, r.frame, r.instruction) == (3, 3, "go") for r in found)
    assert all(np.array_equal(r.action, row().action) for r in found)
    pictures = [r.images["top"].tobytes() for r in found]
    assert len(set(pictures)) == 4
    assert all(r.images["wrist"].shape == (24, 32, 3) for r in found)


def test_a_view_depends_only_on_seed_row_variant_and_camera() -> None:
    """Order and other rows have no effect; another seed, row or camera changes the view."""
    a = Augmentation(variants=3)
    alone, beside = views(a), list(augmented([row(1), row(3)], a))[3:]
    for one, other in zip(alone, beside, strict=True):
        assert np.array_equal(one.images["top"], other.images["top"])
    assert not np.array_equal(views(dataclasses.replace(a, seed=1))[1].images["top"], alone[1].images["top"])
    assert not np.array_equal(views(a, 4)[1].images["top"], alone[1].images["top"])
    same = dataclasses.replace(row(), images=dict.fromkeys(("top", "wrist"), row().images["top"]))
    (_, view, _) = augmented([same], a)
    assert not np.array_equal(view.images["top"], view.images["wrist"])


def test_ranges_of_zero_change_nothing() -> None:
    assert np.array_equal(views(STILL)[1].images["top"], row().images["top"])


@pytest.mark.parametrize(
    ("field", "value"), [("brightness", 0.9), ("hue", 0.4), ("saturation", 0.9), ("noise", 0.2), ("exposure", 2.0)]
)
def test_each_range_changes_some_view(field: str, value: float) -> None:
    """At least one view of 20 rows differs from the view without this kind of change."""
    none = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "noise", "exposure"), 0.0)
    plain = dataclasses.replace(STILL, changed=1.0, gamma=(1.0, 1.0), **none)
    changed = dataclasses.replace(plain, **{field: value})
    assert any(
        not np.array_equal(views(plain, i)[1].images["top"], views(changed, i)[1].images["top"]) for i in range(20)
    )


def test_rotation_fills_with_the_mean_and_a_crop_stays_inside() -> None:
    """A white image stays white after rotation and cropping: it gets no black corners."""
    white = dataclasses.replace(row(), images={"top": np.full((24, 32, 3), 255, np.uint8)})
    turned = Augmentation(variants=5, changed=0.0, turn=45.0, crop=0.5)
    assert all((r.images["top"] == 255).all() for r in augmented([white], turned))


def test_zero_views_are_refused() -> None:
    with pytest.raises(ValueError, match="variants must be at least 1, got 0"):
        Augmentation(variants=0)
