"""Fit codecs to a sample of a cache's rows, and load fitted codecs from their file."""

from __future__ import annotations

from collections.abc import Sequence

from imagewam_cli.data.spread import spread_rows
from imagewam_cli.data.types import Dataset
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError
from imagewam_cli.files import has_checksum
from imagewam_cli.kvcache.codecs.contract import Codec, FittedCodec
from imagewam_cli.kvcache.format.manifest import CODEC, Manifest
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import KVSpec
from imagewam_cli.registry import Registry

_ROWS_OF_EPISODE = 4
_FEWEST, _MOST = 8, 128
"""Limits on the number of sampled rows."""
_BYTES = 2e9
"""Memory limit for the K and V of the sample."""
_BATCH = 8


def sample_prefixes(editor: Editor, dataset: Dataset, stride: int) -> list[PrefixKV]:
    """Return batches of prefixes of rows spread over the dataset, as many as memory allows."""
    rows = int(min(max(_FEWEST, _BYTES / editor.spec.bytes_per_row(2)), _MOST))
    spread = list(spread_rows(dataset, episodes=-(-rows // _ROWS_OF_EPISODE), rows=_ROWS_OF_EPISODE, stride=stride))
    groups = [spread[i : i + _BATCH] for i in range(0, len(spread), _BATCH)]
    return [editor.encode([r.images for r in few], [r.instruction for r in few]).to("cpu") for few in groups]


def fitted_to(codec: Codec, spec: KVSpec, samples: Sequence[PrefixKV]) -> Codec:
    """Return the codec ready to encode, fitted to the samples if it needs a fit."""
    return codec.fitted(spec, samples) if isinstance(codec, FittedCodec) else codec


def fit_codec(codec: FittedCodec, editor: Editor, dataset: Dataset, stride: int) -> tuple[FittedCodec, bytes]:
    """Return the fitted codec and the content of its file."""
    from safetensors.torch import save

    fitted = codec.fitted(editor.spec, sample_prefixes(editor, dataset, stride))
    data: bytes = save({name: tensor.contiguous() for name, tensor in fitted.state().items()})
    return fitted, data


def stored_codec(storage: Storage, manifest: Manifest) -> Codec:
    """Load the codec of a cache with its fit.

    Raises:
        CacheError: the codec is not installed, or its file is missing or damaged.
    """
    from safetensors.torch import load

    codecs = Registry.installed().codecs
    if manifest.codec not in codecs:
        raise CacheError(
            f"{storage.address} uses the codec {manifest.codec!r}, which is not installed",
            "install the plugin that it was built with; see `imagewam plugins --hook codecs`",
        )
    codec: Codec = codecs.load(manifest.codec)
    if not isinstance(codec, FittedCodec):
        return codec
    checksum = manifest.files.get(CODEC, "")
    path = storage.file(CODEC, checksum)
    if not has_checksum(path, checksum):
        raise CacheError(f"{path} is missing or differs from its checksum", storage.repair)
    return codec.restored(manifest.spec, load(path.read_bytes()))
