"""A bench as text and as plain JSON types: what is known of the model first, then its speed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from harness.report.characters import legal, one_line
from harness.report.columns import columns
from harness.report.limits import neither_binds, percent
from harness.speed.benching import NO_VERDICT, Bench, Plan, Result, Subject, Unmeasured
from harness.speed.kinds.burst import SHARES, Burst
from harness.speed.kinds.completion import Completion
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.modules import PARTS, REST, Modules
from harness.speed.kinds.scaling import Point, Scaling
from harness.speed.kinds.spread import Spread


def bench_to_text(bench: Bench) -> str:
    """The report, plain text without a final newline."""
    blocks = [[NO_VERDICT]] if bench.golden is None else []
    blocks += [_subject(one, bench.plan) for one in bench.subjects]
    return legal("\n\n".join("\n".join(block) for block in blocks))


def _subject(one: Subject, plan: Plan) -> list[str]:
    lines = [] if one.verdict is None else [str(one.verdict["text"])]
    if one.refused:
        assert one.verdict is not None
        return [*lines, f"{one.spec}: refused: it is {one.verdict['status']}, and no speed is told"]
    told = ", ".join(f"{key} {one.settings[key]}" for key in ("dtype", "device", "threads") if one.settings.get(key))
    lines.append(f"{one.spec}{f' ({told})' if told else ''}")
    for kind in plan.kinds:
        if kind in one.results:
            lines += [f"  {line}" for line in _kind(kind, one.results[kind], one)]
    return lines


def _kind(kind: str, found: Result, subject: Subject) -> list[str]:
    if isinstance(found, Unmeasured):
        return [f"{kind}: {'failed' if found.failed else 'unmeasured'}: {one_line(found.reason)}"]
    if isinstance(found, Latency):
        return _latency(found, subject)
    if isinstance(found, Completion):
        return _completion(found)
    if isinstance(found, Burst):
        return _burst(found)
    if isinstance(found, Scaling):
        return _scaling(found)
    return _modules(found)


def _latency(found: Latency, subject: Subject) -> list[str]:
    lines = [
        f"latency: {found.new} greedy tokens after {found.prompt}, batch 1, {found.repeats} runs",
        f"  a token           {_milliseconds(found.token)}",
        f"  the first forward {_milliseconds(found.first)}{_reached(subject, 'prefill', found.first.middle)}",
        f"  each later one    {_milliseconds(found.later)}{_reached(subject, 'decode', found.later.middle)}",
        f"  memory            {_memory(found.memory)}",
    ]
    parts = {"prefill": found.first.middle, "decode": found.later.middle}
    shares = [limit.share(parts[part]) for part, limit in subject.limits.items() if parts[part] > 0]
    return lines + [f"  {line}" for line in neither_binds(shares)]


def _reached(subject: Subject, part: str, seconds: float) -> str:
    limit = subject.limits.get(part)
    if limit is None or seconds <= 0:
        return ""
    return f", {percent(limit.share(seconds))} of the limit by {limit.binds}"


def _completion(found: Completion) -> list[str]:
    seconds = found.seconds
    rate = (
        f"{found.rows / seconds.middle:.1f} rows/s ({found.rows / seconds.high:.1f} to {found.rows / seconds.low:.1f})"
    )
    return [
        f"completion: {found.rows} rows of {found.name}, batch {found.batch}, {found.repeats} runs",
        f"  {rate}, {found.tokens / seconds.middle:.0f} new tokens/s, {_memory(found.memory)}",
    ]


def _burst(found: Burst) -> list[str]:
    size = found.size
    waits = ", ".join(f"p{share} {wait:.2f} s" for share, wait in zip(SHARES, found.waits, strict=True))
    rate, tokens = size.count / found.seconds, size.count * size.new / found.seconds
    prompts = size.count * size.prompt / found.seconds
    return [
        f"burst: {size.count} prompts of {size.prompt} tokens at once, {size.new} new ones each, batch {found.batch}",
        f"  {rate:.2f} requests/s, {prompts:.0f} prompt tokens/s and {tokens:.0f} new ones/s, {_memory(found.memory)}",
        f"  a request is done after {waits}",
    ]


def _scaling(found: Scaling) -> list[str]:
    rows = [
        ("ranks", "threads of each", "ms/token", "efficiency", "verdict"),
        *(_point(found, one) for one in found.points),
    ]
    return [
        "scaling: the latency over ranks; efficiency is the speed of N over N times that of 1",
        *(f"  {line}" for line in columns(rows)),
    ]


def _point(found: Scaling, one: Point) -> tuple[str, ...]:
    if one.latency is None:
        return (str(one.ranks), "", "unmeasured", "", one_line(one.reason))
    share = found.efficiency(one)
    return (
        str(one.ranks),
        "not known" if one.threads is None else str(one.threads),
        f"{1e3 * one.latency.token.middle:.3f}",
        "not known" if share is None else percent(share),
        one.status or "none",
    )


def _modules(found: Modules) -> list[str]:
    phases = tuple(found.shares)
    rows = [("part", *phases)]
    rows += [(part, *(percent(found.shares[phase][part]) for phase in phases)) for part in (*PARTS, REST)]
    title = f"modules: shares of a forward's time on {found.device}, {found.new} tokens after {found.prompt}"
    return [f"{title}, in a run of their own under the profiler", *(f"  {line}" for line in columns(rows))]


def _milliseconds(one: Spread) -> str:
    return f"{1e3 * one.middle:.3f} ms ({1e3 * one.low:.3f} to {1e3 * one.high:.3f})"


def _memory(size: int) -> str:
    return f"peak memory {size / 2**20:.0f} MiB" if size else "peak memory not known"


def bench_to_dict(bench: Bench) -> dict[str, Any]:
    """All of it as plain JSON types, seconds and bytes."""
    return {
        "golden": bench.golden,
        "model": bench.model,
        "note": NO_VERDICT if bench.golden is None else None,
        "exit_code": bench.exit_code,
        "plan": _plain(asdict(bench.plan)),
        "candidates": [_subject_to_dict(one) for one in bench.subjects],
    }


def _subject_to_dict(one: Subject) -> dict[str, Any]:
    return {
        "candidate": one.spec,
        "verdict": None if one.verdict is None else one.verdict["data"],
        "refused": one.refused,
        "settings": dict(one.settings),
        "limits": {part: asdict(limit) for part, limit in one.limits.items()},
        "results": {kind: _result_to_dict(found) for kind, found in one.results.items()},
    }


def _result_to_dict(found: Result) -> dict[str, Any]:
    if isinstance(found, Unmeasured):
        return {"unmeasured": found.reason, "failed": found.failed}
    values: dict[str, Any] = _plain(asdict(found))
    if isinstance(found, Completion):
        values["rows_per_second"] = found.rows / found.seconds.middle
    if isinstance(found, Burst):
        values["requests_per_second"] = found.size.count / found.seconds
        values["waits"] = {f"p{share}": wait for share, wait in zip(SHARES, found.waits, strict=True)}
    if isinstance(found, Scaling):
        for point, told in zip(found.points, values["points"], strict=True):
            told["efficiency"] = found.efficiency(point)
    return values


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
