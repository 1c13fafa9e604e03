"""Verdicts as JSON: everything in it, nothing that JSON lacks."""

from __future__ import annotations

import json

from harness.values import Finding, Power, Status, Verdict


def test_a_verdict_becomes_plain_json():
    """Statuses become words, NaN and infinities null, and the whole survives a strict JSON round trip."""
    finding = Finding(status=Status.DEVIATES, check="logits", message="m", measured=float("nan"), allowed=float("inf"))
    verdict = Verdict(
        golden="g",
        candidate="c",
        status=Status.DEVIATES,
        findings=(finding,),
        power=Power(precision="float32", positions=3, steps=2, decidable=1, smallest=3.0, unmeasured=("x",)),
        settings={"dtype": "float32", "versions": {"torch": "2"}},
        seconds=1.25,
    )
    data = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert data["status"] == "deviates"
    assert data["exit_code"] == 1
    assert data["findings"][0]["measured"] is None
    assert data["findings"][0]["allowed"] is None
    assert data["power"]["coverage"] == 0.5
    assert data["settings"]["versions"]["torch"] == "2"
