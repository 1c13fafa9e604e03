"""The command `harness power`: what does not go together, lists, nulls, spreads, bugs in one process and in several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.mutations.benign import FAMILIES
from harness.mutations.catalogue import CATALOGUE
from harness.power import detection, drawn, ledger, plot, processes, trials
from harness.power.ledger import WHOLE
from harness.power.trial import QUICK
from tests.commands import refused, runner


@pytest.fixture
def harness(monkeypatch, capsys, tmp_path):
    """Run `harness power` in this process, with a directory of its own for its work."""
    run = runner(monkeypatch, capsys)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run("power", *arguments)


# --- what does not go together -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nulls", 5, "--summary"), "give one of --nulls, --names, --spreads, --summary"),
        (("--list", "--spreads", "--groups", 1), "give one of"),
        (("--names", "--summary"), "give one of"),
        (("--names", "--groups", 2), "--groups is of --spreads and of the bugs"),
        (("--names", "--plot", "x.svg"), "are of the bugs"),
        (("--names", "--only", "nope"), "there is no bug, pair or correct implementation 'nope'"),
        (("--names", "--only", "na-gelu", "--host", "llama-tiny"), "none of these is put into any"),
        (("--spreads",), "--spreads needs a number of --groups"),
        (("--nulls", 5, "--groups", 2), "--groups is of --spreads and of the bugs"),
        (("--summary", "--groups", 2), "--groups is of --spreads and of the bugs"),
        (("--nulls", 5, "--only", "wc-eps"), "--only, --host, --quick, --as-reported and --plot are of the bugs"),
        (("--summary", "--host", "llama-tiny"), "are of the bugs"),
        (("--list", "--as-reported"), "are of the bugs"),
        (("--summary", "--quick"), "are of the bugs"),
        (("--spreads", "--groups", 1, "--plot", "x.svg"), "are of the bugs"),
        (("--summary", "--minutes", 3), "--shard, --jobs and --minutes are of a run"),
        (("--list", "--shard", "0/2"), "--shard, --jobs and --minutes are of a run"),
        (("--summary", "--jobs", 2), "--shard, --jobs and --minutes are of a run"),
        (("--shard", "0/2", "--jobs", 2), "--shard is one process, --jobs are several"),
        (("--list", "--json", "x.json"), "--json is of the nulls and of the bugs"),
        (("--spreads", "--groups", 1, "--json", "x.json"), "--json is of the nulls and of the bugs"),
        (("--summary", "--json", "nowhere/x.json"), "does not exist"),
        (("--summary", "--json", "."), "is a directory"),
        (("--plot", "nowhere/x.svg"), "the directory of --plot nowhere/x.svg does not exist"),
        (("--plot", "."), "--plot . is a directory"),
        (("--only", "wc-eps,nope"), "there is no bug, control or correct implementation 'nope'"),
        (("--host", "nowhere"), "there is no host 'nowhere'"),
        (("--only", "ok-norm-twice", "--host", "gpt2-sharp"), "none of these is put into any of these hosts"),
        (("--only", ","), "none of these is put into any"),
        *((("--nulls", 5, "--shard", shard), "is no part of a run") for shard in ("2/2", "1", "a/b", "-1/2", "1/0")),
    ],
)
def test_what_does_not_go_together_is_one_line(harness, arguments, words):
    """Usage errors of the command are one line with the fix, exit 2, before anything is done."""
    error = refused(harness(*arguments), words)
    assert ". " in error
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [("--jobs", 0), ("--groups", 0), ("--nulls", 0), ("--minutes", 0), ("--no-such",)]
)
def test_numbers_have_limits(harness, arguments):
    """Nothing is done without a process, a group, a verdict or time."""
    ended = harness(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert list(Path().iterdir()) == []


# --- lists, nulls and spreads ------------------------------------------------------------------


def test_the_command_lists_families_and_bugs(harness):
    """One line a family of correct implementations, and one a bug of the catalogue, by group."""
    ended = harness("--list")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed[: len(FAMILIES)] == list(FAMILIES)
    assert sorted(listed[len(FAMILIES) :]) == sorted(CATALOGUE)
    counts = [int(line.rpartition(": ")[2]) for line in lines[1:] if not line.startswith("  ")]
    assert sum(counts) == len(CATALOGUE)


def test_the_command_runs_and_shows(harness, stub, tmp_path):
    """Nulls in two parts, then the table alone, then as JSON; spreads as text for constants.py."""
    work = tmp_path / "work"
    ended = harness("--nulls", 8, "--work", work, "--shard", "0/2")
    assert (ended.code, len(stub)) == (0, 4)
    assert "0 of 4" in ended.out
    ended = harness("--nulls", 8, "--work", work, "--shard", "1/2")
    assert "0 of 8" in ended.out
    shown = harness("--summary", "--work", work)
    assert (shown.code, shown.out, shown.err) == (0, ended.out, "")
    ended = harness("--summary", "--work", work, "--json", "-")
    assert len(json.loads(ended.out)[0]["results"]) == 8
    ended = harness("--spreads", "--groups", 1, "--work", work, "--minutes", 5)
    assert ended.code == 0
    assert ended.out.startswith("SPREADS: Mapping")
    assert len(stub) == 16


# --- several processes -------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """What would be run in processes: (arguments, jobs, results that were there when it was asked)."""
    asked = []

    def run_parts(arguments, jobs, done):
        asked.append((arguments, jobs, done()))

    monkeypatch.setattr(processes, "run_parts", run_parts)
    return asked


def test_bugs_are_shared_among_processes(harness, parts, tmp_path):
    """All that says what is asked, and where, is passed on; what only this process does is not."""
    work = tmp_path / "work"
    chosen = ("--only", " x-last-layer,plain", "--host", "llama-tiny", "--as-reported", "--quick", "--groups", 2)
    ended = harness(*chosen, "--jobs", 3, "--minutes", 7.5, "--work", work, "--json", "-")
    assert ended.code == 0, ended
    ((arguments, jobs, there),) = parts
    assert jobs == 3
    assert there == 0
    assert arguments[0] == "power"
    assert words_of(arguments) == {
        "--groups": "2", "--only": "x-last-layer,plain", "--host": "llama-tiny", "--as-reported": None,
        "--quick": None, "--work": str(work), "--minutes": "7.5",
    }  # fmt: skip
    assert json.loads(ended.out)[0]["precisions"] == {}


def words_of(arguments):
    """Option -> its value, None for a switch."""
    found, values = {}, {"--groups", "--only", "--host", "--work", "--minutes"}
    words = iter(arguments[1:])
    for word in words:
        assert word not in found
        found[word] = next(words) if word in values else None
    return found


@pytest.mark.parametrize("more", [(), ("--quick",), ("--as-reported",), ("--groups", 3)])
def test_what_is_passed_on_is_understood(harness, parts, tmp_path, monkeypatch, more):
    """Each part, run as it is called, asks for the same trials as the whole, and prints nothing."""
    asked = []

    def run_trials(blanks, work, progress, shard=WHOLE, *, minutes=None, port="hf"):
        asked.append((places(blanks), work, shard, minutes))

    monkeypatch.setattr(trials, "run_trials", run_trials)
    given = (
        "--only",
        "x-last-layer,x-bias-doubled",
        "--host",
        "llama-tiny,gpt2-tiny",
        "--work",
        tmp_path / "work",
        *more,
    )
    harness(*given, "--jobs", 2, "--minutes", 3)
    ((arguments, _, _),) = parts
    for index in (0, 1):
        ended = harness(*arguments[1:], "--shard", f"{index}/2")
        assert (ended.code, ended.out) == (0, "")
    harness(*given)
    first, second, whole = asked
    assert first == (whole[0], tmp_path / "work", (0, 2), 3.0)
    assert second == (whole[0], tmp_path / "work", (1, 2), 3.0)
    assert whole[1:] == (tmp_path / "work", WHOLE, None)
    assert len(whole[0]) == len(set(whole[0])) > 0
    assert {key[1] for key in whole[0]} == {"x-last-layer", "x-bias-doubled"}


def places(blanks):
    """What was asked, but for nothing else."""
    return [one.key for one in blanks]


def test_an_empty_choice_is_passed_on_as_none(harness, parts):
    """Without --only and --host the parts, too, ask for all."""
    harness("--jobs", 2, "--json", "-")
    ((arguments, _, _),) = parts
    assert words_of(arguments) == {"--groups": "1", "--work": ".power"}


@pytest.mark.parametrize(
    ("arguments", "expected", "bench"),
    [
        (("--nulls", 8), ["power", "--nulls", "8"], drawn.NULLS),
        (("--spreads", "--groups", 2), ["power", "--spreads", "--groups", "2"], drawn.PILOT),
    ],
)
def test_nulls_and_spreads_are_shared_too(harness, parts, stub, tmp_path, arguments, expected, bench):
    """With the directory, and the table of what is there at the end."""
    work = tmp_path / "work"
    ended = harness(*arguments, "--jobs", 2, "--work", work)
    assert ended.code == 0
    assert parts == [([*expected, "--work", str(work)], 2, 0)]
    assert stub == []
    assert ended.out.startswith(("precision", "SPREADS"))
    assert list(work.glob(f"{bench.name}*")) == []


def test_one_job_is_this_process(harness, parts, stub, tmp_path):
    """`--jobs 1` starts none."""
    assert harness("--nulls", 8, "--jobs", 1, "--work", tmp_path / "work").code == 0
    assert parts == []
    assert len(stub) == 8


# --- bugs: what is written ---------------------------------------------------------------------


@pytest.fixture
def bugs(monkeypatch):
    """Trials that are there at once: each bug is found and every correct implementation is not; returns the blanks."""
    asked = []

    def run_trials(blanks, work, progress, shard=WHOLE, *, minutes=None, port="hf"):
        asked.extend(blanks)
        with ledger.appending(_made(work), "trials", WHOLE) as append:
            for index, blank in enumerate(blanks):
                correct = blank.kind != "bug"
                append(
                    replace(
                        blank, status="drift" if correct else "deviates", error=1.0, tokens=0,
                        signal=0.0 if correct else 10.0 + index, scores={"exact": 0.0 if correct else 3.0},
                        levels={"tokens": "unmeasured", "top": "drift"},
                    )
                )  # fmt: skip

    monkeypatch.setattr(trials, "run_trials", run_trials)
    return asked


def _made(work):
    work.mkdir(parents=True, exist_ok=True)
    return work


ONE_HOST = ("--only", "x-last-layer,x-bias-doubled,plain", "--host", "llama-tiny")


def test_the_table_is_printed(harness, bugs):
    """A line a judge, for each precision."""
    ended = harness(*ONE_HOST)
    assert ended.code == 0
    assert "golden-harness: all" in ended.out
    assert "float32" in ended.out
    assert "bfloat16" in ended.out
    assert Path(".power/trials.jsonl").is_file()


@pytest.mark.parametrize("target", ["x.json", "-"])
def test_json_has_all_tables(harness, bugs, target):
    """One entry a run with every precision; on standard output it stands alone."""
    ended = harness(*ONE_HOST, "--json", target)
    assert ended.code == 0
    text = ended.out if target == "-" else Path(target).read_text(encoding="utf-8")
    (data,) = json.loads(text, parse_constant=pytest.fail)
    assert set(data["precisions"]) == {"float32", "bfloat16"}
    judges = {one["judge"]: one for one in data["precisions"]["bfloat16"]["judges"]}
    assert judges["golden-harness: all"]["total"] == {"found": 2, "total": 2}
    assert ("golden-harness: all" in ended.out.partition("[")[0]) is (target != "-")


def test_bugs_go_into_a_port(harness, bugs):
    """On the hosts that it can run, without families, in a directory of its own: other engines' results are not its."""
    ended = harness("--only", "x-last-layer", "--port", "bloom:rungs=all")
    assert ended.code == 0
    assert {(blank.kind, blank.host) for blank in bugs} == {("bug", "bloom-tiny"), ("bug", "bloom-raw")}
    assert Path(".power/ports/bloom-rungs=all/trials.jsonl").is_file()
    assert not Path(".power/trials.jsonl").exists()


