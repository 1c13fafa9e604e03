"""The null bench: resumption, leave-one-out spreads, bounds, the table, and a few real verdicts."""

import ast
import itertools
import json
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.stats import binomtest

from harness import flow
from harness.errors import UsageError
from harness.mutations.benign import FAMILIES
from harness.power import drawn, ledger, nulls
from harness.power.drawn import NULLS, PILOT
from harness.power.ledger import WHOLE
from harness.power.nulls import Pooled, Result
from harness.values import Finding, Statistic, Status, Verdict

RULE = ledger.rule_version()


def pooled(name="error", residual=0.0, *, precision="float32", question="function", own=0.0, z=0.0):
    """A pooled statistic that lies so far from the replicas' mean of 1."""
    return Pooled(
        question=question, precision=precision, name=name, value=1.0 + residual, centre=1.0, own=own, spread=own, z=z
    )


def result(family="plain", model="host", precision="float32", group=0, *statistics, status="identical", **more):
    """A result of the rule as it is."""
    return Result(
        model=model, family=family, precision=precision, group=group, status=status, statistics=statistics,
        **{"version": RULE, **more},
    )  # fmt: skip


def silent(_done, _total, _text):
    """A progress that nobody watches."""


# --- running -----------------------------------------------------------------------------------


def test_enough_groups_are_made(stub, tmp_path):
    """The number of verdicts is rounded up to whole groups: 8 combinations, so 9 verdicts are 16."""
    nulls.run_nulls(9, tmp_path, silent)
    found = nulls.read_results(tmp_path, NULLS)
    assert len(found) == len(stub) == len(set(stub)) == 16
    assert {one.group for one in found} == {0, 1}
    assert {golden for *_, golden in stub} == {"drawn-2000000", "drawn-2000001"}


def test_a_run_goes_on_where_it_was(stub, tmp_path):
    """What is there is not done again, a line cut short by a kill is; more groups are added to the first ones."""
    nulls.run_nulls(8, tmp_path, silent)
    file = tmp_path / "nulls.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert len(nulls.read_results(tmp_path, NULLS)) == 7
    stub.clear()
    nulls.run_nulls(8, tmp_path, silent)
    assert len(stub) == 1
    assert file.read_bytes() == whole
    nulls.run_nulls(16, tmp_path, silent)
    assert len(stub) == 9
    assert file.read_bytes().startswith(whole)


def test_another_rule_is_another_verdict(stub, tmp_path, monkeypatch):
    """Verdicts of former constants stay in the file, are left out of the table, and are given again."""
    for module in (ledger, nulls):
        monkeypatch.setattr(module, "rule_version", lambda: "former")
    nulls.run_nulls(8, tmp_path, silent)
    for module in (ledger, nulls):
        monkeypatch.setattr(module, "rule_version", lambda: "present")
    nulls.run_nulls(8, tmp_path, silent)
    summary = nulls.summarise(nulls.read_results(tmp_path, NULLS))
    assert len(stub) == 16
    assert summary.overall.count == 8
    assert summary.former == 8
    assert "8 verdicts of former versions" in nulls.summary_to_text(summary)


def test_the_pilot_is_apart_from_the_nulls(stub, tmp_path):
    """The pilot has prompts and a file of its own."""
    nulls.run_pilot(1, tmp_path, silent)
    assert {golden for *_, golden in stub} == {"drawn-3000000"}
    assert nulls.read_results(tmp_path, NULLS) == []
    assert len(nulls.read_results(tmp_path, PILOT)) == 8


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_shards_cover_everything_once(number):
    """Each combination of host, family and precision is in exactly one shard."""
    parts = [nulls.combinations((index, number)) for index in range(number)]
    assert Counter(itertools.chain(*parts)) == Counter(nulls.combinations(WHOLE))
    assert len(nulls.combinations(WHOLE)) == 4 * len(FAMILIES) * 3
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_write_their_own_files(stub, tmp_path):
    """Two processes share the work without a line in common, and either sees what the other has done."""
    for index in (0, 1):
        nulls.run_nulls(8, tmp_path, silent, (index, 2))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["nulls-0.jsonl", "nulls-1.jsonl"]
    assert len(stub) == len(set(stub)) == 8
    nulls.run_nulls(8, tmp_path, silent)
    assert len(stub) == 8


