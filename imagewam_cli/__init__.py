"""imagewam: turn a pretrained image editor into a robot policy (method: arXiv 2606.19531).

    import imagewam_cli as iw

    data = iw.open_dataset("datasets/mine")
    editor = iw.load_editor("tiny", dataset=data)
    cache = iw.build_cache(data, editor, "caches/mine", codec="pca1")
    run = iw.train(cache, "runs/mine")
    policy = iw.load_policy("runs/mine")

Names are imported when they are first used: `import imagewam_cli` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagewam_cli.lazy import lazy_exports

if TYPE_CHECKING:
    from imagewam_cli.api import (
        Run as Run,
    )
    from imagewam_cli.api import (
        build_cache as build_cache,
    )
    from imagewam_cli.api import (
        evaluate as evaluate,
    )
    from imagewam_cli.api import (
        export_policy as export_policy,
    )
    from imagewam_cli.api import (
        load_editor as load_editor,
    )
    from imagewam_cli.api import (
        load_policy as load_policy,
    )
    from imagewam_cli.api import (
        open_cache as open_cache,
    )
    from imagewam_cli.api import (
        open_dataset as open_dataset,
    )
    from imagewam_cli.api import (
        open_loop as open_loop,
    )
    from imagewam_cli.api import (
        record as record,
    )
    from imagewam_cli.api import (
        train as train,
    )
    from imagewam_cli.data.types import Dataset as Dataset
    from imagewam_cli.data.types import Observation as Observation
    from imagewam_cli.data.types import Row as Row
    from imagewam_cli.editors.contract import Editor as Editor
    from imagewam_cli.editors.loading.hardware import Hardware as Hardware
    from imagewam_cli.editors.settings import PrefixOptions as PrefixOptions
    from imagewam_cli.errors import ImagewamError as ImagewamError
    from imagewam_cli.kvcache.reading.reader import CacheReader as CacheReader
    from imagewam_cli.policy.policy import Policy as Policy
    from imagewam_cli.prefix.kv import PrefixKV as PrefixKV
    from imagewam_cli.training.recipe import ExpertRecipe as ExpertRecipe
    from imagewam_cli.training.recipe import FlowRecipe as FlowRecipe
    from imagewam_cli.training.recipe import OptimizerRecipe as OptimizerRecipe
    from imagewam_cli.training.recipe import PolicyRecipe as PolicyRecipe
    from imagewam_cli.training.recipe import TrainRecipe as TrainRecipe

__version__ = "0.1.0"

_EXPORTS = {
    "imagewam_cli.api": (
        "Run",
        "build_cache",
        "evaluate",
        "export_policy",
        "load_editor",
        "load_policy",
        "open_cache",
        "open_dataset",
        "open_loop",
        "record",
        "train",
    ),
    "imagewam_cli.data.types": ("Dataset", "Observation", "Row"),
    "imagewam_cli.editors.contract": ("Editor",),
    "imagewam_cli.editors.loading.hardware": ("Hardware",),
    "imagewam_cli.editors.settings": ("PrefixOptions",),
    "imagewam_cli.errors": ("ImagewamError",),
    "imagewam_cli.kvcache.reading.reader": ("CacheReader",),
    "imagewam_cli.policy.policy": ("Policy",),
    "imagewam_cli.prefix.kv": ("PrefixKV",),
    "imagewam_cli.training.recipe": ("ExpertRecipe", "FlowRecipe", "OptimizerRecipe", "PolicyRecipe", "TrainRecipe"),
}
"""Module -> the public names that it defines."""

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
