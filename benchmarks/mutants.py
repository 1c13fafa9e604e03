"""What simple bugs do to each small model, by question, and what comparing strings would have seen.

    python benchmarks/mutants.py

Every bug is applied to a live model loaded in bfloat16, which is then checked on `core` (the quick runs): as shipped
(precision), and as its own float32 copy (function). Prints the table of docs/power.md: one line a bug and host.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import harness
from harness.values import PassSummary, Verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.meta.mutants import MUTANTS


def main() -> None:
    """Apply every mutant to a fresh copy of every host, and check it."""
    print("| bug | host | function | error | tokens | precision (bf16) | error | largest z | tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, mutate in {"none": lambda _model: None, **MUTANTS}.items():
        for directory in sorted(Path("golden").glob("*/core")):
            golden = harness.load_golden(directory)
            model = harness.reference_model(golden, dtype=torch.bfloat16)
            try:
                mutate(model)
            except LookupError:
                continue
            verdict = harness.check(golden, model, quick=True)
            cells = [name, directory.parent.name, *_cells(verdict, "function")]
            shipped = _cells(verdict, "precision")
            print("| " + " | ".join([*cells, *shipped[:2], _largest(verdict), shipped[2]]) + " |", flush=True)


def _cells(verdict: Verdict, question: str) -> list[str]:
    """Status of a question, error of its replay over round-off, and whether strings would have told."""
    answer = next(one for one in verdict.answers if one.question == question)
    replay = _replay(verdict, question)
    same = "equal" if not replay.flips else f"{replay.flips} of {replay.steps} differ"
    return [str(answer.status), f"{replay.ratio:,.2f}", same]


def _replay(verdict: Verdict, question: str) -> PassSummary:
    return next(one for one in verdict.passes if one.view == "replay" and one.question == question)


def _largest(verdict: Verdict) -> str:
    """The pooled statistic of the run as shipped that lies furthest out."""
    pooled = [one for one in verdict.statistics if one.question == "precision" and one.unit == "all"]
    found = max(pooled, key=lambda one: abs(one.z))
    return f"{found.z:+.1f} ({found.name})"


if __name__ == "__main__":
    main()
