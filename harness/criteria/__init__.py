"""The rules by which other projects compare language models, for the tables of `harness power` alone.

Formulas and thresholds are those that the projects publish; each docstring says what had to be adapted. Every peer
is given its best circumstances: forced logits of decode and of prefill, the worse of which counts, and a reference in
the candidate's own precision unless the rule wants a better one.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.criteria import logits, neuron, probabilities, tokens
from harness.criteria.case import Case, Criterion, Side, View

__all__ = ["CRITERIA", "Case", "Criterion", "Side", "scores"]

_ENTRIES = {
    one.criterion.name: one for one in (*tokens.ENTRIES, *probabilities.ENTRIES, *logits.ENTRIES, *neuron.ENTRIES)
}

#: By name; those that look at least come first.
CRITERIA: Mapping[str, Criterion] = {name: one.criterion for name, one in _ENTRIES.items()}


def scores(case: Case) -> dict[str, float]:
    """The score of every criterion, with the work that they share done once.

    Raises:
        ValueError: for a precision that no peer has a threshold for, and where candidate and references have not the
            same prompts or forced rows.
    """
    view = View(case=case)
    return {name: one.rule(view) for name, one in _ENTRIES.items()}
