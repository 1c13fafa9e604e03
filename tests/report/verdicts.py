"""Verdicts as literals, for the tests of every report."""

from __future__ import annotations

from harness.values import Answer, Finding, PassSummary, Power, Status, Verdict

POWER = Power(precision="bfloat16", level="logits", positions=900, steps=100, decidable=97, smallest=1.9)
PASS = PassSummary(
    question="precision", run="batched", view="replay", repeat=0, ratio=0.98, limit=1.9, flips=2, steps=100, seconds=1.0
)
FIX = "compare module by module"
FINDING = Finding(
    status=Status.DEVIATES,
    check="error",
    message="the error is 40 x the reference's own round-off",
    where="batched/replay, all positions",
    measured=40.0,
    allowed=1.9,
    why="t(20) quantile",
    fix=FIX,
)
COMPARED = (Status.IDENTICAL, Status.DRIFT, Status.DEVIATES, Status.NONDETERMINISTIC, Status.UNMEASURED)


def verdict(status: Status = Status.IDENTICAL, message: str = FINDING.message, **more) -> Verdict:
    """A verdict of one status, with a finding that says why unless it is `identical`."""
    compared = status in COMPARED
    finding = Finding(
        status=status, check="error", message=message, where=FINDING.where, measured=40.0, allowed=1.9,
        why=FINDING.why, fix=FIX,
    )  # fmt: skip
    given = {
        "golden": "m/core",
        "candidate": "hf:dtype=bfloat16",
        "status": status,
        "findings": () if status is Status.IDENTICAL else (finding,),
        "answers": (Answer(question="precision", status=status, power=POWER),) if compared else (),
        "passes": (PASS,) if compared else (),
        "seconds": 1.25,
    }
    return Verdict(**(given | more))