def test_the_time_limit_ends_a_run_cleanly(stub, tmp_path, monkeypatch):
    """After the limit no further verdict is begun; what is there is whole, and counts for the next run."""
    clock = itertools.count(step=10)
    monkeypatch.setattr(ledger.time, "monotonic", lambda: next(clock))
    nulls.run_nulls(8, tmp_path, silent, minutes=0.5)
    some = len(nulls.read_results(tmp_path, NULLS))
    assert 0 < some < 8
    nulls.run_nulls(8, tmp_path, silent)
    assert len(stub) == len(nulls.read_results(tmp_path, NULLS)) == 8


def test_progress_counts_what_is_there(stub, tmp_path):
    """A run that goes on begins where it was, and ends at the whole."""
    nulls.run_nulls(8, tmp_path, silent)
    seen = []
    nulls.run_nulls(16, tmp_path, lambda done, total, text: seen.append((done, total, text)))
    assert [done for done, _, _ in seen] == list(range(9, 17))
    assert {total for _, total, _ in seen} == {16}
    assert all(re.fullmatch(r"(one|two) (plain|ranks-2) (float32|bfloat16) [01]", text) for _, _, text in seen)


def test_a_host_without_the_part_is_skipped(stub, tmp_path, monkeypatch):
    """What cannot be tried is written down as skipped, and is no success."""

    @contextmanager
    def opened(family, model, precision):
        if family.name == "ranks-2":
            raise LookupError("it has no such part")
        yield (str(model), family.name, precision)

    monkeypatch.setattr(nulls, "opened", opened)
    nulls.run_nulls(8, tmp_path, silent)
    summary = nulls.summarise(nulls.read_results(tmp_path, NULLS))
    assert summary.overall.count == 4
    assert [(one.status, one.finding) for one in summary.unjudged] == [("skipped", "it has no such part")] * 4
    assert "not judged, 4 x skipped: it has no such part" in nulls.summary_to_text(summary)


def test_a_fault_of_the_bench_is_not_skipped(stub, tmp_path, monkeypatch):
    """A KeyError is a LookupError too, but says nothing of the host."""

    @contextmanager
    def opened(_family, _model, _precision):
        yield {}["missing"]

    monkeypatch.setattr(nulls, "opened", opened)
    with pytest.raises(KeyError):
        nulls.run_nulls(8, tmp_path, silent)


def test_each_family_is_judged_by_the_others(stub, tmp_path, monkeypatch):
    """A family's own scatter never sets the limit that it is held against; a kin's does not either."""
    given = {}

    def check(_golden, engine, *, reference, spreads):
        given[engine[1]] = spreads
        return Verdict(golden="", candidate="", status=Status.IDENTICAL, findings=())

    monkeypatch.setattr(flow, "check", check)
    monkeypatch.setattr(nulls, "SPREADS", {"float32": {"error": (0.5, "ranks", 0.2), "gain": (0.4, "plain", 0.1)}})
    nulls.run_nulls(8, tmp_path, silent)
    assert given == {
        "plain": {"float32": {"error": 0.5, "gain": 0.1}},
        "ranks-2": {"float32": {"error": 0.2, "gain": 0.4}},
    }


