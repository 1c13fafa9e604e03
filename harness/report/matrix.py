"""The grid of `check --matrix`: a row for each layout, a column for each precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from harness.report.columns import columns
from harness.values import Verdict


class Cell(Protocol):
    """What the grid needs of a cell."""

    @property
    def layout(self) -> object:
        """What the row is called by."""

    @property
    def dtype(self) -> str:
        """The column."""

    @property
    def spec(self) -> str:
        """What was checked."""

    @property
    def reason(self) -> str:
        """Why there is no such cell; "" where there is."""


def matrix_to_text(cells: Sequence[Cell], verdicts: Sequence[Verdict]) -> str:
    """Status and error of each cell; below, why some cannot exist."""
    by_spec = {one.candidate: one for one in verdicts}
    precisions = list(dict.fromkeys(cell.dtype for cell in cells))
    rows = [["", *precisions]]
    reasons: dict[str, list[str]] = {}
    for layout in reversed(list(dict.fromkeys(str(cell.layout) for cell in cells))):
        row = {cell.dtype: cell for cell in cells if str(cell.layout) == layout}
        rows.append([layout, *(_cell(row[name], by_spec) for name in precisions)])
        for reason in dict.fromkeys(cell.reason for cell in row.values() if cell.reason):
            missing = [cell.dtype for cell in row.values() if cell.reason == reason]
            # A row that is missing as a whole is named by itself.
            names = [layout] if len(missing) == len(precisions) else [f"{layout}, {dtype}" for dtype in missing]
            reasons.setdefault(reason, []).extend(names)
    below = [f"no such cell: {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([*columns(rows), *below])


def _cell(cell: Cell, by_spec: dict[str, Verdict]) -> str:
    verdict = by_spec.get(cell.spec)
    if verdict is None:
        return "none"
    own = [one.ratio for one in verdict.passes if one.ratio is not None and one.question == "precision"]
    shown = own or [one.ratio for one in verdict.passes if one.ratio is not None]
    return f"{verdict.status.value} {max(shown):.2f}" if shown else verdict.status.value
