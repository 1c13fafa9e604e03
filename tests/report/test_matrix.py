from __future__ import annotations

from harness.engines.ranks.layout import Layout
from harness.flow.matrix import Cell
from harness.report.matrix import matrix_to_text
from harness.values import PassSummary, Status, Verdict


def _verdict(spec: str, status: Status, ratio: float | None) -> Verdict:
    one = PassSummary(
        question="precision", run="r", view="replay", repeat=0, ratio=ratio, limit=2.0, flips=0, steps=1, seconds=0.0
    )
    return Verdict(golden="g", candidate=spec, status=status, findings=(), passes=(one,))


def test_each_cell_is_a_verdict_or_has_its_reason() -> None:
    """Rows from one process on, a column for each precision, and reasons below."""
    cells = [
        Cell(layout=Layout(tensor=3), dtype="float32", spec="a", reason="its 4 heads cannot be divided"),
        Cell(layout=Layout(tensor=3), dtype="bfloat16", spec="b", reason="its 4 heads cannot be divided"),
        Cell(layout=Layout(), dtype="float32", spec="c", reason=""),
        Cell(layout=Layout(), dtype="bfloat16", spec="d", reason=""),
    ]
    verdicts = [_verdict("c", Status.IDENTICAL, 0.91), _verdict("d", Status.ERROR, None)]
    lines = matrix_to_text(cells, verdicts).splitlines()
    assert lines[0].split() == ["float32", "bfloat16"]
    assert lines[1].split() == ["1", "process", "identical", "0.91", "error"]
    assert lines[2].split() == ["tp", "3", "none", "none"]
    assert lines[3:] == ["no such cell: tp 3: its 4 heads cannot be divided"]


def test_a_reason_is_told_once() -> None:
    """Rows that are missing as a whole are named by themselves, a single cell with its precision."""
    missing = {"deepspeed tp 2": ("float32", "float16"), "deepspeed tp 3": ("float32", "float16"), "hf": ("float16",)}
    cells = [
        Cell(layout=layout, dtype=dtype, spec=f"{layout} {dtype}", reason="install it" if dtype in without else "")
        for layout, without in missing.items()
        for dtype in ("float32", "float16")
    ]
    below = matrix_to_text(cells, []).splitlines()[4:]
    assert below == ["no such cell: hf, float16; deepspeed tp 3; deepspeed tp 2: install it"]
