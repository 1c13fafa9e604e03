"""Markdown: a table and folded reports that no text can break, and GitHub's step summary."""

from __future__ import annotations

import html
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from harness.report.characters import one_line
from harness.report.markdown import append_step_summary, to_markdown
from harness.report.terminal import table_cells, table_titles, verdict_to_text
from harness.values import Status
from tests.report.verdicts import verdict

LIMIT = 1024 * 1024


def _tokens(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def _cells(text):
    """Rows of every table, each cell as the plain text that a reader sees."""
    rows = []
    for token, inside in zip(_tokens(text), _tokens(text)[1:], strict=False):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            assert {child.type for child in inside.children} <= {"text", "text_special"}
            rows[-1].append("".join(child.content for child in inside.children))
    return rows


def _fences(text):
    return [token.content for token in _tokens(text) if token.type == "fence"]


def test_a_heading_counts_and_a_table_has_all():
    """The heading says how many are what; each verdict is a row with the cells of the terminal's table."""
    verdicts = [verdict(), verdict(Status.DEVIATES), verdict(Status.STALE), verdict()]
    text = to_markdown(verdicts)
    assert text.startswith("### golden-harness: 4 checks: 1 deviates, 2 identical, 1 stale\n")
    assert _cells(text) == [list(table_titles()), *(list(table_cells(one)) for one in verdicts)]
    assert {"status", "golden", "candidate", "tokens", "decidable", "seconds"} <= set(table_titles())


def test_what_is_not_ok_is_folded_below():
    """Each verdict that is not ok has one block with its report, word for word; an ok one has none."""
    failed, stale = verdict(Status.DEVIATES), verdict(Status.STALE)
    text = to_markdown([verdict(), failed, stale, verdict(Status.DRIFT)])
    assert _fences(text) == [f"{verdict_to_text(one)}\n" for one in (failed, stale)]
    blocks = [token.content.strip() for token in _tokens(text) if token.type == "html_block"]
    assert [block for block in blocks if block != "</details>"] == [
        f"<details><summary>{one.status.value}: {one.candidate} against {one.golden}</summary>"
        for one in (failed, stale)
    ]
    assert blocks.count("</details>") == 2
    assert "<details>" not in to_markdown([verdict(), verdict(Status.DRIFT)])


def test_no_verdict_is_said():
    """Nothing checked is a heading and an empty table."""
    assert to_markdown([]).startswith("### golden-harness: 0 checks\n")


@given(st.text(st.characters(), max_size=60) | st.text("`~|\\<>&*_[]()#!\n -", max_size=60))
def test_no_text_breaks_out(said):
    """A candidate or a port's words change neither the table nor the number of blocks, and are shown as they are."""
    one = verdict(Status.ERROR, message=f"x{said}", candidate=f"c{said}")
    text = to_markdown([one, verdict()])
    text.encode("utf-8")
    rows = _cells(text)
    assert len(rows) == 3
    assert rows[1][2] == one_line(f"c{said}")
    assert _fences(text) == [f"{verdict_to_text(one)}\n"]
    kinds = {token.type for token in _tokens(text)}
    assert kinds <= {"heading_open", "inline", "heading_close", "table_open", "thead_open", "tr_open", "th_open",
                     "th_close", "tr_close", "thead_close", "tbody_open", "td_open", "td_close", "tbody_close",
                     "table_close", "html_block", "fence"}  # fmt: skip
    summary = re.search("<summary>(.*)</summary>", text)
    assert html.unescape(summary[1]) == one_line(f"error: c{said} against m/core")


def test_real_verdicts(real_verdicts):
    """Verdicts of real checks: five rows, four reports, the hostile words of an exception inside theirs."""
    text = to_markdown(list(real_verdicts.values()))
    assert len(_cells(text)) == 6
    fences = _fences(text)
    assert len(fences) == 4
    assert "<second line> ]]> ``` |" in fences[-1]


def test_a_huge_report_is_cut_and_says_so():
    """A summary keeps below GitHub's limit: long reports are shortened, and those without room are counted."""
    verdicts = [verdict(Status.ERROR, message="ü`" * 10**5) for _ in range(20)]
    text = to_markdown(verdicts)
    assert len(text.encode()) < LIMIT
    assert len(_cells(text)) == 21
    shown = _fences(text)
    assert all("(shortened: --json FILE has all of it)" in fence for fence in shown)
    assert f"{20 - len(shown)} more reports left out: a step summary holds 1 MiB." in text
    assert 0 < len(shown) < 20


# --- the step's summary -------------------------------------------------------------------------


def test_without_github_nothing_is_written(tmp_path, monkeypatch):
    """Where no step summary is named, by absence or an empty name, nothing happens."""
    monkeypatch.chdir(tmp_path)
    assert not append_step_summary("text", {})
    assert not append_step_summary("text", {"GITHUB_STEP_SUMMARY": ""})
    assert os.listdir(tmp_path) == []


def test_the_summary_is_appended(tmp_path):
    """What other tools wrote stays; the file is UTF-8, made where it is not there."""
    file = tmp_path / "summary"
    environ = {"GITHUB_STEP_SUMMARY": str(file)}
    assert append_step_summary("erste Prüfung", environ)
    assert append_step_summary("zweite\n", environ)
    assert file.read_text(encoding="utf-8") == "erste Prüfung\nzweite\n"


@pytest.mark.parametrize("place", ["missing/summary", "."])
def test_a_summary_that_cannot_be_written_fails_nothing(tmp_path, place):
    """A directory that is missing, or in the file's place, is False and no exception."""
    assert not append_step_summary("text", {"GITHUB_STEP_SUMMARY": str(tmp_path / place)})


def test_a_surrogate_fails_nothing(tmp_path):
    """A file name that is not UTF-8 comes as surrogates, which no UTF-8 file can hold."""
    assert append_step_summary("\udcff", {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary")})


def test_a_full_summary_gets_the_table_or_nothing(tmp_path):
    """GitHub drops a summary beyond its limit as a whole, so what has no room is left out, reports first."""
    file = tmp_path / "summary"
    environ = {"GITHUB_STEP_SUMMARY": str(file)}
    text = to_markdown([verdict(), verdict(Status.ERROR, message="long " * 1000)])
    before = "x" * (LIMIT - 2000) + "\n"
    file.write_text(before, encoding="utf-8")
    assert append_step_summary(text, environ)
    added = file.read_text(encoding="utf-8").removeprefix(before)
    assert len(_cells(added)) == 3
    assert _fences(added) == []
    assert "a step summary holds 1 MiB" in added
    file.write_text("x" * (LIMIT - 10), encoding="utf-8")
    assert not append_step_summary(text, environ)
    assert file.stat().st_size == LIMIT - 10
