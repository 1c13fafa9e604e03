"""A golden against its own model: the recorded tokens scored again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harness import checkpoint, scorer
from harness.changes import compare_prompt, yardstick
from harness.errors import HarnessError
from harness.lint.anomaly import RECORD_AGAIN, Anomaly
from harness.lint.tree import beside
from harness.values import Golden, Kind


def look(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    """Positions at which the model no longer says what was recorded; nothing where it is not at hand, or another."""
    path = beside(directory, golden.model.path)
    engine = golden.provenance.get("engine")
    if engine not in ("hf", "stream") or path is None or not path.is_dir():
        return
    stream = "stream" if engine == "stream" else ""  # it may not fit into memory
    forced = list(enumerate(golden.continuations))
    try:
        if checkpoint.identify(path).digest != golden.model.digest:
            return  # that is said already, and its logits say nothing about this golden
        rows = scorer.rescore(
            str(path), golden.requests, forced, precision=golden.precision, weights=None, stream=stream
        )
    except HarnessError as error:
        yield Anomaly(kind="unreadable", path=path, message=error.problem, fix=error.fix)
        return
    today = replace(golden, rows=rows)
    yard = yardstick(golden, today)
    for index, request in enumerate(golden.requests):
        compared = compare_prompt(golden, index, today, index, yard)
        if compared.change.kind is Kind.BUG_SIZED:
            times = "" if compared.times is None else f" ({compared.times:.3g} x the limit)"
            yield Anomaly(
                kind="anomaly",
                path=directory,
                where=f"prompt {request.id!r}, position {compared.position}",
                message=f"its model was asked again and says another thing: {compared.change.message}{times}",
                fix=RECORD_AGAIN.format(directory),
            )
