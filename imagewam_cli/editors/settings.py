"""Settings of a prefix: `PrefixOptions` holds the user's choices, `PrefixSettings` the complete settings.

`resolve` completes the options with the defaults of an editor's entry. Settings are recorded in every cache and policy,
and are part of the fingerprint that is hashed: names and order of the fields must not change. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from imagewam_cli.data.camera_layout import CAMERA_LAYOUTS, CameraLayout
from imagewam_cli.errors import UsageError
from imagewam_cli.hookspecs import EditorEntry
from imagewam_cli.prefix.rounding import ROUNDINGS
from imagewam_cli.prefix.spec import ComputeDtype, Mode, Quantization, RoundingName, Segment, TextPadding

C = TypeVar("C", bound=str)

LARGEST_POOL = 1024
"""No editor has more picture tokens in a row."""


def _option(metavar: str | None, help: str) -> dict[str, str | None]:
    """Return the metadata of a field that is also an option of the command line: `--` and its name."""
    return {"metavar": metavar, "help": help}


@dataclass(frozen=True, kw_only=True)
class PrefixOptions:
    """Options of a prefix, from a user or an old cache. None: the editor's default."""

    mode: Mode | None = field(
        default=None,
        metadata=_option("MODE", "How the editor runs: prefix or denoise; by default the editor's own mode."),
    )
    timestep: float | None = field(
        default=None,
        metadata=_option("T", "Diffusion time in [0, 1] at which K and V are captured; by default the editor's own."),
    )
    """1 is noise, 0 is clean."""
    layers: str = field(
        default="all",
        metadata=_option(
            "LAYERS", "all, every:N, a list like 0,4,9, or auto:K (the K layers that best predict actions)."
        ),
    )
    segments: tuple[Segment, ...] | None = field(
        default=None,
        metadata=_option(
            "NAMES", "Kinds of tokens, such as text,reference,target; by default the editor's own choice."
        ),
    )
    text_padding: TextPadding | None = field(
        default=None,
        metadata=_option("HOW", "Padding tokens of the text: trim or keep; by default the editor's own choice."),
    )
    """keep: padding that the editor's own pipeline passes to its model counts as tokens. trim: padding is dropped, and
    the other tokens keep their position ids."""
    image_size: tuple[int, int] | None = field(
        default=None,
        metadata=_option("HxW", "Size of the picture that the editor sees, such as 224x448 (height first)."),
    )
    """(height, width) of the composed picture of all cameras."""
    camera_layout: str | None = field(
        default=None,
        metadata=_option("LAYOUT", "tile, separate or head-over-wrists; by default the editor's own layout."),
    )
    """Name in `imagewam_cli.data.camera_layout`."""
    compute_dtype: ComputeDtype | None = field(
        default=None,
        metadata=_option("DTYPE", "Precision of the editor's forward pass: float32, bfloat16 or float16."),
    )
    quantization: Quantization = field(
        default="none", metadata=_option("KIND", "Quantize the editor's weights: none, int8 or nf4.")
    )
    """Applies to denoiser and text encoders. It changes the prefix."""
    pool: int = field(default=1, metadata=_option("N", "Average each N x N block of picture tokens into one token."))
    rounding: RoundingName | None = None
    """Name in `imagewam_cli.prefix.rounding`."""
    prompt_template: str | None = None
    """Text that contains {instruction} and replaces the editor's own template."""
    cameras: tuple[str, ...] = ()
    blank_images: bool = field(
        default=False, metadata=_option(None, "Ablation: replace every picture with a gray one.")
    )
    """Measures how well a policy does without pictures."""
    random_weights: bool = field(
        default=False, metadata=_option(None, "Ablation: use an editor with untrained weights.")
    )
    """Measures how much the editor's training contributes."""

    def __post_init__(self) -> None:
        if self.timestep is not None and not 0.0 <= self.timestep <= 1.0:
            raise UsageError(
                f"timestep must be in [0, 1], got {self.timestep}", "pass --timestep from 0 (clean) to 1 (noise)"
            )
        if self.pool < 1:
            raise UsageError(
                f"pool must be at least 1, got {self.pool}",
                "--pool 1 keeps every token; --pool 2 keeps one token per 2 x 2 cell",
            )
        if self.pool > LARGEST_POOL:
            raise UsageError(
                f"pool must be at most {LARGEST_POOL}, got {self.pool}", "--pool 2 keeps one token per 2 x 2 cell"
            )
        if self.random_weights and self.quantization != "none":
            raise UsageError(
                f"--random-weights cannot be combined with --quantization {self.quantization}",
                "omit --random-weights or --quantization",
            )
        if self.prompt_template is not None and "{instruction}" not in self.prompt_template:
            raise UsageError(
                f"the prompt template {self.prompt_template!r} has no {{instruction}}", "add {instruction} to it"
            )


