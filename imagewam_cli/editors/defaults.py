"""What an editor is used with unless the user says otherwise, and what of it can be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from imagewam_cli.editors.contract import CameraLayout, PrefixSettings, resolve
from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.spec import Mode, Rounding, Segment


@dataclass(frozen=True, kw_only=True)
class ModeDefaults:
    """One mode of an editor. has: the segments of its forward, in the order of the tokens; keeps: those that are kept
    by default."""

    timestep: float
    has: tuple[Segment, ...]
    keeps: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class EditorDefaults:
    """Defaults and choices of an editor. modes: those that its architecture allows, the default first."""

    modes: Mapping[Mode, ModeDefaults]
    text_padding: Literal["trim", "keep"]
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    camera_size: tuple[int, int]
    """(height, width) of each camera's picture."""
    multiple: int
    """Sides of a camera's picture are multiples of this many pixels."""
    max_text_tokens: int | None
    """Text beyond is cut; text that is padded is padded to this. None: the editor cuts nothing and pads to no length,
    so that `trim` is its only padding."""
    text_paddings: tuple[Literal["trim", "keep"], ...] = ("trim", "keep")
    """Those that the architecture allows; no `trim` where the denoiser takes no mask to hide padding with."""
    camera_layouts: tuple[CameraLayout, ...] = ("tile",)
    """Those that the architecture allows, the default first."""
    roundings: tuple[Rounding, ...] = ("exact",)
    """Those that there are, the default first."""

    def resolve(self, settings: PrefixSettings, name: str) -> PrefixSettings:
        """`settings` with every None decided, for the editor `name`.

        Raises:
            UsageError: a choice that this editor does not have, with those that it has.
        """
        settings = dataclasses.replace(settings, cameras=settings.cameras or ("top",))
        height, width = self.camera_size
        settings = resolve(settings, camera_layout=self.camera_layouts[0])
        stacked = settings.camera_layout == "head-over-wrists"
        settings = resolve(
            settings,
            mode=next(iter(self.modes)),
            text_padding=self.text_padding,
            compute_dtype=self.compute_dtype,
            image_size=(height * 3 // 2, width) if stacked else (height, width * len(settings.cameras)),
            rounding=self.roundings[0],
        )
        assert settings.mode is not None
        if settings.mode not in self.modes:
            modes = ", ".join(self.modes)
            raise UsageError(f"mode {settings.mode!r} is not available for {name}", f"use --mode {modes}")
        mode = self.modes[settings.mode]
        settings = resolve(settings, timestep=mode.timestep, segments=mode.keeps)
        assert settings.segments is not None
        if not settings.segments:
            raise UsageError("no segment is chosen", f"choose among {', '.join(mode.has)}")
        for segment in settings.segments:
            if segment not in mode.has:
                raise UsageError(
                    f"mode {settings.mode!r} of {name} has no {segment} tokens",
                    f"choose segments among {', '.join(mode.has)}",
                )
        if settings.camera_layout not in self.camera_layouts:
            raise UsageError(
                f"camera layout {settings.camera_layout!r} is not available for {name}",
                f"use --camera-layout {', '.join(self.camera_layouts)}",
            )
        if settings.text_padding not in self.text_paddings:
            raise UsageError(
                f"text padding {settings.text_padding!r} is not available for {name}",
                f"use --text-padding {', '.join(self.text_paddings)}",
            )
        self._check_rounding(settings, name)
        self._check_size(settings)
        # in the order of the tokens: another order is the same prefix
        return dataclasses.replace(settings, segments=tuple(s for s in mode.has if s in settings.segments))

    @property
    def text_limit(self) -> int:
        """`max_text_tokens` of an editor that cuts."""
        assert self.max_text_tokens is not None
        return self.max_text_tokens

    def segments(self, settings: PrefixSettings) -> tuple[Segment, ...]:
        """Those of the forward in the resolved settings' mode, kept or not."""
        assert settings.mode is not None
        return self.modes[settings.mode].has

    def _check_rounding(self, settings: PrefixSettings, name: str) -> None:
        if settings.rounding not in self.roundings:
            raise UsageError(
                f"rounding {settings.rounding!r} is not available for {name}", f"it has {', '.join(self.roundings)}"
            )
        if settings.rounding == "published-bf16" and settings.compute_dtype != "bfloat16":
            raise UsageError(f"rounding 'published-bf16' computes in bfloat16, not {settings.compute_dtype}")

    def _check_size(self, settings: PrefixSettings) -> None:
        assert settings.image_size is not None
        (height, width), count = settings.image_size, len(settings.cameras)
        step = (self.multiple, self.multiple * count)
        if settings.camera_layout == "head-over-wrists":
            if count != 3:
                raise UsageError(
                    f"camera layout 'head-over-wrists' is for 3 cameras, not {count}", "choose them with --camera"
                )
            step = (3 * self.multiple, 2 * self.multiple)
        nearest = tuple(max(1, round(side / s)) * s for side, s in zip((height, width), step, strict=True))
        if (height, width) != nearest:
            raise UsageError(
                f"image size {height}x{width} does not split into {self.multiple}-pixel tokens for {count} camera(s)",
                f"the nearest that does is {nearest[0]}x{nearest[1]}: choose it with --image-size",
            )
