"""The null bench: prompts, resumption, leave-one-out spreads, bounds, the table, and a few real verdicts."""

import ast
import itertools
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.stats import binomtest

from harness import cli, flow, power
from harness.engines import hf
from harness.errors import EngineError, UsageError
from harness.models.recipes import RECIPES
from harness.mutations.benign import FAMILIES
from harness.mutations.catalogue import CATALOGUE
from harness.power import NULLS, PILOT, Pooled, Result
from harness.values import Finding, Request, Statistic, Status, Verdict
from tests.engines.recorder import largest_difference, recorded
from tests.support import write_model

RULE = power.rule_version()
WHOLE = (0, 1)


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


# --- prompts -----------------------------------------------------------------------------------


def test_a_suite_is_drawn_from_its_seed():
    """The same seed gives the same suite, digest and all; another seed shares no prompt but the shortest."""
    one, other = power.generate_suite(2_000_000), power.generate_suite(2_000_001)
    assert one == power.generate_suite(2_000_000)
    assert one.digest != other.digest
    assert len(one.digest) == 64
    assert not {prompt.text for prompt in one.prompts if len(prompt.text) > 60} & {p.text for p in other.prompts}


def test_a_suite_is_one_padded_batch():
    """Eight prompts of very unequal length, one run of one batch with all three views, a budget of 32 tokens."""
    suite = power.generate_suite(5)
    assert len(suite.prompts) == 8
    assert suite.max_new_tokens == 32
    assert suite.stop == "ignore-eos"
    (run,) = suite.runs
    assert (run.name, run.batch_size, run.views) == ("batched", 8, ("generate", "replay", "prefill"))
    lengths = [len(prompt.text) for seed in range(10) for prompt in power.generate_suite(seed).prompts]
    assert min(lengths) < 60 < 400 < max(lengths) < 600


def test_seeds_are_nobody_elses():
    """Nulls, pilot, training and the committed suites draw from different seeds, however many groups there are."""
    taken = {recipe.seed + offset for recipe in RECIPES.values() for offset in (0, 1_000)} | {5, 20_231}
    groups = 100_000
    nulls, pilot = (set(range(bench.seed, bench.seed + groups)) for bench in (NULLS, PILOT))
    assert not nulls & pilot
    assert not (nulls | pilot) & taken


# --- running -----------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """A bench of two hosts, two families and two precisions whose verdicts cost nothing; returns what was checked."""
    checked = []

    @contextmanager
    def opened(family, model, precision):
        yield (str(model), family.name, precision)

    def check(golden, engine, *, reference, spreads):
        checked.append((*engine, golden))
        return Verdict(golden="", candidate="", status=Status.IDENTICAL, findings=())

    monkeypatch.setattr(power, "MODELS", {"one": "one", "two": "two"})
    monkeypatch.setattr(power, "FAMILIES", {name: FAMILIES[name] for name in ("plain", "ranks-2")})
    monkeypatch.setattr(power, "PRECISIONS", ("float32", "bfloat16"))
    monkeypatch.setattr(power, "opened", opened)
    monkeypatch.setattr(power, "recorded", lambda _model, suite, _out, _progress: suite.name)
    monkeypatch.setattr(flow, "check", check)
    return checked


def test_enough_groups_are_made(stub, tmp_path):
    """The number of verdicts is rounded up to whole groups: 8 combinations, so 9 verdicts are 16."""
    power.run_nulls(9, tmp_path, silent)
    found = power.read_results(tmp_path, NULLS)
    assert len(found) == len(stub) == len(set(stub)) == 16
    assert {one.group for one in found} == {0, 1}
    assert {golden for *_, golden in stub} == {"null-2000000", "null-2000001"}


def test_a_run_goes_on_where_it_was(stub, tmp_path):
    """What is there is not done again, a line cut short by a kill is; more groups are added to the first ones."""
    power.run_nulls(8, tmp_path, silent)
    file = tmp_path / "nulls.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert len(power.read_results(tmp_path, NULLS)) == 7
    stub.clear()
    power.run_nulls(8, tmp_path, silent)
    assert len(stub) == 1
    assert file.read_bytes() == whole
    power.run_nulls(16, tmp_path, silent)
    assert len(stub) == 9
    assert file.read_bytes().startswith(whole)


def test_another_rule_is_another_verdict(stub, tmp_path, monkeypatch):
    """Verdicts of former constants stay in the file, are left out of the table, and are given again."""
    monkeypatch.setattr(power, "rule_version", lambda: "former")
    power.run_nulls(8, tmp_path, silent)
    monkeypatch.setattr(power, "rule_version", lambda: "present")
    power.run_nulls(8, tmp_path, silent)
    summary = power.summarise(power.read_results(tmp_path, NULLS))
    assert len(stub) == 16
    assert summary.overall.count == 8
    assert summary.former == 8
    assert "8 verdicts of former versions" in power.summary_to_text(summary)


