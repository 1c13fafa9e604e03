"""A gate as text, as plain JSON types, and as Markdown: the verdicts first, and no speed without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harness.report.characters import legal
from harness.report.columns import columns
from harness.report.limits import neither_binds, percent, roofline_line
from harness.speed.judging import ERROR, Gate, Measure, Outcome, precision
from harness.speed.roofline import Limit

_HEADINGS = (
    "what",
    "base",
    "candidate",
    "candidate/base",
    "interval",
    "limit",
    "tokens/s",
    "memory",
    "",
    "share of the limit",
)


def gate_to_text(gate: Gate) -> str:
    """The report of one gate, plain text without a final newline."""
    lines = [] if gate.base_verdict["ok"] else ["the base is not the golden's model, and nothing can be gated by it:"]
    lines += [f"base:      {_indented(gate.base_verdict['text'])}", f"candidate: {_indented(gate.verdict['text'])}"]
    if gate.measures:
        lines += ["", *columns([_HEADINGS, *(_row(one) for one in gate.measures)])]
        chance = f"{100 * ERROR:g} %"
        lines += [
            f"{_rounds(gate.measures)} rounds, each of new processes on the same processors",
            f"chance that what is beyond a limit passes, and that what is within all is refused: {chance} at most each",
        ]
        lines += _limits(gate)
    return legal("\n".join([*lines, f"gate: {conclusion(gate)}"]))


def _rounds(measures: Sequence[Measure]) -> str:
    """How many: of each measure, where one was decided before another."""
    counts = sorted({one.rounds for one in measures})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _limits(gate: Gate) -> list[str]:
    """What the shares of the limit are of, and what they mean."""
    names = ("base", "candidate")
    lines = [roofline_line(one, name) for name, one in zip(names, gate.rooflines, strict=True)]
    shares = [
        limit.share(seconds)
        for one in gate.measures
        for limit, seconds in ((one.base_limit, one.base), (one.candidate_limit, one.candidate))
        if limit is not None
    ]
    return [line for line in lines if line] + neither_binds(shares)


def conclusion(gate: Gate) -> str:
    """What is decided, in one line."""
    if not gate.base_verdict["ok"]:
        return f"not judged: the base is {gate.base_verdict['status']}"
    if not gate.verdict["ok"]:
        bought = f", whatever its speed ({_speeds(gate.measures)})" if gate.measures else ""
        return f"refused: the candidate is {gate.verdict['status']}{bought}"
    for outcome, words in ((Outcome.BEYOND, "refused"), (Outcome.UNSURE, "not passed")):
        found = [one for one in gate.measures if one.outcome is outcome]
        if found:
            return f"{words}: {'; '.join(_why(one) for one in found)}"
    return f"passed ({_speeds(gate.measures)})"


def _why(one: Measure) -> str:
    assert one.limit is not None
    said = f"{_name(one)} takes {one.ratio.middle:.3f} x the base's time ({one.ratio.low:.3f} to {one.ratio.high:.3f})"
    if one.outcome is Outcome.UNSURE:
        return f"{said}, too noisy to tell it from the limit {one.limit:.3f}; a quieter machine or more --rounds may"
    return f"{said}, and {one.limit:.3f} is allowed"


def _speeds(measures: Sequence[Measure]) -> str:
    return ", ".join(f"{_name(one)} {1 / one.ratio.middle:.2f} x as fast" for one in measures)


def _name(one: Measure) -> str:
    return f"{one.part} at batch {one.batch}"


def _row(one: Measure) -> tuple[str, ...]:
    unit = "ms/token" if one.part == "prefill" else "ms/step"
    scale = 1e3 / (one.tokens if one.part == "prefill" else 1)
    return (
        _name(one),
        f"{scale * one.base:.3f} {unit}",
        f"{scale * one.candidate:.3f} {unit}",
        f"{one.ratio.middle:.3f}",
        f"{one.ratio.low:.3f} to {one.ratio.high:.3f}",
        "none" if one.limit is None else f"{one.limit:.3f}",
        f"{one.tokens / one.candidate:.0f}",
        f"{one.candidate_memory / 2**20:.0f} MiB" if one.candidate_memory else "not known",
        f"{_reached(one.base_limit, one.base)}, {_reached(one.candidate_limit, one.candidate)}",
        one.outcome.value,
    )


def _reached(limit: Limit | None, seconds: float) -> str:
    return "not known" if limit is None else f"{percent(limit.share(seconds))} of {limit.binds}"


def _indented(text: str) -> str:
    return text.replace("\n", "\n           ")


def gate_to_dict(gate: Gate) -> dict[str, Any]:
    """All of it as plain JSON types, seconds and bytes."""
    return {
        "golden": gate.golden,
        "base": gate.base,
        "candidate": gate.candidate,
        "ok": gate.ok,
        "exit_code": gate.exit_code,
        "conclusion": conclusion(gate),
        "base_verdict": gate.base_verdict["data"],
        "verdict": gate.verdict["data"],
        "rounds": gate.rounds,
        "errors": {"passes_what_is_beyond": ERROR, "refuses_what_is_within": ERROR},
        "settings": {"base": dict(gate.settings[0]), "candidate": dict(gate.settings[1])},
        "machine": {
            name: None if one.machine is None else asdict(one.machine)
            for name, one in zip(("base", "candidate"), gate.rooflines, strict=True)
        },
        "measures": [_measure_to_dict(one) for one in gate.measures],
    }


def _share_to_dict(limit: Limit | None, seconds: float) -> dict[str, Any] | None:
    return None if limit is None else {"share": limit.share(seconds), **asdict(limit)}


def _measure_to_dict(one: Measure) -> dict[str, Any]:
    return {
        "part": one.part,
        "rounds": one.rounds,
        "batch": one.batch,
        "prompt": one.prompt,
        "base_seconds": one.base,
        "candidate_seconds": one.candidate,
        "ratio": one.ratio.middle,
        "low": one.ratio.low,
        "high": one.ratio.high if math.isfinite(one.ratio.high) else None,
        "precision": precision(one) if math.isfinite(precision(one)) else None,
        "limit": one.limit,
        "outcome": one.outcome.name.lower(),
        "tokens_per_second": one.tokens / one.candidate,
        "base_memory": one.base_memory,
        "candidate_memory": one.candidate_memory,
        "base_limit": _share_to_dict(one.base_limit, one.base),
        "candidate_limit": _share_to_dict(one.candidate_limit, one.candidate),
    }


def gate_to_markdown(gate: Gate) -> str:
    """A summary for a pull request."""
    lines = [f"### gate: {conclusion(gate)}", "", f"{gate.candidate} beside {gate.base}, {gate.golden}", ""]
    if gate.measures:
        table = [_HEADINGS, ("---",) * len(_HEADINGS), *(_row(one) for one in gate.measures)]
        lines += ["|".join(("", *row, "")) for row in table]
    for name, verdict in (("base", gate.base_verdict), ("candidate", gate.verdict)):
        # Four spaces: no text can end such a block.
        lines += ["", f"{name}:", "", *(f"    {line}" for line in str(verdict["text"]).splitlines())]
    return legal("\n".join(lines) + "\n")
