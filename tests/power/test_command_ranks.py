"""The command `harness power --ranks`: what it asks, what it prints, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.power import sharded
from tests.commands import refused, runner


@pytest.fixture
def harness(monkeypatch, capsys, tmp_path):
    """Run `harness power --ranks` in this process, in an empty directory."""
    run = runner(monkeypatch, capsys)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run("power", "--ranks", *arguments)


@pytest.fixture
def bench(monkeypatch):
    """Checks that cost nothing, in which bugs are found and named and correct runs are ok; returns what was asked."""
    asked = []

    def run(blanks, progress):
        asked.extend(blanks)
        progress(0, len(blanks), "a run")
        return [
            replace(
                one, status="identical" if one.correct else "structural", named=() if one.where == "all" else one.where
            )
            for one in blanks
        ]

    monkeypatch.setattr(sharded, "run", run)
    return asked


def spoiled(monkeypatch, id, **changes):
    """Let one record be another."""
    run = sharded.run
    monkeypatch.setattr(
        sharded, "run",
        lambda blanks, progress: [replace(one, **changes) if one.id == id else one for one in run(blanks, progress)],
    )  # fmt: skip


CHOSEN = ("--only", "tp-shard-0-layer, correct", "--host", "gpt2-tiny")


def test_the_table_is_printed(harness, bench):
    """The numbers and a row a bug, exit 0; no file is written."""
    ended = harness(*CHOSEN)
    assert (ended.code, ended.err.strip()) == (0, "")
    assert ended.out.splitlines()[0].split() == ["found", "1", "of", "1"]
    assert "tp-shard-0-layer  gpt2-tiny" in ended.out
    assert [one.id for one in bench] == ["correct"] * len(sharded.SPECS) + ["tp-shard-0-layer"]
    assert {one.host for one in bench} == {"gpt2-tiny"}
    assert list(Path().iterdir()) == []


def test_all_are_asked_by_default(harness, bench):
    """Every bug on every host, and the runs without one."""
    assert harness().code == 0
    assert bench == sharded.planned()


@pytest.mark.parametrize("target", ["x.json", "-"])
def test_json(harness, bench, target):
    """One entry a run with every record; on standard output it stands alone."""
    ended = harness(*CHOSEN, "--json", target)
    assert ended.code == 0
    (data,) = json.loads(ended.out if target == "-" else Path(target).read_text(encoding="utf-8"))
    assert (data["found"], data["named"], data["correct"]) == ([1, 1], [1, 1], [len(sharded.SPECS)] * 2)
    assert len(data["records"]) == len(bench)


@pytest.mark.parametrize(
    ("id", "changes", "code"),
    [
        ("tp-shard-0-layer", {"status": "drift"}, 1),
        ("tp-shard-0-layer", {"status": "error"}, 1),
        ("correct", {"status": "deviates"}, 1),
        ("tp-shard-0-layer", {"named": ()}, 0),
    ],
)
def test_what_is_not_found_is_a_failure(harness, bench, monkeypatch, id, changes, code):
    """Exit 1 where a bug is missed or a correct run fails; a rank that is not named is in the table alone."""
    spoiled(monkeypatch, id, **changes)
    assert harness(*CHOSEN).code == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "wc-eps"), "there is no bug of sharding 'wc-eps'"),
        (("--host", "bloom-raw"), "there is no host of these 'bloom-raw'"),
        (("--only", "pp-tied-head", "--host", "llama-tiny"), "none of these is put into any of these hosts"),
        (("--names",), "give one of"),
        (("--list",), "give one of"),
        (("--quick",), "are of the bugs"),
        (("--as-reported",), "are of the bugs"),
        (("--groups", 2), "--groups is of --spreads and of the bugs"),
        (("--jobs", 2), "--shard, --jobs and --minutes are of a run"),
        (("--shard", "0/2"), "--shard, --jobs and --minutes are of a run"),
        (("--json", "nowhere/x.json"), "does not exist"),
    ],
)
def test_what_does_not_go_together_is_one_line(harness, bench, arguments, words):
    """Usage errors are one line with the fix, exit 2, before anything is run."""
    refused(harness(*arguments), words)
    assert bench == []