def test_the_pilot_is_apart_from_the_nulls(stub, tmp_path):
    """The pilot has prompts and a file of its own."""
    power.run_pilot(1, tmp_path, silent)
    assert {golden for *_, golden in stub} == {"null-3000000"}
    assert power.read_results(tmp_path, NULLS) == []
    assert len(power.read_results(tmp_path, PILOT)) == 8


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_shards_cover_everything_once(number):
    """Each combination of host, family and precision is in exactly one shard."""
    parts = [power.combinations((index, number)) for index in range(number)]
    assert Counter(itertools.chain(*parts)) == Counter(power.combinations(WHOLE))
    assert len(power.combinations(WHOLE)) == 4 * len(FAMILIES) * 3
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_write_their_own_files(stub, tmp_path):
    """Two processes share the work without a line in common, and either sees what the other has done."""
    for index in (0, 1):
        power.run_nulls(8, tmp_path, silent, (index, 2))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["nulls-0.jsonl", "nulls-1.jsonl"]
    assert len(stub) == len(set(stub)) == 8
    power.run_nulls(8, tmp_path, silent)
    assert len(stub) == 8


def test_the_time_limit_ends_a_run_cleanly(stub, tmp_path, monkeypatch):
    """After the limit no further verdict is begun; what is there is whole, and counts for the next run."""
    clock = itertools.count(step=10)
    monkeypatch.setattr(power.time, "monotonic", lambda: next(clock))
    power.run_nulls(8, tmp_path, silent, minutes=0.5)
    some = len(power.read_results(tmp_path, NULLS))
    assert 0 < some < 8
    power.run_nulls(8, tmp_path, silent)
    assert len(stub) == len(power.read_results(tmp_path, NULLS)) == 8


def test_progress_counts_what_is_there(stub, tmp_path):
    """A run that goes on begins where it was, and ends at the whole."""
    power.run_nulls(8, tmp_path, silent)
    seen = []
    power.run_nulls(16, tmp_path, lambda done, total, text: seen.append((done, total, text)))
    assert [done for done, _, _ in seen] == list(range(9, 17))
    assert {total for _, total, _ in seen} == {16}
    assert all(re.fullmatch(r"(one|two) (float32|bfloat16) (plain|ranks-2)", text) for _, _, text in seen)


def test_a_host_without_the_part_is_skipped(stub, tmp_path, monkeypatch):
    """What cannot be tried is written down as skipped, and is no success."""

    @contextmanager
    def opened(family, model, precision):
        if family.name == "ranks-2":
            raise LookupError("it has no such part")
        yield (str(model), family.name, precision)

    monkeypatch.setattr(power, "opened", opened)
    power.run_nulls(8, tmp_path, silent)
    summary = power.summarise(power.read_results(tmp_path, NULLS))
    assert summary.overall.count == 4
    assert [(one.status, one.finding) for one in summary.unjudged] == [("skipped", "it has no such part")] * 4
    assert "not judged, 4 x skipped: it has no such part" in power.summary_to_text(summary)


def test_a_fault_of_the_bench_is_not_skipped(stub, tmp_path, monkeypatch):
    """A KeyError is a LookupError too, but says nothing of the host."""

    @contextmanager
    def opened(_family, _model, _precision):
        yield {}["missing"]

    monkeypatch.setattr(power, "opened", opened)
    with pytest.raises(KeyError):
        power.run_nulls(8, tmp_path, silent)


def test_each_family_is_judged_by_the_others(stub, tmp_path, monkeypatch):
    """A family's own scatter never sets the limit that it is held against; a kin's does not either."""
    given = {}

    def check(_golden, engine, *, reference, spreads):
        given[engine[1]] = spreads
        return Verdict(golden="", candidate="", status=Status.IDENTICAL, findings=())

    monkeypatch.setattr(flow, "check", check)
    monkeypatch.setattr(power, "SPREADS", {"float32": {"error": (0.5, "ranks", 0.2), "gain": (0.4, "plain", 0.1)}})
    power.run_nulls(8, tmp_path, silent)
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
    power.run_nulls(1, tmp_path, silent)
    found = power.read_results(tmp_path, NULLS)[0]
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
        power.read_results(tmp_path, NULLS)


# --- spreads -----------------------------------------------------------------------------------


def test_spreads_are_root_mean_squares():
    """Over hosts and groups a signed statistic counts in both directions, a magnitude only where it is too large."""
    found = power.spreads(
        [
            result("plain", "one", "float32", 0, pooled("gain", 0.3), pooled("error", 0.3)),
            result("plain", "two", "float32", 0, pooled("gain", -0.4), pooled("error", -0.4)),
        ]
    )
    assert found["float32"]["gain"] == (pytest.approx(0.125**0.5), "plain", 0.0)
    assert found["float32"]["error"] == (pytest.approx(0.045**0.5), "plain", 0.0)


