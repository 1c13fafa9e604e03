"""A bench in words, as JSON and as a figure: no speed without its verdict."""

import json
from dataclasses import replace

import pytest

from harness.errors import UsageError
from harness.report.bench import bench_to_dict, bench_to_text
from harness.report.bench_plot import write_plot
from harness.speed.benching import Bench, Plan, Subject, Unmeasured
from harness.speed.kinds.burst import Burst, Size
from harness.speed.kinds.completion import Completion
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.modules import Modules
from harness.speed.kinds.scaling import Point, Scaling
from harness.speed.kinds.spread import Spread
from harness.speed.roofline import Limit

OK = {"ok": True, "exit_code": 0, "status": "drift", "text": "drift: hf\n  more of it", "data": {"status": "drift"}}
WRONG = {"ok": False, "exit_code": 1, "status": "deviates", "text": "deviates: it", "data": {"status": "deviates"}}
LATENCY = Latency(
    prompt=7,
    new=100,
    repeats=5,
    first=Spread(low=0.009, middle=0.010, high=0.012),
    later=Spread(low=0.003, middle=0.004, high=0.005),
    token=Spread(low=0.0031, middle=0.0041, high=0.0051),
    memory=2**20,
)
SLOWER = replace(LATENCY, token=Spread(low=0.0041, middle=0.0041, high=0.0041))
SHARES = {"embedding": 0.05, "attention": 0.5, "mlp": 0.2, "norm": 0.15, "head": 0.005, "rest": 0.095}
RESULTS = {
    "latency": LATENCY,
    "completion": Completion(
        name="rows", rows=100, tokens=5000, batch=32, repeats=5, seconds=Spread(low=1.0, middle=2.0, high=4.0), memory=0
    ),
    "burst": Burst(
        size=Size(count=1000, prompt=512, new=20), batch=32, seconds=50.0, waits=(25.0, 45.0, 49.5), memory=0
    ),
    "scaling": Scaling(
        points=(
            Point(ranks=1, spec="tp:size=1", latency=LATENCY, threads=1, status="identical"),
            Point(ranks=2, spec="tp:size=2", latency=SLOWER, threads=1, status="drift"),
            Point(ranks=4, spec="tp:size=4", reason="its 6 attention heads cannot be divided among 4 ranks"),
        )
    ),
    "modules": Modules(prompt=7, new=100, shares={"prefill": SHARES, "decode": SHARES}, device="cpu"),
}
SUBJECT = Subject(
    spec="tp:size=2",
    verdict=OK,
    results=RESULTS,
    settings={"dtype": "float32", "device": "cpu", "threads": 1, "parameters": 9},
    limits={"decode": Limit(seconds=0.0004, binds="bytes", bytes=1.0, operations=2.0)},
)
BENCH = Bench(golden="m/core", model="m", plan=Plan(), subjects=(SUBJECT,))


def test_the_verdict_stands_first():
    """Of a candidate that a golden judged; without a golden the first line says that nothing vouches for it."""
    assert bench_to_text(BENCH).splitlines()[:2] == ["drift: hf", "  more of it"]
    alone = replace(BENCH, golden=None, subjects=(replace(SUBJECT, verdict=None),))
    first = bench_to_text(alone).splitlines()[0]
    assert first == "verdict: none; nothing says that this is the right model"
    assert bench_to_dict(alone)["note"] == first


def test_a_refused_candidate_has_a_verdict_and_no_number():
    """Nothing but what was wrong."""
    lines = bench_to_text(replace(BENCH, subjects=(Subject(spec="hf", verdict=WRONG),))).splitlines()
    assert lines == ["deviates: it", "hf: refused: it is deviates, and no speed is told"]


