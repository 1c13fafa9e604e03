"""A gate in words: verdicts first, no speed without them, and what decided."""

from dataclasses import replace

import pytest

from harness.numerics.ratios import Interval
from harness.report.gate import conclusion, gate_to_dict, gate_to_markdown, gate_to_text
from harness.speed.judging import Gate, Measure, Outcome

OK = {"ok": True, "exit_code": 0, "status": "drift", "text": "drift: hf\n  more of it", "data": {"status": "drift"}}
WRONG = {"ok": False, "exit_code": 1, "status": "deviates", "text": "deviates: it", "data": {"status": "deviates"}}

MEASURE = Measure(
    part="decode",
    batch=8,
    prompt=128,
    base=0.004,
    candidate=0.005,
    ratio=Interval(low=1.2, middle=1.25, high=1.3),
    limit=1.05,
    outcome=Outcome.BEYOND,
    rounds=24,
    base_memory=2**20,
    candidate_memory=3 * 2**20,
)
GATE = Gate(golden="m/core", base="hf", candidate="tp", base_verdict=OK, verdict=OK, measures=(MEASURE,), rounds=24)


def test_verdicts_stand_before_any_speed():
    """Base and candidate are judged in the first lines, each line of a verdict in its block."""
    lines = gate_to_text(GATE).splitlines()
    assert lines[:2] == ["base:      drift: hf", "             more of it"]
    assert lines[2].startswith("candidate: drift: hf")
    assert next(number for number, line in enumerate(lines) if "ms/step" in line) > 3


def test_a_row_has_times_ratio_limit_and_memory():
    """Milliseconds a step of the batch, tokens of all its rows a second."""
    row = next(line for line in gate_to_text(GATE).splitlines() if line.startswith("decode at batch 8"))
    assert row.split("  ")[0] == "decode at batch 8"
    for word in (
        "4.000 ms/step",
        "5.000 ms/step",
        "1.250",
        "1.200 to 1.300",
        "1.050",
        "1600",
        "3 MiB",
        "beyond the limit",
    ):
        assert word in row


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (GATE, "refused: decode at batch 8 takes 1.250 x the base's time (1.200 to 1.300), and 1.050 is allowed"),
        (replace(GATE, measures=(replace(MEASURE, outcome=Outcome.UNSURE),)), "not passed: decode at batch 8"),
        (
            replace(GATE, measures=(replace(MEASURE, outcome=Outcome.WITHIN),)),
            "passed (decode at batch 8 0.80 x as fast)",
        ),
        (
            replace(GATE, verdict=WRONG),
            "refused: the candidate is deviates, whatever its speed (decode at batch 8 0.80",
        ),
        (replace(GATE, verdict=WRONG, measures=()), "refused: the candidate is deviates"),
        (replace(GATE, base_verdict=WRONG, measures=()), "not judged: the base is deviates"),
    ],
)
def test_the_last_line_says_what_was_decided(gate, words):
    """And why, with the figures that decided."""
    assert conclusion(gate).startswith(words)
    assert gate_to_text(gate).splitlines()[-1].startswith(f"gate: {words}")


def test_json_has_both_verdicts_and_every_figure():
    """Plain values, seconds and bytes."""
    found = gate_to_dict(GATE)
    assert (found["ok"], found["exit_code"], found["rounds"]) == (False, 1, 24)
    assert (found["verdict"]["status"], found["base_verdict"]["status"]) == ("drift", "drift")
    (one,) = found["measures"]
    assert (one["ratio"], one["low"], one["high"], one["outcome"]) == (1.25, 1.2, 1.3, "beyond")
    assert (one["base_seconds"], one["candidate_memory"], one["tokens_per_second"]) == (0.004, 3 * 2**20, 1600)


def test_no_text_of_a_verdict_can_end_its_block():
    """A port's words are shown, and are no Markdown of ours."""
    verdict = {**WRONG, "text": "deviates\n```\n# forged heading"}
    lines = gate_to_markdown(replace(GATE, verdict=verdict)).splitlines()
    assert "    # forged heading" in lines
    assert "# forged heading" not in lines
    assert lines[0].startswith("### gate: refused")
