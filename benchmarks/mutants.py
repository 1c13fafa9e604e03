"""What simple bugs do to each small model, by question, and what comparing strings would have seen.

    python benchmarks/mutants.py

Every bug is applied to a live model loaded in bfloat16, which is then checked on `core` (or --suite; the quick runs):
as shipped (precision), and as its own float32 copy (function). --host leaves the other models out. Prints the table of
docs/power.md: one line a bug and host.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch

import harness
from harness.engines import hf
from harness.mutations.catalogue import CATALOGUE
from harness.values import PassSummary, Verdict

_NAMES = (
    "none",
    "x-row-scaled",
    "wc-eps",
    "na-gelu",
    "x-rows-swapped",
    "x-attention-scale",
    "x-qkv-bias-lost",
    "x-bias-doubled",
    "x-kv-head-swapped",
    "x-last-layer",
)


def main() -> None:
    """Put every bug into a fresh copy of every host that has the part, and check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="core")
    parser.add_argument("--host", default="*")
    arguments = parser.parse_args()
    print("| bug | host | function | error | tokens | precision (bf16) | error | largest z | tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in _NAMES:
        for directory in sorted(Path("golden").glob(f"{arguments.host}/{arguments.suite}")):
            host = directory.parent.name
            if name != "none" and host not in CATALOGUE[name].hosts:
                continue
            golden = harness.load_golden(directory)
            with ExitStack() as stack:
                engine = stack.enter_context(hf.from_model(harness.reference_model(golden, dtype=torch.bfloat16)))
                if name != "none":
                    stack.enter_context(CATALOGUE[name].applied(engine))
                verdict = harness.check(golden, engine.model, quick=True)
            cells = [name, host, *_cells(verdict, "function")]
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
