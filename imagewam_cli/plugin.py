"""Everything that a plugin imports, in one module: `from imagewam_cli.plugin import EditorEntry, hookimpl`.

Names are imported when they are first used, so a plugin's `__init__`, which every `imagewam` command imports, costs no
torch. What a plugin's tests need is in `imagewam_cli.testing`. See docs/guide/plugins.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewam_cli.lazy import lazy_exports

if TYPE_CHECKING:
    from imagewam_cli.data.camera_layout import CameraLayout as CameraLayout
    from imagewam_cli.data.formats import DatasetFormat as DatasetFormat
    from imagewam_cli.data.types import ActionChunk as ActionChunk
    from imagewam_cli.data.types import Dataset as Dataset
    from imagewam_cli.data.types import DatasetInfo as DatasetInfo
    from imagewam_cli.data.types import EpisodeInfo as EpisodeInfo
    from imagewam_cli.data.types import KeyMap as KeyMap
    from imagewam_cli.data.types import Observation as Observation
    from imagewam_cli.data.types import Row as Row
    from imagewam_cli.data.types import UInt8Image as UInt8Image
    from imagewam_cli.editors.contract import Editor as Editor
    from imagewam_cli.editors.contract import PrefixGraph as PrefixGraph
    from imagewam_cli.editors.contract import ReleaseNames as ReleaseNames
    from imagewam_cli.editors.contract import TextToken as TextToken
    from imagewam_cli.editors.contract import WeightsIdentity as WeightsIdentity
    from imagewam_cli.editors.diffusers import GREY as GREY
    from imagewam_cli.editors.diffusers import DiffusersEditor as DiffusersEditor
    from imagewam_cli.editors.joint import JointEditor as JointEditor
    from imagewam_cli.editors.joint import grid_ids as grid_ids
    from imagewam_cli.editors.joint import patch_tokens as patch_tokens
    from imagewam_cli.editors.loading.hardware import CPU as CPU
    from imagewam_cli.editors.loading.hardware import Hardware as Hardware
    from imagewam_cli.editors.loading.shared_sizes import SharedSize as SharedSize
    from imagewam_cli.editors.loading.shared_sizes import picture_width as picture_width
    from imagewam_cli.editors.loading.shared_sizes import text_width as text_width
    from imagewam_cli.editors.settings import PrefixOptions as PrefixOptions
    from imagewam_cli.editors.settings import PrefixSettings as PrefixSettings
    from imagewam_cli.editors.settings import resolve as resolve
    from imagewam_cli.editors.target import flow_target as flow_target
    from imagewam_cli.editors.target import target_noise as target_noise
    from imagewam_cli.editors.text import Prompt as Prompt
    from imagewam_cli.editors.text import PromptTokens as PromptTokens
    from imagewam_cli.editors.text import Text as Text
    from imagewam_cli.editors.text import picture_token_types as picture_token_types
    from imagewam_cli.editors.text import prompt_tokens as prompt_tokens
    from imagewam_cli.editors.text import with_token as with_token
    from imagewam_cli.editors.tokens import equal_layers as equal_layers
    from imagewam_cli.editors.tokens import joint_layers as joint_layers
    from imagewam_cli.editors.tokens import picture_segment as picture_segment
    from imagewam_cli.errors import DatasetError as DatasetError
    from imagewam_cli.errors import EditorError as EditorError
    from imagewam_cli.errors import ExportError as ExportError
    from imagewam_cli.errors import PluginError as PluginError
    from imagewam_cli.errors import SimulationError as SimulationError
    from imagewam_cli.errors import UsageError as UsageError
    from imagewam_cli.export import Exporter as Exporter
    from imagewam_cli.export import ExportReport as ExportReport
    from imagewam_cli.hookspecs import CodecEntry as CodecEntry
    from imagewam_cli.hookspecs import Component as Component
    from imagewam_cli.hookspecs import DatasetFormatEntry as DatasetFormatEntry
    from imagewam_cli.hookspecs import EditorDefaults as EditorDefaults
    from imagewam_cli.hookspecs import EditorEntry as EditorEntry
    from imagewam_cli.hookspecs import EnvironmentEntry as EnvironmentEntry
    from imagewam_cli.hookspecs import ExporterEntry as ExporterEntry
    from imagewam_cli.hookspecs import ModeDefaults as ModeDefaults
    from imagewam_cli.hookspecs import hookimpl as hookimpl
    from imagewam_cli.kvcache.codecs.contract import Codec as Codec
    from imagewam_cli.kvcache.format.part import Part as Part
    from imagewam_cli.prefix.capture import attention_layers as attention_layers
    from imagewam_cli.prefix.capture import record as record
    from imagewam_cli.prefix.capture import replay as replay
    from imagewam_cli.prefix.kv import LayerKV as LayerKV
    from imagewam_cli.prefix.kv import PrefixKV as PrefixKV
    from imagewam_cli.prefix.positions import segment_ids as segment_ids
    from imagewam_cli.prefix.rotary import rotary_tables as rotary_tables
    from imagewam_cli.prefix.rotary import rotate as rotate
    from imagewam_cli.prefix.rounding import ROUNDINGS as ROUNDINGS
    from imagewam_cli.prefix.rounding import Rounding as Rounding
    from imagewam_cli.prefix.spec import BlockKind as BlockKind
    from imagewam_cli.prefix.spec import KVSpec as KVSpec
    from imagewam_cli.prefix.spec import LayerSpec as LayerSpec
    from imagewam_cli.prefix.spec import Mode as Mode
    from imagewam_cli.prefix.spec import RopeSpec as RopeSpec
    from imagewam_cli.prefix.spec import Segment as Segment
    from imagewam_cli.prefix.spec import SegmentSpec as SegmentSpec
    from imagewam_cli.prefix.spec import TokenPositions as TokenPositions
    from imagewam_cli.sim.environment import Environment as Environment
    from imagewam_cli.sim.environment import StepResult as StepResult

_EXPORTS = {
    "imagewam_cli.data.camera_layout": ("CameraLayout",),
    "imagewam_cli.data.formats": ("DatasetFormat",),
    "imagewam_cli.data.types": (
        "ActionChunk",
        "Dataset",
        "DatasetInfo",
        "EpisodeInfo",
        "KeyMap",
        "Observation",
        "Row",
        "UInt8Image",
    ),
    "imagewam_cli.editors.contract": ("Editor", "PrefixGraph", "ReleaseNames", "TextToken", "WeightsIdentity"),
    "imagewam_cli.editors.diffusers": ("DiffusersEditor", "GREY"),
    "imagewam_cli.editors.joint": ("JointEditor", "grid_ids", "patch_tokens"),
    "imagewam_cli.editors.loading.hardware": ("CPU", "Hardware"),
    "imagewam_cli.editors.loading.shared_sizes": ("SharedSize", "picture_width", "text_width"),
    "imagewam_cli.editors.settings": ("PrefixOptions", "PrefixSettings", "resolve"),
    "imagewam_cli.editors.target": ("flow_target", "target_noise"),
    "imagewam_cli.editors.text": (
        "Prompt",
        "PromptTokens",
        "Text",
        "picture_token_types",
        "prompt_tokens",
        "with_token",
    ),
    "imagewam_cli.editors.tokens": ("equal_layers", "joint_layers", "picture_segment"),
    "imagewam_cli.errors": (
        "DatasetError",
        "EditorError",
        "ExportError",
        "PluginError",
        "SimulationError",
        "UsageError",
    ),
    "imagewam_cli.export": ("ExportReport", "Exporter"),
    "imagewam_cli.hookspecs": (
        "CodecEntry",
        "Component",
        "DatasetFormatEntry",
        "EditorDefaults",
        "EditorEntry",
        "EnvironmentEntry",
        "ExporterEntry",
        "ModeDefaults",
        "hookimpl",
    ),
    "imagewam_cli.kvcache.codecs.contract": ("Codec",),
    "imagewam_cli.kvcache.format.part": ("Part",),
    "imagewam_cli.prefix.capture": ("attention_layers", "record", "replay"),
    "imagewam_cli.prefix.kv": ("LayerKV", "PrefixKV"),
    "imagewam_cli.prefix.positions": ("segment_ids",),
    "imagewam_cli.prefix.rotary": ("rotary_tables", "rotate"),
    "imagewam_cli.prefix.rounding": ("ROUNDINGS", "Rounding"),
    "imagewam_cli.prefix.spec": (
        "BlockKind",
        "KVSpec",
        "LayerSpec",
        "Mode",
        "RopeSpec",
        "Segment",
        "SegmentSpec",
        "TokenPositions",
    ),
    "imagewam_cli.sim.environment": ("Environment", "StepResult"),
}
"""Module -> the names that are public from there."""

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
