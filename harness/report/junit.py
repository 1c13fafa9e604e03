"""Verdicts as JUnit XML, which CI servers show as tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree

from harness.report.characters import legal
from harness.report.terminal import headline, verdict_to_text
from harness.values import Verdict

_DECLARATION = '<?xml version="1.0" encoding="utf-8"?>\n'


def to_junit(verdicts: Sequence[Verdict]) -> str:
    """One test case a verdict: its class is the golden, its name the candidate, its time in seconds.

    A failed verdict is a failure; one that is `unmeasured`, `stale` or `error` is an error, so it is no pass either.
    """
    kinds = [_kind(verdict) for verdict in verdicts]
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "time": f"{sum(verdict.seconds for verdict in verdicts):.3f}",
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "golden-harness", **counts, "skipped": "0"})
    for verdict, kind in zip(verdicts, kinds, strict=True):
        _add_case(suite, verdict, kind)
    ElementTree.indent(root)
    return _DECLARATION + ElementTree.tostring(root, encoding="unicode") + "\n"


def _kind(verdict: Verdict) -> Literal["failure", "error"] | None:
    if verdict.ok:
        return None
    return "failure" if verdict.status.exit_code == 1 else "error"


def _add_case(suite: ElementTree.Element, verdict: Verdict, kind: Literal["failure", "error"] | None) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {
            "classname": legal(verdict.golden),
            "name": legal(verdict.candidate),
            "time": f"{verdict.seconds:.3f}",
        },
    )
    if kind is None:
        ElementTree.SubElement(case, "system-out").text = headline(verdict)
        return
    text = verdict_to_text(verdict)
    said = {"type": verdict.status.value, "message": text.partition("\n")[0]}
    ElementTree.SubElement(case, kind, said).text = text