def test_a_port_is_of_the_bugs_alone(harness):
    """With another mode it is refused."""
    ended = harness("--nulls", 3, "--port", "bloom:rungs=all")
    assert ended.code == 2
    assert "--port" in ended.err


def test_the_figure_is_of_16_bits(harness, bugs, monkeypatch):
    """`--plot` reaches the writer with the table of bfloat16 and the file."""
    written = []
    monkeypatch.setattr(plot, "write_plot", lambda table, path: written.append((table.precision, path)))
    assert harness(*ONE_HOST, "--plot", "x.svg").code == 0
    assert written == [("bfloat16", Path("x.svg"))]


def test_the_table_is_of_what_was_asked(harness, bugs, monkeypatch):
    """Trials of other bugs, hosts and rules that lie in the directory are not counted."""
    counted = []
    tables = detection.tables
    monkeypatch.setattr(detection, "tables", lambda found: counted.append(found) or tables(found))
    harness("--only", "x-last-layer,plain", "--host", "gpt2-tiny,llama-tiny")
    whole = len(bugs)
    bugs.clear()
    harness("--only", "x-last-layer,plain", "--host", "llama-tiny", "--as-reported")
    assert [one.key for one in counted[1]] == [one.key for one in bugs]
    assert 0 < len(counted[1]) < len(counted[0]) == whole
    monkeypatch.setattr(trials, "rule_version", lambda: "another")
    monkeypatch.setattr(trials, "run_trials", lambda *_given, **_more: None)
    harness("--only", "x-last-layer,plain", "--host", "llama-tiny")
    assert counted[2] == []


