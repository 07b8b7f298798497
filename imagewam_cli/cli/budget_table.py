"""`imagewam cache plan --budget`: every setting that fits, the one to take first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imagewam_cli.cli.output import bytes_text, table

if TYPE_CHECKING:
    from imagewam_cli.cache_study.budget import Choice
    from imagewam_cli.data.types import Dataset, Row
    from imagewam_cli.editors.contract import Editor


def choices_within(
    editor: Editor, dataset: Dataset, stride: int, sample: Sequence[Row], rows: int, budget: float
) -> tuple[Choice, ...]:
    """Settings that fit, by what this sample loses; the first is the one to take.

    Raises:
        UsageError: nothing fits; says what the smallest needs.
    """
    import torch

    from imagewam_cli.cache_study.budget import choices, fitting
    from imagewam_cli.errors import UsageError
    from imagewam_cli.kvcache.building.encoding import instructions_of
    from imagewam_cli.kvcache.codecs.fitting import sample_prefixes
    from imagewam_cli.registry import Registry

    entries = Registry.installed().codecs
    codecs = {entry.name: entries.load(entry.name) for entry in entries}
    exact = editor.encode([r.images for r in sample], [r.instruction for r in sample]).to("cpu", torch.float32)
    settings = editor.settings
    tried = choices(
        editor.spec,
        exact,
        codecs,
        rows=rows,
        instructions=len(instructions_of(dataset)),
        samples=sample_prefixes(editor, dataset, stride),
        layers=settings.layers,
        pool=settings.pool,
    )
    found = fitting(tried, budget)
    if not found:
        least = min(tried, key=lambda choice: choice.total_bytes)
        raise UsageError(
            f"nothing fits {bytes_text(budget)}: {least.options} still needs {bytes_text(least.total_bytes)}",
            "raise --budget, or take fewer rows with --stride",
        )
    return found


def budget_text(found: Sequence[Choice], budget: float) -> str:
    """Of each pooling and thinning the codec that loses least."""
    from imagewam_cli.cache_study.budget import best_codecs

    shown = [_cells(choice, "<- take this" if choice is found[0] else "") for choice in best_codecs(found)]
    head = ["codec", "pool", "layers", "a row", "in all", "error of attention", ""]
    return (
        f"within {bytes_text(budget)}, first precision goes, then places, then layers "
        f"(errors compare what has the same layers):\n{table(head, shown)}\n{found[0].options}"
    )


def choice_values(found: Sequence[Choice]) -> dict[str, Any]:
    """For JSON: the one to take, and all."""
    from imagewam_cli.config import to_dict

    return {"choice": to_dict(found[0]), "choices": [to_dict(choice) for choice in found]}


def _cells(choice: Choice, mark: str) -> list[str]:
    sizes = [bytes_text(choice.bytes_per_row), bytes_text(choice.total_bytes)]
    return [choice.codec, str(choice.pool), choice.layers, *sizes, f"{100 * choice.attention:.2f} %", mark]
