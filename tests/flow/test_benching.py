"""The bench: verdicts before speeds, what is refused, and one run in real processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness import flow
from harness.cli import cli
from harness.errors import EngineError, ModelError, UsageError
from harness.flow import benching
from harness.speed.benching import Plan, Unmeasured
from harness.speed.kinds.burst import Size
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.spread import spread
from harness.speed.roofline import Roofline
from tests.commands import refused, runner
from tests.support import SUITE, write_suite

SMALL = "golden/small/small"
MODEL = "golden/small/model"
HF = "hf:dtype=float32,threads=1"
LITTLE = Plan(prompt=5, new=4, repeats=1, batch=2, burst=Size(count=3, prompt=8, new=2))
OK = {"ok": True, "exit_code": 0, "status": "identical", "text": "identical: it", "data": {"status": "identical"}}
WRONG = {"ok": False, "exit_code": 1, "status": "deviates", "text": "deviates: it", "data": {"status": "deviates"}}


class Side:
    """A process that needs none: what it was asked for, and answers that are known."""

    made: list  # of (spec, requests)
    verdicts: dict  # by SPEC, ok where it is not named
    failing: frozenset  # kinds whose engine dies

    def __init__(self, spec, **_named):
        self.spec, self.asked = spec, []
        Side.made.append((spec, self.asked))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def check(self, *_arguments, **_named):
        self.asked.append("check")
        return Side.verdicts.get(self.spec, OK)

    def open(self):
        self.asked.append("open")
        return {"threads": 1}

    def measure(self, kind, work):
        self.asked.append(kind)
        if kind in Side.failing:
            raise EngineError("rank 0 died", fix="x")
        seconds = spread([0.1 if "size=2" not in self.spec else 0.08])
        if kind == "latency":
            parts = {"first": seconds, "later": seconds, "token": seconds}
            return Latency(prompt=len(work.prompt), new=work.new, repeats=1, memory=0, **parts)
        return work

    def roofline(self, _shapes):
        return Roofline(reason="not here")


@pytest.fixture
def side(monkeypatch):
    """No process is started."""
    Side.made, Side.verdicts, Side.failing = [], {}, frozenset()
    monkeypatch.setattr(benching, "Side", Side)
    return Side


@pytest.mark.usefixtures("home")
def test_each_measurement_has_a_process_of_its_own_behind_the_verdict(side):
    """The verdict comes first; the profiler never runs where something is timed."""
    found = flow.bench([HF], golden=SMALL, plan=LITTLE)
    assert [asked for _spec, asked in side.made] == [
        ["check"],
        ["open", "latency"],
        ["open", "completion"],
        ["open", "burst"],
        ["open", "modules"],
    ]
    (one,) = found.subjects
    assert isinstance(one.results["scaling"], Unmeasured)
    assert one.verdict == OK
    assert found.exit_code == 0


@pytest.mark.usefixtures("home")
def test_a_wrong_candidate_has_no_speed(side):
    """It is refused by its verdict, and the next one is measured all the same."""
    side.verdicts = {"hf": WRONG}
    found = flow.bench(["hf", HF], golden=SMALL, plan=replace(LITTLE, kinds=("latency",)))
    first, second = found.subjects
    assert first.refused
    assert not first.results
    assert second.results["latency"].new == 4
    assert [asked for spec, asked in side.made if spec == "hf"] == [["check"]]
    assert found.exit_code == 1


@pytest.mark.usefixtures("home")
def test_every_number_of_ranks_is_judged_by_itself(side):
    """The small model has 6 heads and 3 pairs of keys: 3 ranks are wrong here, and 2 cannot be."""
    side.verdicts = {"tp:size=3": WRONG}
    found = flow.bench(
        ["tp:size=1"], golden=SMALL, plan=replace(LITTLE, kinds=("scaling",), asked=True, ranks=(3, 2, 1))
    )
    one, two, three = found.subjects[0].results["scaling"].points
    assert (one.latency.new, one.threads, one.status) == (4, 1, "identical")
    assert (two.latency, three.latency) == (None, None)
    assert "cannot be divided among 2 ranks" in two.reason
    assert (three.status, three.exit_code, found.exit_code) == ("deviates", 1, 1)
    assert [(spec, asked) for spec, asked in side.made if asked == ["check"]] == [
        ("tp:size=1", ["check"]),
        ("tp:size=3", ["check"]),
    ]


@pytest.mark.usefixtures("home")
def test_an_engine_that_fails_does_not_cost_the_other_numbers(side):
    """The kind that failed says so, and the exit code is that of an engine that failed."""
    side.failing = frozenset({"burst"})
    found = flow.bench([HF], golden=SMALL, plan=LITTLE)
    assert found.subjects[0].results["burst"] == Unmeasured(reason="rank 0 died", failed=True)
    assert found.subjects[0].results["latency"].new == 4
    assert found.exit_code == 4


@pytest.mark.usefixtures("home", "side")
def test_prompts_come_from_the_golden_the_suite_or_the_vocabulary():
    """The golden's tokens and rows; those of a suite in its place; without either, drawn ids and no rows."""
    plan = replace(LITTLE, kinds=("completion", "burst"))
    golden = flow.bench([HF], golden=SMALL, plan=plan).subjects[0].results
    assert golden["completion"].name == "small"
    tokens = [token for one in golden["completion"].requests for token in one.prompt_ids]
    assert [token for prompt in golden["burst"].prompts for token in prompt] == tokens[: 3 * 8]
    other = write_suite(Path("prompts/other.toml"), SUITE.replace('name = "small"', 'name = "other"', 1))
    suite = flow.bench([HF], model=MODEL, suite=other, plan=plan).subjects[0].results
    assert suite["completion"].name == "other"
    assert [one.prompt_ids for one in suite["completion"].requests] == [
        one.prompt_ids for one in golden["completion"].requests
    ]
    alone = flow.bench([HF], model=MODEL, plan=plan).subjects[0].results
    assert "give --suite" in alone["completion"].reason
    assert all(0 <= token < 301 for prompt in alone["burst"].prompts for token in prompt)
    assert len(set(alone["burst"].prompts)) == 3


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("specs", "named", "error", "message"),
    [
        ([], {"model": MODEL}, UsageError, "nothing to measure"),
        ([HF], {}, UsageError, "no model to run"),
        ([HF], {"model": "no/where"}, ModelError, "there is no model directory no/where"),
        (["hf:dtyp=float32"], {"model": MODEL}, UsageError, "dtyp"),
        ([HF], {"model": MODEL, "plan": Plan()}, UsageError, "512 prompt tokens and 20 new ones do not fit .* 128 "),
        ([HF], {"model": MODEL, "plan": replace(LITTLE, new=124)}, UsageError, "5 prompt tokens and 124 new ones"),
        ([HF], {"model": MODEL, "plan": replace(LITTLE, new=1)}, UsageError, "1 new tokens"),
        ([HF], {"model": MODEL, "plan": replace(LITTLE, ranks=(2,))}, UsageError, "do not begin with 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(side, specs, named, error, message):
    """In one line, before a process is started."""
    with pytest.raises(error, match=message):
        flow.bench(specs, **{"plan": LITTLE, **named})
    assert not side.made


@pytest.mark.usefixtures("home")
def test_the_command_measures_in_a_real_process():
    """A model without a golden: the first line says that nothing vouches for it."""
    done = CliRunner().invoke(
        cli,
        ["bench", HF, "--model", MODEL, "--kind", "latency", "--prompt-tokens", "5", "--new-tokens", "4",
         "--repeats", "2", "--json", "bench.json", "--plot", "bench.svg"],
        standalone_mode=False,
    )  # fmt: skip
    assert done.return_value == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "verdict: none; nothing says that this is the right model"
    assert "  latency: 4 greedy tokens after 5, batch 1, 2 runs" in lines
    found = json.loads(Path("bench.json").read_text())["candidates"][0]
    assert list(found["results"]) == ["latency"]
    assert found["results"]["latency"]["later"]["middle"] > 0
    assert found["results"]["latency"]["memory"] > 2**20
    assert found["limits"]["decode"]["binds"] in ("bytes", "operations")
    assert "<svg" in Path("bench.svg").read_text()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--burst", "many"), ("'many' is no size of a burst", "1000x512+20")),
        (("--ranks", "1,two"), ("'1,two' is no list of numbers", "--ranks 1,2,3")),
        (("--json", "no/where.json"), ("--json no/where.json",)),
        (("--plot", "bench.pdf"), ("bench.pdf", ".svg or .png")),
        (("--suite", "prompts/nothing.toml"), ("no such suite file",)),
    ],
)
def test_a_command_that_cannot_be_done_ends_in_one_line(monkeypatch, capsys, arguments, words):
    """With exit code 2, before anything is started."""
    harness = runner(monkeypatch, capsys)
    refused(harness("bench", HF, "--model", MODEL, "--kind", "latency", *arguments), *words)