def test_spreads_are_beyond_the_replicas():
    """What the golden's own replicas show is taken off; one standard error of two values stays in any case."""
    found = power.spreads(
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
        return power.spreads(one)["float32"]["gain"][0]

    assert scatter(32) == pytest.approx(scatter(2) / 2)


def test_spreads_name_the_largest_family_and_the_next():
    """The largest family by name, the largest of the others without; two families of one kin are one."""
    table = power.spreads(
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
    table = power.spreads(
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
    assert power.floors(table) == {"float32": {"error": 0.5, "gain": 0.4}}
    assert power.floors(table, without="ranks") == {"float32": {"error": 0.2, "gain": 0.4}}
    assert power.floors(table, without="qkv") == power.floors(table)
    assert power.floors({}) == {}


def test_the_table_is_python():
    """What is printed for constants.py is the table, to three digits."""
    table = {"float32": {"log p": (0.123456, "ranks", 0.05), "error": (0.0, "plain", 0.0)}, "bfloat16": {}}
    name, _, literal = power.table_to_literal(table).partition(" = ")
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
    assert power.upper_bound(alarms, verdicts) == pytest.approx(expected, abs=1e-12)


def test_the_bound_of_nothing_is_one():
    """Without a verdict nothing is known; with 3,000 clean ones the rate is below 0.1 %."""
    assert power.upper_bound(0, 0) == 1.0
    assert power.upper_bound(0, 3000) < 1e-3 < power.upper_bound(0, 2990)


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
    summary = power.summarise(results)
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
    text = power.summary_to_text(power.summarise(results))
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
    data = json.loads(json.dumps(power.summary_to_dict(power.summarise(results), results), allow_nan=False))
    assert data["overall"] == {"alarms": 0, "count": 1, "bound": pytest.approx(0.95)}
    assert [one["family"] for one in data["results"]] == ["plain"]
    assert data["former"] == 1


# --- real verdicts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama with a tokenizer, bf16 weights."""
    return write_model(tmp_path_factory.mktemp("bench") / "small" / "model")


def test_a_float32_copy_is_made_of_the_plain_model_and_changed_anew(model):
    """The copy of a 16-bit candidate computes in float32, as the family does, and from the candidate's weights."""
    requests = [Request(id="a", prompt_ids=tuple(range(5, 45)), max_new_tokens=2)]
    show = partial(recorded, view="prefill", requests=requests, continuations=[(7, 8)])
    with power.opened(FAMILIES["plain"], model, "bfloat16") as plain, plain.upcast() as wide:
        assert wide.settings["dtype"] == "float32"
        expected = show(wide)
        rounded = show(plain)
    for name in ("ranks-2", "permuted", "norms-stepwise"):
        with power.opened(FAMILIES[name], model, "bfloat16") as engine, engine.upcast() as wide:
            found = show(wide)
        assert 0 < largest_difference(found, expected) < 1e-4 < largest_difference(rounded, expected), name
    with power.opened(FAMILIES["plain"], model, "float32") as engine, pytest.raises(EngineError):
        engine.upcast()


def test_an_engine_is_loaded_once(model, monkeypatch):
    """However often it is entered, the model is loaded once and is there until the end."""
    loads = []
    load = hf.HFEngine._load
    monkeypatch.setattr(hf.HFEngine, "_load", lambda self: loads.append(self) or load(self))
    with power.opened(FAMILIES["batch-1"], model, "bfloat16") as engine:
        for _ in range(3):
            with engine, engine.upcast() as wide:
                assert engine.settings["batch"] == wide.settings["batch"] == 1
                assert engine.vocabulary == wide.vocabulary
    assert len(loads) == 1
    assert "deterministic" in engine.capabilities


def test_a_few_real_verdicts(model, tmp_path, monkeypatch):
    """Golden, engine, float32 copy and check together: both questions answered, goldens kept, nothing done twice."""
    records = []
    record = flow.record
    monkeypatch.setattr(flow, "record", lambda *given, **more: records.append(given) or record(*given, **more))
    monkeypatch.setattr(power, "generate_suite", partial(power.generate_suite, prompts=3, new_tokens=6, longest=30))
    monkeypatch.setattr(power, "MODELS", {"small": model})
    monkeypatch.setattr(power, "FAMILIES", {name: FAMILIES[name] for name in ("plain", "ranks-2")})
    monkeypatch.setattr(power, "PRECISIONS", ("float32", "bfloat16"))
    monkeypatch.setattr(power, "REPLICAS", 4)
    threads = torch.get_num_threads()
    power.run_nulls(4, tmp_path, silent)
    found = {(one.family, one.precision): one for one in power.read_results(tmp_path, NULLS)}
    assert set(found) == set(itertools.product(("plain", "ranks-2"), ("float32", "bfloat16")))
    assert all(one.status in {status.value for status in Status} - {"error", "stale"} for one in found.values())
    assert {one.question for one in found["ranks-2", "bfloat16"].statistics} == {"function", "precision"}
    assert {one.precision for one in found["ranks-2", "bfloat16"].statistics} == {"float32", "bfloat16"}
    assert found["ranks-2", "bfloat16"].statistics != found["plain", "bfloat16"].statistics
    assert torch.get_num_threads() == threads
    (tmp_path / "nulls.jsonl").unlink()
    power.run_nulls(4, tmp_path, silent)
    again = {(one.family, one.precision): one for one in power.read_results(tmp_path, NULLS)}
    assert {key: replace(one, seconds=0) for key, one in again.items()} == {
        key: replace(one, seconds=0) for key, one in found.items()
    }
    assert len(records) == 1


def test_a_golden_that_does_not_fit_is_made_anew(model, tmp_path, monkeypatch):
    """Damage, another suite or another model in the place of a golden: it is recorded again."""
    made = []
    monkeypatch.setattr(power, "REPLICAS", 2)
    record = partial(flow.record, precisions=["float32"])
    monkeypatch.setattr(flow, "record", lambda *given, **more: made.append(1) or record(*given, **more))
    suite = power.generate_suite(3, prompts=2, new_tokens=2, longest=12)
    place = tmp_path / "goldens" / "small" / "x"
    first = power.recorded(model, suite, place)
    assert power.recorded(model, suite, place).suite == suite
    assert len(made) == 1
    (place / "golden.json").write_text("{}", encoding="utf-8")
    power.recorded(model, suite, place)
    assert len(made) == 2
    other = power.generate_suite(4, prompts=2, new_tokens=2, longest=12)
    assert power.recorded(model, other, place).suite == other
    assert len(made) == 3
    elsewhere = write_model(tmp_path / "other" / "model", seed=1)
    assert power.recorded(elsewhere, other, place).model.digest != first.model.digest
    assert len(made) == 4


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch, capsys):
    """Run the command in this process: (exit code, output, errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["harness", "power", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of --nulls, --spreads, --summary and --list"),
        (("--nulls", 5, "--summary"), "give one of"),
        (("--spreads",), "--spreads and --groups go together"),
        (("--nulls", 5, "--groups", 2), "--spreads and --groups go together"),
        (("--summary", "--minutes", 3), "--shard and --minutes are of a run"),
        (("--list", "--shard", "0/2"), "--shard and --minutes are of a run"),
        (("--list", "--json", "x.json"), "--json is of the nulls"),
        (("--summary", "--json", "nowhere/x.json"), "does not exist"),
        (("--summary", "--json", "."), "is a directory"),
        *((("--nulls", 5, "--shard", shard), "is no part of a run") for shard in ("2/2", "1", "a/b", "-1/2", "1/0")),
    ],
)
def test_what_does_not_go_together_is_one_line(harness, arguments, words):
    """Usage errors of the command are one line with the fix, exit 2, before anything is done."""
    code, out, err = harness(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert words in err


def test_the_command_lists_families_and_bugs(harness):
    """One line a family of correct implementations, and one a bug of the catalogue, by group."""
    code, out, err = harness("--list")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed[: len(FAMILIES)] == list(FAMILIES)
    assert sorted(listed[len(FAMILIES) :]) == sorted(CATALOGUE)
    counts = [int(line.rpartition(": ")[2]) for line in out.splitlines()[1:] if not line.startswith("  ")]
    assert sum(counts) == len(CATALOGUE)


def test_the_command_runs_and_shows(harness, stub, tmp_path):
    """Nulls in two parts, then the table alone, then as JSON; spreads as text for constants.py."""
    work = tmp_path / "work"
    code, out, _ = harness("--nulls", 8, "--work", work, "--shard", "0/2")
    assert (code, len(stub)) == (0, 4)
    assert "0 of 4" in out
    _, out, _ = harness("--nulls", 8, "--work", work, "--shard", "1/2")
    assert "0 of 8" in out
    assert harness("--summary", "--work", work) == (0, out, "")
    _, out, _ = harness("--summary", "--work", work, "--json", "-")
    assert len(json.loads(out)[0]["results"]) == 8
    code, out, _ = harness("--spreads", "--groups", 1, "--work", work, "--minutes", 5)
    assert code == 0
    assert out.startswith("SPREADS: Mapping")
    assert len(stub) == 16