def test_what_a_verdict_leaves(stub, tmp_path, monkeypatch):
    """The pooled finite statistics, the first finding of the verdict's status, and its time are kept, as JSON."""
    common = {
        "question": "function", "precision": "float32", "centre": 1.0, "own": 0.25, "spread": 0.5, "z": 2.0,
        "significant": (0.0, 3.0), "failing": (0.0, 4.0), "why": "",
    }  # fmt: skip
    verdict = Verdict(
        golden="", candidate="", status=Status.DEVIATES, seconds=1.25,
        findings=(
            Finding(status=Status.DRIFT, check="tokens", message="harmless"),
            Finding(status=Status.DEVIATES, check="error", message="too large", where="p", measured=2.0, allowed=1.5),
        ),
        statistics=(
            Statistic(name="error", unit="all", value=2.0, **common),
            Statistic(name="error", unit="prompt 'x'", value=3.0, **common),
            Statistic(name="gain", unit="all", value=float("-inf"), **common),
        ),
    )  # fmt: skip
    monkeypatch.setattr(flow, "check", lambda *_arguments, **_keywords: verdict)
    nulls.run_nulls(1, tmp_path, silent)
    found = nulls.read_results(tmp_path, NULLS)[0]
    assert found.status == "deviates"
    assert found.finding == "error: too large at p (measured 2, allowed 1.5)"
    assert found.seconds == 1.25
    assert found.statistics == (
        Pooled(
            question="function", precision="float32", name="error", value=2.0, centre=1.0, own=0.25, spread=0.5, z=2.0
        ),
    )


@pytest.mark.parametrize("line", ["no JSON", "{}", '{"model": "x", "statistics": []}', "[]", "3"])
def test_a_line_that_is_no_result_is_refused(tmp_path, line):
    """What nobody can have written is named with its place; it is not passed over."""
    (tmp_path / "nulls.jsonl").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1 of .*nulls\.jsonl is no result"):
        nulls.read_results(tmp_path, NULLS)


# --- spreads -----------------------------------------------------------------------------------


def test_spreads_are_root_mean_squares():
    """Over hosts and groups a signed statistic counts in both directions, a magnitude only where it is too large."""
    found = nulls.spreads(
        [
            result("plain", "one", "float32", 0, pooled("gain", 0.3), pooled("error", 0.3)),
            result("plain", "two", "float32", 0, pooled("gain", -0.4), pooled("error", -0.4)),
        ]
    )
    assert found["float32"]["gain"] == (pytest.approx(0.125**0.5), "plain", 0.0)
    assert found["float32"]["error"] == (pytest.approx(0.045**0.5), "plain", 0.0)


def test_spreads_are_beyond_the_replicas():
    """What the golden's own replicas show is taken off; one standard error of two values stays in any case."""
    found = nulls.spreads(
        [
            result("plain", "one", "float32", 0, pooled("gain", 0.5, own=0.3), pooled("log p", 0.2, own=0.3)),
            result("plain", "one", "float32", 1, pooled("gain", -0.5, own=0.3), pooled("log p", 0.3, own=0.3)),
        ]
    )
    assert found["float32"]["gain"] == (pytest.approx((0.4**2 + 0.3**2) ** 0.5), "plain", 0.0)
    assert found["float32"]["log p"] == (pytest.approx(0.3), "plain", 0.0)


def test_more_prompts_show_a_smaller_scatter():
    """The standard error goes down with the number of groups."""

    def scatter(groups):
        one = [result("plain", "one", "float32", g, pooled("gain", 0.1, own=0.3)) for g in range(groups)]
        return nulls.spreads(one)["float32"]["gain"][0]

    assert scatter(32) == pytest.approx(scatter(2) / 2)


def test_spreads_name_the_largest_family_and_the_next():
    """The largest family by name, the largest of the others without; two families of one kin are one."""
    table = nulls.spreads(
        [
            result("plain", "one", "float32", 0, pooled("gain", -0.3)),
            result("ranks-2", "one", "float32", 0, pooled("gain", 0.8)),
            result("ranks-4", "one", "float32", 0, pooled("gain", 0.9)),
            result("qkv", "one", "float32", 0, pooled("gain", 0.2)),
        ]
    )
    assert table == {"float32": {"gain": (pytest.approx(0.9), "ranks", pytest.approx(0.3))}}