@dataclass(frozen=True, kw_only=True)
class PrefixSettings(PrefixOptions):
    """Complete settings of a prefix, which an editor computes with and a cache records."""

    # `field()` removes the default None that a bare annotation would inherit
    mode: Mode = field()
    timestep: float = field()
    segments: tuple[Segment, ...] = field()
    """Segments to keep, in the order of the tokens."""
    text_padding: TextPadding = field()
    image_size: tuple[int, int] = field()
    camera_layout: str = field()
    compute_dtype: ComputeDtype = field()
    rounding: RoundingName = field()

    @property
    def layout(self) -> CameraLayout:
        """Layout of the cameras' pictures."""
        return CAMERA_LAYOUTS[self.camera_layout]

    @property
    def reference_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of each reference picture that the editor sees."""
        return self.layout.reference_sizes(self.image_size, len(self.cameras))


def resolve(options: PrefixOptions, entry: EditorEntry) -> PrefixSettings:
    """Complete the options with the defaults of an editor.

    Raises:
        UsageError: the editor does not offer a choice; the hint lists the available ones.
    """
    defaults, name = entry.defaults, entry.name
    mode = _offered("mode", options.mode, defaults.modes, name, "use --mode")
    of_mode = defaults.modes[mode]
    segments = options.segments if options.segments is not None else of_mode.kept or of_mode.segments
    _require_segments(segments, mode, of_mode.segments, name)
    layout = _offered("camera layout", options.camera_layout, defaults.camera_layouts, name, "use --camera-layout")
    cameras = options.cameras or ("top",)
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(PrefixOptions)}
    settings = PrefixSettings(
        **values
        | {
            "mode": mode,
            "timestep": options.timestep if options.timestep is not None else of_mode.timestep,
            # in the order of the tokens, so that the order of the options does not matter
            "segments": tuple(s for s in of_mode.segments if s in segments),
            "text_padding": _offered(
                "text padding", options.text_padding, defaults.text_paddings, name, "use --text-padding"
            ),
            "image_size": options.image_size or CAMERA_LAYOUTS[layout].default_size(defaults.camera_size, len(cameras)),
            "camera_layout": layout,
            "compute_dtype": options.compute_dtype or defaults.compute_dtype,
            "rounding": _offered("rounding", options.rounding, defaults.roundings, name, "it offers"),
            "cameras": cameras,
        }
    )
    _require_dtype(settings)
    _require_size(settings, defaults.size_multiple)
    return settings


def _offered(what: str, chosen: C | None, offered: Iterable[C], name: str, hint: str) -> C:
    """Return the choice, or the first available one if none was made."""
    choices = tuple(offered)
    if chosen is None:
        return choices[0]
    if chosen not in choices:
        raise UsageError(f"{what} {chosen!r} is not available for {name}", f"{hint} {', '.join(choices)}")
    return chosen


def _require_segments(segments: tuple[Segment, ...], mode: Mode, offered: tuple[Segment, ...], name: str) -> None:
    hint = f"choose segments from {', '.join(offered)}"
    if not segments:
        raise UsageError("no segment is chosen", hint)
    for segment in segments:
        if segment not in offered:
            raise UsageError(f"mode {mode!r} of {name} has no {segment} tokens", hint)


def _require_dtype(settings: PrefixSettings) -> None:
    needed = ROUNDINGS[settings.rounding].compute_dtype
    if needed is not None and settings.compute_dtype != needed:
        raise UsageError(
            f"rounding {settings.rounding!r} requires --compute-dtype {needed}, got {settings.compute_dtype}",
            f"use --compute-dtype {needed}",
        )


def _require_size(settings: PrefixSettings, multiple: int) -> None:
    (height, width), count = settings.image_size, len(settings.cameras)
    step = settings.layout.granularity(multiple, count)
    nearest = tuple(max(1, round(side / s)) * s for side, s in zip((height, width), step, strict=True))
    if (height, width) != nearest:
        raise UsageError(
            f"image size {height}x{width} does not split into {multiple}-pixel tokens for {count} camera(s)",
            f"use the nearest valid size: --image-size {nearest[0]}x{nearest[1]}",
        )
