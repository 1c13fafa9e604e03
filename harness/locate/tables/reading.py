"""All settings and derived tables of both sides, compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.locate.clues import Clue
from harness.locate.tables.buffers import buffers
from harness.locate.tables.formulas import formulas
from harness.locate.tables.reference import Reference, reference_of, text_config
from harness.locate.tables.rotary import rotary_tables
from harness.locate.tables.settings import settings
from harness.locate.tables.slopes import slope_tables

if TYPE_CHECKING:
    from torch import nn


def tables(reference: nn.Module | Path | Any, model: nn.Module) -> tuple[Clue, ...]:
    """Compare the settings and the derived tables of a live candidate with the reference's.

    Rotary frequencies, their cosines and sines, and ALiBi slopes are compared with what the reference's configuration
    leads to in float64, within what float32 arithmetic may miss it by. Plain settings of configs and modules must be
    equal; activations and norms must be nearest to the same formula. The model is not run; single tables, activations
    and norms are, in copies.

    Args:
        reference: a live model, a config of transformers, or a model directory.
        model: the candidate. Where its modules have other names, settings go by what they are called.

    Returns:
        Deviations, in the order of the candidate's modules, the configuration first.
    """
    right = reference_of(reference)
    return tuple(
        _unique(
            [
                *settings(right, model),
                *rotary_tables(right, model),
                *slope_tables(right, model),
                *formulas(right, model),
                *buffers(right, model),
                *_vocabulary(right, model),
            ]
        )
    )


def _unique(clues: list[Clue]) -> Iterator[Clue]:
    """Modules may share a submodule: what is said of a place is said once."""
    seen: set[tuple[str, str, str]] = set()
    for clue in clues:
        key = (clue.module, clue.tensor, clue.text)
        if key not in seen:
            seen.add(key)
            yield clue


def _vocabulary(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    """The head must have a row for each token; more are padding."""
    size = getattr(text_config(reference.config), "vocab_size", None)
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    weight = getattr(head, "weight", None)
    if isinstance(size, int) and weight is not None and len(weight) < size:
        name = next((name for name, module in model.named_modules() if module is head), "")
        text = f"{len(weight)} logits for a vocabulary of {size}"
        yield Clue(kind="config", module=name, text=text, wrong=True, size=1 - len(weight) / size)
