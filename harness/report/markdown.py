"""Verdicts as Markdown: a table, and what is not ok folded below it; for GitHub's step summaries and comments."""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.report.characters import one_line
from harness.report.terminal import table_cells, table_titles, verdict_to_text
from harness.values import Verdict

#: Bytes that GitHub takes of one step; it drops the whole of a larger summary.
_LIMIT = 1024 * 1024
#: Bytes of one report, and of all: one bad candidate must not crowd out the others, and other tools write here too.
_REPORT = 64 * 1024
_REPORTS = 768 * 1024
#: Characters of a report's title.
_TITLE = 300
#: What stands before each report, and in no cell of the table, where `<` is escaped.
_DETAILS = "\n<details>"
_PUNCTUATION = re.compile(r"([\\`*_\[\]<>|~&$])")


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A heading with counts, a table of all verdicts, and the report of each that is not ok."""
    heading = f"### golden-harness: {_counts(verdicts)}\n"
    return "\n".join([heading, *_table(verdicts), *_reports([one for one in verdicts if not one.ok])]) + "\n"


def append_step_summary(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Append to the summary of a GitHub step, where there is one.

    Where the step's summary has no room for the reports, the table alone is written, else nothing.

    Returns:
        Whether something was written. A summary that cannot be written is no reason to fail a check.
    """
    file = environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return False
    try:
        with Path(file).open("ab") as summary:
            payload = _fitting(text, _LIMIT - summary.tell())
            summary.write(payload)
    except OSError:
        return False
    return bool(payload)


def _fitting(text: str, room: int) -> bytes:
    """The text, its table alone, or nothing, whichever has room."""
    # What follows must begin on a line of its own.
    whole = text if text.endswith("\n") else f"{text}\n"
    table, reports, _ = whole.partition(_DETAILS)
    short = f"{table}\nThe reports are left out: a step summary holds 1 MiB.\n" if reports else ""
    for one in (whole, short):
        payload = one.encode("utf-8", "replace")
        if len(payload) <= room:
            return payload
    return b""


def _counts(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.status.value for verdict in verdicts)
    words = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{len(verdicts)} check{'' if len(verdicts) == 1 else 's'}" + (f": {words}" if words else "")


def _table(verdicts: Sequence[Verdict]) -> list[str]:
    titles = table_titles()
    rows = [_row([_escaped(cell) for cell in table_cells(verdict)]) for verdict in verdicts]
    return [_row(titles), _row(["---"] * len(titles)), *rows]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that means nothing in Markdown, in a table or in HTML."""
    return _PUNCTUATION.sub(r"\\\1", one_line(text))


def _reports(verdicts: Sequence[Verdict]) -> list[str]:
    """Reports as long as there is room, and how many there was none for."""
    blocks: list[str] = []
    room = _REPORTS
    for verdict in verdicts:
        block = _report(verdict)
        room -= len(block.encode())
        if room < 0:
            left = len(verdicts) - len(blocks)
            return [*blocks, f"\n{left} more report{'' if left == 1 else 's'} left out: a step summary holds 1 MiB."]
        blocks.append(block)
    return blocks


def _report(verdict: Verdict) -> str:
    title = one_line(f"{verdict.status.value}: {verdict.candidate} against {verdict.golden}")[:_TITLE]
    text = _shortened(verdict_to_text(verdict))
    # A fence ends at the first line of as many backticks as it began with: one more than the text has in a row.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{_DETAILS}<summary>{html.escape(title)}</summary>\n\n{fence}text\n{text}\n{fence}\n\n</details>"


def _shortened(text: str) -> str:
    payload = text.encode()
    if len(payload) <= _REPORT:
        return text
    return payload[:_REPORT].decode("utf-8", "ignore") + "\n(shortened: --json FILE has all of it)"