@pytest.mark.parametrize(
    "line",
    [
        "tp:size=2 (dtype float32, device cpu, threads 1)",
        "  latency: 100 greedy tokens after 7, batch 1, 5 runs",
        "    a token           4.100 ms (3.100 to 5.100)",
        "    the first forward 10.000 ms (9.000 to 12.000)",
        "    each later one    4.000 ms (3.000 to 5.000), 10 % of the limit by bytes",
        "    memory            peak memory 1 MiB",
        "    50.0 rows/s (25.0 to 100.0), 2500 new tokens/s, peak memory not known",
        "    20.00 requests/s, 10240 prompt tokens/s and 400 new ones/s, peak memory not known",
        "    a request is done after p50 25.00 s, p90 45.00 s, p99 49.50 s",
        "    1      1                4.100       100 %       identical",
        "    2      1                4.100       50 %        drift",
        "    4                       unmeasured              its 6 attention heads cannot be divided among 4 ranks",
        "    head       0.5 %    0.5 %",
        "    rest       9.5 %    9.5 %",
    ],
)
def test_each_kind_has_its_numbers(line):
    """Milliseconds, rates, shares, each with its unit."""
    assert line in bench_to_text(BENCH).splitlines()


def test_small_models_are_said_to_be_bound_by_neither():
    """Only where the limit is far: one that is reached to a half needs no such line."""
    assert "waits for Python" in bench_to_text(BENCH)
    near = replace(SUBJECT, limits={"decode": replace(SUBJECT.limits["decode"], seconds=0.002)})
    assert "waits for Python" not in bench_to_text(replace(BENCH, subjects=(near,)))


def test_what_has_no_number_says_why():
    """On one line, whatever others wrote, and a failure is called one."""
    odd = {"latency": Unmeasured(reason="it\ndied\x1b[2J", failed=True), "burst": Unmeasured(reason="no")}
    lines = bench_to_text(replace(BENCH, subjects=(replace(SUBJECT, results=odd),))).splitlines()
    assert "  latency: failed: it died\ufffd[2J" in lines
    assert "  burst: unmeasured: no" in lines


def test_json_has_every_figure():
    """Plain values, seconds and bytes, verdicts beside them."""
    found = bench_to_dict(BENCH)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (one,) = found["candidates"]
    assert one["verdict"] == {"status": "drift"}
    results = one["results"]
    assert results["latency"]["later"]["middle"] == 0.004
    assert results["completion"]["rows_per_second"] == 50
    assert results["burst"]["waits"] == {"p50": 25.0, "p90": 45.0, "p99": 49.5}
    assert [point["efficiency"] for point in results["scaling"]["points"]] == [1.0, 0.5, None]
    assert results["modules"]["shares"]["decode"]["attention"] == 0.5
    assert one["limits"]["decode"]["binds"] == "bytes"


def test_a_figure_has_a_panel_for_each_kind_and_says_the_verdict(tmp_path, monkeypatch):
    """The same bench gives the same bytes; text stays text where it is asked to."""
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    other = Subject(spec="hf", verdict=OK, results={"latency": SLOWER})
    bench = replace(BENCH, subjects=(SUBJECT, other))
    for name in ("one.svg", "two.svg"):
        write_plot(bench, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    for words in ("tp:size=2 (drift)", "hf (drift)", "latency at batch 1, ms", "completion, rows/s", "burst, seconds",
                  "scaling efficiency", "modules, share", "p99"):  # fmt: skip
        assert words in drawn
    write_plot(replace(bench, golden=None, subjects=(replace(other, verdict=None),)), tmp_path / "three.svg")
    alone = (tmp_path / "three.svg").read_text()
    assert "verdict: none; nothing says" in alone
    assert "completion, rows/s" not in alone


def test_a_bench_without_a_number_is_not_drawn(tmp_path):
    """Nothing is written."""
    with pytest.raises(UsageError, match="nothing was measured"):
        write_plot(replace(BENCH, subjects=(Subject(spec="hf", verdict=WRONG),)), tmp_path / "none.svg")
    assert not list(tmp_path.iterdir())