def test_spreads_go_by_the_floor_that_judged():
    """The float32 copy of a bf16 candidate is held against the float32 floor, and counts there."""
    table = nulls.spreads(
        [
            result("plain", "one", "bfloat16", 0, pooled("gain", 0.2), pooled("gain", 0.5, precision="bfloat16")),
            result("plain", "one", "float32", 0, pooled("gain", 0.2)),
        ]
    )
    assert table == {
        "bfloat16": {"gain": (pytest.approx(0.5), "plain", 0.0)},
        "float32": {"gain": (pytest.approx(0.2), "plain", 0.0)},
    }


def test_floors_leave_one_family_out():
    """The largest, unless it is the family's own: then the largest of the others."""
    table = {"float32": {"error": (0.5, "ranks", 0.2), "gain": (0.4, "plain", 0.1)}}
    assert nulls.floors(table) == {"float32": {"error": 0.5, "gain": 0.4}}
    assert nulls.floors(table, without="ranks") == {"float32": {"error": 0.2, "gain": 0.4}}
    assert nulls.floors(table, without="qkv") == nulls.floors(table)
    assert nulls.floors({}) == {}


def test_the_table_is_python():
    """What is printed for constants.py is the table, to three digits."""
    table = {"float32": {"log p": (0.123456, "ranks", 0.05), "error": (0.0, "plain", 0.0)}, "bfloat16": {}}
    name, _, literal = nulls.table_to_literal(table).partition(" = ")
    assert name == "SPREADS: Mapping[str, Mapping[str, tuple[float, str, float]]]"
    assert ast.literal_eval(literal) == {
        "float32": {"log p": (0.123, "ranks", 0.05), "error": (0.0, "plain", 0.0)},
        "bfloat16": {},
    }


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("alarms", "verdicts"), [(0, 1), (0, 3000), (1, 40), (7, 100), (99, 100), (5, 5)])
def test_the_bound_is_clopper_and_pearsons(alarms, verdicts):
    """The bound is scipy's exact one-sided one."""
    test = binomtest(alarms, verdicts, alternative="less")
    expected = test.proportion_ci(confidence_level=0.95, method="exact").high
    assert nulls.upper_bound(alarms, verdicts) == pytest.approx(expected, abs=1e-12)


def test_the_bound_of_nothing_is_one():
    """Without a verdict nothing is known; with 3,000 clean ones the rate is below 0.1 %."""
    assert nulls.upper_bound(0, 0) == 1.0
    assert nulls.upper_bound(0, 3000) < 1e-3 < nulls.upper_bound(0, 2990)


def test_the_summary_counts():
    """Alarms are three statuses; what was not judged is neither alarm nor success; copies and clusters count once."""
    same = (pooled("error", 0.1, z=1.0), pooled("gain", 0.1, z=-4.0))
    results = [
        result("plain", "one", "float32", 0, *same),
        result("qkv", "one", "float32", 0, *same),
        result("plain", "two", "float32", 0, pooled("error", -3.0, z=-9.0), status="drift"),
        result("qkv", "two", "float32", 0, status="structural", finding="NaN at x"),
        result("qkv", "two", "float32", 1, status="deviates", finding="error: much"),
        result("qkv", "one", "bfloat16", 0, status="nondeterministic"),
        result("qkv", "one", "bfloat16", 1, status="unmeasured", finding="no floor"),
        result("qkv", "one", "bfloat16", 2, status="error", finding="broken"),
        result("plain", "one", "bfloat16", 0, status="stale"),
        result("plain", "one", "bfloat16", 1, version="former", status="deviates"),
    ]
    summary = nulls.summarise(results)
    assert (summary.overall.alarms, summary.overall.count) == (3, 6)
    assert (summary.distinct.alarms, summary.distinct.count) == (3, 5)
    assert (summary.clusters.alarms, summary.clusters.count) == (2, 4)
    assert [one.status for one in summary.alarms] == ["structural", "deviates", "nondeterministic"]
    assert [one.status for one in summary.unjudged] == ["unmeasured", "error", "stale"]
    assert summary.former == 1
    lines = {(line.precision, line.family): line for line in summary.lines}
    assert lines["float32", "plain"].largest == (4.0, "gain")
    assert lines["float32", "qkv"].statuses == {"identical": 1, "structural": 1, "deviates": 1}
    assert lines["bfloat16", "qkv"].largest is None


