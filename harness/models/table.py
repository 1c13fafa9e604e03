"""Describe the small models from their goldens: parameters, training loss, margins, coverage."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from harness import checkpoint, store
from harness.models.build import TRAINING
from harness.numerics import metrics
from harness.numerics.constants import COVERAGE_C
from harness.values import Golden

#: Edges of the histogram of margins, in logits.
_EDGES = (0.0, 0.1, 0.3, 1.0, 3.0, np.inf)


def describe(root: Path) -> str:
    """A Markdown table, one row for each model under ``root`` that has a `core` golden."""
    bins = [f"< {high:g}" if np.isfinite(high) else f">= {low:g}" for low, high in itertools.pairwise(_EDGES)]
    titles = ["model", "parameters", "dtype", "training loss", *(f"margin {label}" for label in bins), "coverage bf16"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for directory in sorted(root.glob("*/core")):
        lines.append("| " + " | ".join(_row(directory.parent, store.read_golden(directory))) + " |")
    return "\n".join(lines)


def _row(directory: Path, golden: Golden) -> list[str]:
    model = directory / "model"
    identity = checkpoint.identify(model)
    trained = json.loads((model / TRAINING).read_text(encoding="utf-8"))
    margin = metrics.margins(golden.rows.top_logits)
    shares = np.histogram(margin, bins=np.array(_EDGES))[0] / len(margin)
    return [
        directory.name,
        f"{identity.parameters:,}",
        identity.dtype,
        f"{trained['loss']:.2f}",
        *(f"{share:.1%}" for share in shares),
        f"{coverage(golden, 'bfloat16'):.1%}",
    ]


def coverage(golden: Golden, precision: str) -> float:
    """Share of generated steps whose margin exceeds COVERAGE_C times the step's noise (numerics 2.6)."""
    margin = metrics.margins(golden.centre_rows(precision).top_logits)
    return float(np.mean(margin > COVERAGE_C * golden.floors[precision].pair))