def test_as_reported_leaves_out_weaker_strengths(harness, bugs):
    """Each bug is asked at the first of its strengths alone."""
    harness("--only", "x-bias-doubled", "--host", "llama-tiny", "--as-reported")
    assert {one.strength for one in bugs} == {1.0}
    bugs.clear()
    harness("--only", "x-bias-doubled", "--host", "llama-tiny")
    assert {one.strength for one in bugs} == set(CATALOGUE["x-bias-doubled"].strengths)


def test_groups_are_of_the_bugs(harness, bugs):
    """Two groups of prompts are twice the trials that show in logits."""
    harness("--only", "x-last-layer", "--host", "llama-tiny", "--groups", 2)
    assert [one.group for one in bugs] == [0, 0, 1, 1]


def test_quick_is_a_few_short_prompts(harness, bugs):
    """What shows in logits alone, on one group of prompts of its own."""
    harness("--only", "x-last-layer,bs-double-bos,plain", "--host", "llama-tiny", "--quick")
    assert {(one.name, one.group) for one in bugs} == {("x-last-layer", QUICK), ("plain", QUICK)}


@pytest.mark.parametrize("file", ["x.pdf", "-", "x"])
def test_a_figure_that_cannot_be_written_is_refused_before_the_work(harness, bugs, file):
    """Its suffix says so at once."""
    refused(harness(*ONE_HOST, "--plot", file), "no plot can be written as")
    assert bugs == []


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_part_writes_no_table(harness, bugs, option):
    """Whoever asks for it is told, rather than left without the file."""
    refused(harness(*ONE_HOST, "--shard", "0/2", option, "x.svg"), "--shard")
    assert bugs == []