def test_the_table_shows_every_count():
    """One row a precision and family, in the order of the lists; then rates and each alarm with its cause."""
    results = [
        result("qkv", "one", "float32", 0, pooled("gain", z=-4.0), status="drift"),
        result("qkv", "two", "float32", 3, status="deviates", finding="error: much"),
        result("plain", "one", "float32", 0),
        result("plain", "one", "float16", 0, status="unmeasured", finding="no floor"),
        result("plain", "one", "float16", 1, status="error", finding="broken"),
    ]
    text = nulls.summary_to_text(nulls.summarise(results))
    rows = [line.split() for line in text.splitlines()[1:4]]
    assert rows == [
        ["float32", "plain", "1", "1", "0", "0", "0", "0", "-"],
        ["float32", "qkv", "2", "0", "1", "1", "0", "0", "4.0", "(gain)"],
        ["float16", "plain", "2", "0", "0", "0", "1", "1", "-"],
    ]
    assert "1 of 3 (33.333%; at most" in text
    assert "alarm: two float32 qkv group 3: deviates: error: much" in text
    assert "not judged, 1 x unmeasured: no floor" in text
    assert "not judged, 1 x error: broken" in text


def test_the_summary_as_json():
    """Rates with their bounds, lines and every result, as plain JSON without NaN."""
    results = [result("plain", "one", "float32", 0, pooled()), result("qkv", "one", version="former")]
    data = json.loads(json.dumps(nulls.summary_to_dict(nulls.summarise(results), results), allow_nan=False))
    assert data["overall"] == {"alarms": 0, "count": 1, "bound": pytest.approx(0.95)}
    assert [one["family"] for one in data["results"]] == ["plain"]
    assert data["former"] == 1


# --- real verdicts -----------------------------------------------------------------------------


def test_a_few_real_verdicts(small_llama, tmp_path, monkeypatch):
    """Golden, engine, float32 copy and check together: both questions answered, goldens kept, nothing done twice."""
    records = []
    record = flow.record
    monkeypatch.setattr(flow, "record", lambda *given, **more: records.append(given) or record(*given, **more))
    monkeypatch.setattr(
        nulls, "generate_suite", partial(drawn.generate_suite, prompts=3, new_tokens=6, longest=30, long=None)
    )
    monkeypatch.setattr(nulls, "MODELS", {"small": small_llama})
    monkeypatch.setattr(nulls, "FAMILIES", {name: FAMILIES[name] for name in ("plain", "ranks-2")})
    monkeypatch.setattr(nulls, "PRECISIONS", ("float32", "bfloat16"))
    monkeypatch.setattr(drawn, "REPLICAS", 4)
    threads = torch.get_num_threads()
    nulls.run_nulls(4, tmp_path, silent)
    found = {(one.family, one.precision): one for one in nulls.read_results(tmp_path, NULLS)}
    assert set(found) == set(itertools.product(("plain", "ranks-2"), ("float32", "bfloat16")))
    assert all(one.status in {status.value for status in Status} - {"error", "stale"} for one in found.values())
    assert {one.question for one in found["ranks-2", "bfloat16"].statistics} == {"function", "precision"}
    assert {one.precision for one in found["ranks-2", "bfloat16"].statistics} == {"float32", "bfloat16"}
    assert found["ranks-2", "bfloat16"].statistics != found["plain", "bfloat16"].statistics
    assert torch.get_num_threads() == threads
    (tmp_path / "nulls.jsonl").unlink()
    nulls.run_nulls(4, tmp_path, silent)
    again = {(one.family, one.precision): one for one in nulls.read_results(tmp_path, NULLS)}
    assert {key: replace(one, seconds=0) for key, one in again.items()} == {
        key: replace(one, seconds=0) for key, one in found.items()
    }
    assert len(records) == 1
