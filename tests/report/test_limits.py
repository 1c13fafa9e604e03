"""What is said of limits, beside a gate and alone."""

from dataclasses import replace

import pytest

from harness.report.gate import gate_to_dict, gate_to_text
from harness.report.limits import neither_binds, percent, roofline_line
from harness.speed.machine import Machine
from harness.speed.roofline import Limit, Roofline
from tests.report.test_gate import GATE, MEASURE

MACHINE = Machine(bandwidth=12.34e9, rate=98.7e9, dtype="float32", device="cpu", threads=2)
LIMIT = Limit(seconds=0.0002, binds="bytes", bytes=100.0, operations=7.0)
ROOFLINE = Roofline(machine=MACHINE, limits={("decode", 8, 128): LIMIT})


@pytest.mark.parametrize(("share", "said"), [(1.5, "150 %"), (0.234, "23 %"), (0.0123, "1.2 %"), (0.00056, "0.056 %")])
def test_small_shares_keep_two_digits(share, said):
    """And large ones are whole."""
    assert percent(share) == said


def test_the_machine_is_told_with_threads_or_device():
    """Speeds with their units, or why there are none."""
    assert roofline_line(ROOFLINE, "base") == (
        "limit of the base: copies at 12.3 GB/s, float32 products at 98.7 G operations/s (2 threads), "
        "measured in its process"
    )
    assert "(1 thread)," in roofline_line(Roofline(machine=replace(MACHINE, threads=1)), "base")
    assert "(cuda)," in roofline_line(Roofline(machine=replace(MACHINE, device="cuda")), "base")
    assert roofline_line(Roofline(reason="no\nconfig"), "base") == "limit of the base: not known (no config)"
    assert roofline_line(Roofline(), "base") == ""


def test_only_far_from_the_limit_neither_binds():
    """Half of it is near enough to say nothing."""
    assert neither_binds([]) == neither_binds([0.1, 0.5]) == []
    assert "at most 49 % of the limit" in neither_binds([0.1, 0.49])[0]


def test_a_gate_shows_the_share_of_both_sides():
    """200 microseconds of 4 and of 5 milliseconds; a side without a limit says so."""
    both = replace(GATE, measures=(replace(MEASURE, base_limit=LIMIT, candidate_limit=LIMIT),),
                   rooflines=(ROOFLINE, ROOFLINE))  # fmt: skip
    text = gate_to_text(both)
    row = next(line for line in text.splitlines() if line.startswith("decode at batch 8"))
    assert "5 % of bytes, 4 % of bytes" in row
    assert "waits for Python" in text
    (one,) = gate_to_dict(both)["measures"]
    assert one["candidate_limit"]["share"] == pytest.approx(0.04)
    assert gate_to_dict(both)["machine"]["base"]["bandwidth"] == 12.34e9
    half = replace(GATE, measures=(replace(MEASURE, base_limit=LIMIT),), rooflines=(ROOFLINE, Roofline(reason="no")))
    assert "5 % of bytes, not known" in gate_to_text(half)
    assert "limit of the candidate: not known (no)" in gate_to_text(half)
    assert gate_to_dict(half)["measures"][0]["candidate_limit"] is None
    assert gate_to_dict(half)["machine"]["candidate"] is None
