"""What simple bugs do to each small model in fp32, and how many greedy tokens each one flips.

    python benchmarks/mutants.py

Prints the table of docs/first-verdict.md: one line a bug and host.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import harness

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.meta.mutants import MUTANTS


def main() -> None:
    """Apply every mutant to a fresh copy of every host, and check it."""
    print("| bug | host | verdict | error / round-off | greedy tokens flipped |")
    print("|---|---|---|---|---|")
    for name, mutate in {"none": lambda _model: None, **MUTANTS}.items():
        for directory in sorted(Path("golden").glob("*/core")):
            golden = harness.load_golden(directory)
            model = harness.reference_model(golden, dtype=torch.float32)
            try:
                mutate(model)
            except LookupError:
                continue
            verdict = harness.check(golden, model, quick=True)
            replay = next(one for one in verdict.passes if one.view == "replay")
            print(
                f"| {name} | {directory.parent.name} | {verdict.status} | {replay.ratio:,.1f} | "
                f"{replay.flips} of {replay.steps} |"
            )


if __name__ == "__main__":
    main()
