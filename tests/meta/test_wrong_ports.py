"""Fourteen ways in which a wrong port passes in well-known checks, and that it does not pass here.

| way | passes elsewhere because | is stopped here because |
|---|---|---|
| 1 | NaN is not `> bound` | what is not finite is counted before any number is compared |
| 2 | missing outputs are skipped, renamed ones guessed | the suite says what is asked, and all of it must be there |
| 3 | a bound is typed by hand | limits are measured on the reference, and no option sets one |
| 4 | a bound grows with the tensor | each row's error is divided by that row's own round-off |
| 5 | NaN equals NaN | no golden of NaN is recorded or read, and NaN is in no limit |
| 6 | a check prints and asserts nothing | what is not ok is false, raises, fails its test, and ends the command so |
| 7 | a quota of steps may fail by any amount | worst position and each token have limits of their own |
| 8 | a flaky failure runs again | nothing runs again, and each visit of a prompt is judged |
| 9 | the candidate is compared with itself | goldens are stored, and a live reference must still give them |
| 10 | the setting in the name never ran | settings are read back from what runs, and held against the name |
| 11 | all behind a first differing token is unchecked | each token is judged on the prefix that it was chosen on |
| 12 | unequal lengths are zipped | lengths, ends and positions are compared before content |
| 13 | top values are compared without their ids | values are looked up by token id |
| 14 | an update rewrites the golden and passes | what wrote a golden fails, and beyond drift it needs a reason |

Each way is run for real, in both directions: the wrong port fails, and the right one, or a harmless variant, passes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from harness import cli, flow, pytest_plugin, store, suites
from harness.engines import hf
from harness.engines.hf import HFEngine, Options
from harness.errors import GoldenError, HarnessError, ModelError, SuiteError, UsageError
from harness.numerics import metrics, statistics
from harness.numerics.constants import SPREADS
from harness.values import Golden, Kind, Status
from tests.meta.engines import Scattered, Served
from tests.meta.ports import Forgetful, Named, Port, Renamed, Tokenizing, Told, Visits, at, padded
from tests.support import SUITE, random_model, write_model, write_suite

ROOT = Path(__file__).parents[2]
PORTS = "py:tests.meta.ports"

#: Rows up to here belong to several prompts of a suite, rows from here on to its one long prompt.
LONG = 24
WEIGHT = "transformer.h.1.mlp.dense_4h_to_h.weight"
NAN = float("nan")

MANY = """
name = "many"
description = "Sixty prompts of ids, the first of them long."
stop = "ignore-eos"
add_special_tokens = false
max_new_tokens = 12

[[runs]]
name = "batched"
views = ["replay", "prefill"]
quick = true
"""

ENDS = """
name = "ends"
description = "Continuations that may end before their limit."
stop = "eos"
add_special_tokens = false
max_new_tokens = 6

[[prompts]]
id = "one"
ids = [7, 8, 9, 10, 11]

[[prompts]]
id = "two"
ids = [20, 21, 22]

[[runs]]
name = "single"
batch_size = 1
views = ["generate", "replay"]
quick = true
"""

#: What a port repeats to the bit: whole sequences, in the batch that they were recorded in.
FOREIGN = ENDS.replace('"eos"', '"ignore-eos"').replace('"generate", "replay"', '"generate", "prefill"')
FOREIGN = FOREIGN.replace("batch_size = 1\n", "")


# --- a small BLOOM, and three goldens of it ------------------------------------------------------


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Another working directory for a while: a golden names its model and suite relative to it."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `golden/bloom/model` and its golden `few`, of three prompts (read only)."""
    directory = tmp_path_factory.mktemp("place")
    with inside(directory):
        model = write_model(Path("golden/bloom/model"), "bloom")
        flow.record(model, write_suite(Path("prompts/few.toml"), SUITE), out="golden/bloom/few", replicas=24)
    return directory


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """The directory of the model."""
    return place / "golden/bloom/model"


@pytest.fixture(scope="module")
def few(place: Path) -> Golden:
    """Three prompts, every view."""
    return harness.load_golden(place / "golden/bloom/few")


@pytest.fixture(scope="module")
def many(place: Path) -> Golden:
    """Sixty prompts, 720 generated steps, some of which are near-ties in bfloat16."""
    lengths = [64] + [8] * 59
    prompts = [
        f'[[prompts]]\nid = "p{i:02}"\nids = {[(7 * i + 11 * j + i * j) % 290 + 5 for j in range(length)]}\n'
        for i, length in enumerate(lengths)
    ]
    with inside(place):
        suite = write_suite(Path("prompts/many.toml"), MANY + "\n" + "\n".join(prompts))
        return flow.record(
            "golden/bloom/model", suite, out=place / "golden/bloom/many", precisions=("float32", "bfloat16")
        )


@pytest.fixture(scope="module")
def ends(place: Path, few: Golden) -> Golden:
    """The same model with another end token, one that it gives as its third: that continuation ends there."""
    end = next(given.tokens[2] for given in few.generations if given.tokens[2] not in given.tokens[:2])
    index = next(i for i, given in enumerate(few.generations) if given.tokens[2] == end)
    ids = list(few.requests[index].prompt_ids)
    with inside(place):
        shutil.copytree("golden/bloom/model", "golden/ends/model")
        for name in ("config.json", "generation_config.json"):
            file = Path("golden/ends/model") / name
            file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": end}))
        suite = write_suite(Path("prompts/ends.toml"), ENDS.replace("[7, 8, 9, 10, 11]", str(ids)))
        golden = flow.record(
            "golden/ends/model", suite, out=place / "golden/ends/ends", precisions=("float32",), replicas=12
        )
    assert {given.finish for given in golden.generations} == {"eos", "length"}
    return golden


def options(golden: Golden, **more: Any) -> Options:
    """The golden's own model in float32, as an engine loads it."""
    assert golden.directory is not None
    return Options(**{"model": str(Path(golden.directory).parent / "model"), "dtype": "float32", **more})


def scaled(golden: Golden, factor: float, dtype: torch.dtype = torch.float32) -> Any:
    """A live model, one of whose weight matrices is off by a factor."""
    live = harness.reference_model(golden, dtype=dtype)
    with torch.no_grad():
        weight = live.get_parameter(WEIGHT)
        weight.copy_((weight.double() * factor).to(dtype))
    return live


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of the command `harness`."""
    monkeypatch.setattr("sys.argv", ["harness", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of each file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


# --- 1: NaN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [LONG, 41], ids=["in a prompt", "in a continuation"])
def test_way_01_not_finite_is_no_small_difference(few, model, position, value):
    """One logit of one position that is not finite fails; the port without it passes."""
    port = Port(model, change=at(position, 3, value))
    verdict = harness.check(few, port)
    assert verdict.status is Status.STRUCTURAL
    assert {finding.check for finding in verdict.failures} >= {"finite"}
    assert harness.check(few, Port(model)).ok


def test_way_01_nan_with_every_token_right(few, model):
    """A NaN in a prompt turns no token of a continuation, and fails all the same."""
    trace = harness.run(Port(model, change=at(LONG, 3, NAN)), few)
    for one in trace.passes:
        shown = [given.tokens for given in one.generations]
        assert shown == [few.generations[i].tokens for i in one.requests][: len(shown)]
        if one.rows is not None:
            expected = [token for i in one.requests for token in few.generations[i].tokens]
            assert one.rows.argmax[one.rows.generated].tolist() == expected
    assert harness.check(few, trace).status is Status.STRUCTURAL


def test_way_01_nan_among_top_entries(few):
    """A server's NaN below a right best token fails; the value that was there passes."""

    def spoilt(given: Any) -> Any:
        return replace(given, top_logits=tuple((*step[:-1], NAN) for step in given.top_logits))

    assert harness.check(few, Told(options(few, show="top"), spoilt)).status is Status.STRUCTURAL
    assert harness.check(few, Told(options(few, show="top"), lambda given: given)).ok


def test_way_01_padding_columns_may_be_masked(few, model):
    """Columns behind the vocabulary may be minus infinity, which never wins; NaN there would."""
    assert harness.check(few, Port(model, change=padded(float("-inf"))), quick=True).ok
    assert harness.check(few, Port(model, change=padded(NAN)), quick=True).status is Status.STRUCTURAL


# --- 2: missing and renamed outputs --------------------------------------------------------------


def test_way_02_a_trace_with_a_pass_missing_or_renamed(few, model, tmp_path):
    """Each pass of a trace is needed, under its own name; the whole trace passes, from its file too."""
    trace = harness.run(Port(model), few)
    trace.save(tmp_path / "whole.trace")
    assert harness.check(few, harness.load_trace(tmp_path / "whole.trace")).ok
    for index, one in enumerate(trace.passes):
        rest = (*trace.passes[:index], *trace.passes[index + 1 :])
        other_view = "prefill" if one.view == "replay" else "replay"
        wrong = {
            "missing": rest,
            "its run renamed": (*rest, replace(one, run=f"{one.run}-1")),
            "its view renamed": (*rest, replace(one, view=other_view)),
            "another's in its place": (*rest, rest[0]),
        }
        for name, passes in wrong.items():
            replace(trace, passes=passes).save(tmp_path / "wrong.trace")
            verdict = harness.check(few, harness.load_trace(tmp_path / "wrong.trace"))
            assert verdict.status is Status.STRUCTURAL, (one.run, one.view, name)
            assert any("is missing" in finding.message for finding in verdict.failures), (one.run, one.view, name)


@pytest.mark.parametrize("forgets", [{"prompts": 1}, {"steps": 1}])
def test_way_02_an_engine_that_returns_less_than_it_promised(few, forgets):
    """The last prompt of a batch, or the last step of each, is not passed over."""
    verdict = harness.check(few, Forgetful(options(few), **forgets))
    assert verdict.status is Status.STRUCTURAL
    assert {finding.check for finding in verdict.failures} == {"lengths"}
    assert harness.check(few, Forgetful(options(few))).ok


def test_way_02_an_output_of_another_name_is_not_guessed(few, model):
    """A port that calls its logits `scores` is told so."""
    verdict = harness.check(few, Renamed(model))
    assert verdict.status is Status.ERROR
    assert "returned a dict for logits" in verdict.findings[0].message


def test_way_02_what_an_engine_cannot_show_is_said(few):
    """Less than all is named in the verdict; nothing at all is no pass."""

    def showing(*capabilities: str) -> HFEngine:
        engine = HFEngine(options(few), text="shows less")
        engine.capabilities = frozenset(capabilities)
        return engine

    nothing = harness.check(few, showing())
    assert nothing.status is Status.UNMEASURED
    whole = harness.check(few, showing("logits"))
    assert whole.ok
    assert "not seen: the decode path: the candidate shows whole sequences alone" in str(whole)
    decode = harness.check(few, showing("tokens", "replay"))
    assert decode.ok
    assert "not seen: the prompt's own positions: the candidate shows the decode path alone" in str(decode)
    assert harness.check(few, showing("logits", "tokens", "replay")).power.unmeasured == ()


# --- 3: bounds typed by hand ---------------------------------------------------------------------

#: Words of options that would let more pass. Those that are meant otherwise are listed with what they allow.
LOOSE = re.compile(
    r"(a|r)?tol(erance)?|eps(ilon)?|threshold|bound|limit|accept|slack|ignore|skip|rerun|retry|attempts|xfail|loose|"
    r"max|min|factor|percent|ratio|sigma|alpha|allow"
)
MEANT = {"allow_code"}  # which candidates may be run, not what passes
NUMBER = re.compile(r"\b(int|float|IntRange|FloatRange|IntParamType|FloatParamType)\b")


def _parameters() -> Iterator[tuple[str, str, Any]]:
    """(where, name, what it takes) of everything that a check can be told."""
    calls = {"check": flow.check, "run": flow.run, "compare": flow.compare}
    calls |= {"golden.check": pytest_plugin.GoldenFixture.check, "record": flow.record}
    for where, function in calls.items():
        for name, parameter in inspect.signature(function).parameters.items():
            yield where, name, str(parameter.annotation)
    for where in ("check", "run", "compare", "record"):
        for parameter in cli.cli.commands[where].params:
            yield f"harness {where}", str(parameter.name), type(parameter.type).__name__
    for name in hf.READERS:
        yield "hf:", name, ""


def test_way_03_no_option_sets_a_limit():
    """Nothing that a check can be told is a number or bears the name of a tolerance."""
    found = list(_parameters())
    assert len(found) > 60
    for where, name, kind in found:
        words = [] if name in MEANT else name.split("_")
        assert not any(LOOSE.fullmatch(word) for word in words), (where, name)
        if where not in ("record", "harness record", "hf:"):
            assert not NUMBER.search(kind), (where, name)


def test_way_03_the_options_of_pytest_set_none(pytester):
    """Nor does an option of the plugin, or a setting of its ini file."""
    shown = pytester.runpytest_inprocess("--help").stdout.str()
    names = re.findall(r"--golden-([a-z-]+)", shown)
    assert {"update", "report", "reason"} <= set(names)
    assert not any(LOOSE.fullmatch(word) for name in names for word in name.split("-"))
    assert re.findall(r"^ +(golden_\w+)", shown, re.MULTILINE) == ["golden_root"]
    refused = pytester.runpytest_inprocess("--golden-tolerance=1")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR


def test_way_03_a_typed_limit_is_refused(few, place, monkeypatch, tmp_path):
    """Wherever somebody writes one, it is an error and not passed over; the same words without it pass."""
    assert harness.check(few, "hf:dtype=float32", quick=True).ok
    with pytest.raises(TypeError, match="atol"):
        harness.check(few, "hf:dtype=float32", atol=1.0)
    with pytest.raises(UsageError, match="atol"):
        harness.check(few, "hf:dtype=float32,atol=1")
    golden = place / "golden/bloom/few"
    assert command(monkeypatch, "check", golden, "--quick", "-c", "hf:dtype=float32") == 0
    assert command(monkeypatch, "check", golden, "--quick", "-c", "hf:dtype=float32", "--atol", "1") == 2
    write_suite(tmp_path / "suite.toml", SUITE)
    assert suites.load_suite(tmp_path / "suite.toml").name == "small"
    write_suite(tmp_path / "suite.toml", f"atol = 1.0\n{SUITE}")
    with pytest.raises(SuiteError, match="atol"):
        suites.load_suite(tmp_path / "suite.toml")


def test_way_03_a_wider_scatter_is_refused(few):
    """The scatter of correct implementations can be made smaller by who measures it, and never larger."""
    largest = {name: largest for name, (largest, _, _) in SPREADS["float32"].items()}
    assert harness.check(few, "hf:dtype=float32", quick=True, spreads={"float32": largest}).ok
    for wide in (1e6, NAN):
        with pytest.raises(UsageError, match="wider than the measured"):
            harness.check(few, scaled(few, 1.5), quick=True, spreads={"float32": {**largest, "error": wide}})


def test_way_03_a_wider_floor_says_nothing(few, tmp_path):
    """A golden of a few replicas would pass too much, and is told so; the figure in its file cannot be changed."""
    wrong = scaled(few, 1 + 3e-6)
    assert harness.check(few, wrong, quick=True).status is Status.DEVIATES
    floor = replace(few.floors["float32"], effective=3.0)
    widened = replace(few, floors={**few.floors, "float32": floor})
    assert harness.check(widened, wrong, quick=True).status is Status.UNMEASURED
    assert harness.check(widened, "hf:dtype=float32", quick=True).status is Status.UNMEASURED
    shutil.copytree(few.directory, tmp_path / "golden")
    file = tmp_path / "golden/golden.json"
    words = json.loads(file.read_text())
    words["floors"]["float32"]["effective"] = 3.0
    file.write_text(json.dumps(words))
    with pytest.raises(GoldenError, match="changed after it was written"):
        harness.check(tmp_path / "golden", wrong, quick=True)


def test_way_03_what_typed_limits_pass(few):
    """A bug of five times the round-off of bfloat16 passes three rules that projects have typed, and fails here."""
    right, wrong = (scaled(few, factor, torch.bfloat16) for factor in (1.0, 1.12))
    truth = scaled(few, 1.0)
    largest = relative = 0.0
    for request in few.requests:
        ids_BT = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            error, expected = wrong(ids_BT).logits - truth(ids_BT).logits, truth(ids_BT).logits
        largest = max(largest, float(error.abs().max()))
        relative = max(relative, float(error.abs().max() / expected.abs().max()))
    assert largest < 25
    assert relative < 10 * torch.finfo(torch.bfloat16).eps
    verdict = harness.check(few, wrong, upcast=False)
    assert all(one.flips == 0 for one in verdict.passes)
    assert verdict.status is Status.DEVIATES
    assert 4 < next(one.ratio for one in verdict.passes if one.view == "replay") < 7
    assert harness.check(few, right, upcast=False).ok


# --- 4: bounds that grow with size ---------------------------------------------------------------


def test_way_04_more_prompts_do_not_widen_the_limit(few, many):
    """The same relative bug, 5 times round-off, fails on 3 prompts and on 60, by limits that agree."""
    limits = []
    for golden in (few, many):
        verdict = harness.check(golden, scaled(golden, 1 + 3e-6), quick=True)
        assert verdict.status is Status.DEVIATES
        error = next(one for one in verdict.statistics if one.name == statistics.ERROR and one.unit == "all")
        assert 4 < np.exp(error.value) < 6
        assert error.is_failing
        limits.append(float(np.exp(error.failing[1])))
        assert harness.check(golden, "hf:dtype=float32", quick=True).ok
    assert limits[1] == pytest.approx(limits[0], rel=0.05)


# --- 5: NaN equals NaN ---------------------------------------------------------------------------


def test_way_05_a_reference_with_nan_is_not_recorded(few, place, tmp_path, monkeypatch):
    """A model or a port that gives NaN cannot become a golden; without the NaN it can."""
    live = harness.reference_model(few)
    with torch.no_grad():
        live.get_parameter(WEIGHT)[3] = NAN
    shutil.copytree(place / "golden/bloom/model", tmp_path / "model")
    live.save_pretrained(tmp_path / "model")
    ids = ENDS.replace('"eos"', '"ignore-eos"').replace("[20, 21, 22]", str([9] * 40))
    suite = write_suite(tmp_path / "ids.toml", ids)
    for reference in (tmp_path / "model", f"{PORTS}:not_a_number?model={place / 'golden/bloom/model'}"):
        with pytest.raises(ModelError, match="not finite"):
            flow.record(reference, suite, out=tmp_path / "golden", precisions=("float32",), replicas=2)
        assert not (tmp_path / "golden").exists()
    flow.record(f"{PORTS}:right?model={place / 'golden/bloom/model'}", suite, out=tmp_path / "golden")
    assert store.read_golden(tmp_path / "golden").rows is not None


def test_way_05_a_golden_of_nan_is_not_read(ends, tmp_path):
    """A NaN that found its way into the file of a golden is refused there."""
    store.write_golden(ends, tmp_path / "golden")
    assert harness.load_golden(tmp_path / "golden").name == ends.name
    store.write_golden(with_nan(ends), tmp_path / "golden")
    with pytest.raises(GoldenError, match="NaN"):
        harness.load_golden(tmp_path / "golden")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy says what it meets
@pytest.mark.parametrize("field", ["projections", "logp", "entropy", "top_logits"])
def test_way_05_a_golden_of_nan_in_memory_passes_nothing(few, model, field):
    """NaN on one side or on both is never equal: not the right port, nor one with NaN at the same place."""
    blessed = replace(with_nan(few, field), directory=None)
    assert not harness.check(blessed, Port(model)).ok
    assert not harness.check(blessed, Port(model, change=at(LONG, 3, NAN))).ok
    assert harness.check(replace(few, directory=None), Port(model)).ok


def with_nan(golden: Golden, field: str = "projections") -> Golden:
    """The golden with a NaN in the row of one position, or in that of one step."""
    place = int(np.flatnonzero(golden.rows.position == golden.rows.position.max())[0])
    values = getattr(golden.rows, field).copy()
    values[int(golden.rows.generated[:place].sum()) if field == "top_logits" else place] = NAN
    return replace(golden, rows=replace(golden.rows, **{field: values}))


# --- 6: checks that assert nothing ---------------------------------------------------------------

STATUSES = {
    Status.IDENTICAL: f"{PORTS}:right",
    Status.DRIFT: f"{PORTS}:restless",
    Status.DEVIATES: f"{PORTS}:broken",
    Status.STRUCTURAL: f"{PORTS}:not_a_number",
    Status.NONDETERMINISTIC: f"{PORTS}:claiming",
    Status.UNMEASURED: "hf:dtype=float32,show=tokens",
    Status.STALE: "hf:model=golden/other",
    Status.ERROR: f"{PORTS}:raising",
}


@pytest.fixture(scope="module")
def other(place: Path) -> Path:
    """A model of other shapes."""
    random_model("gpt2").save_pretrained(place / "golden/other")
    return place / "golden/other"


@pytest.mark.parametrize("status", Status)
def test_way_06_whatever_is_not_ok_is_heard(place, other, monkeypatch, status):
    """Every status that there is, from a real run: false, raised and another exit code than 0 unless it is ok."""
    monkeypatch.chdir(place)
    verdict = harness.check("golden/bloom/few", STATUSES[status])
    assert verdict.status is status, str(verdict)
    assert bool(verdict) is verdict.ok is (status in (Status.IDENTICAL, Status.DRIFT))
    code = command(monkeypatch, "check", "golden/bloom/few", "-c", STATUSES[status])
    assert code == status.exit_code
    assert (code == 0) is verdict.ok
    if verdict.ok:
        verdict.raise_if_failed()
    else:
        with pytest.raises(AssertionError, match=status.value):
            verdict.raise_if_failed()


def test_way_06_a_test_that_ignores_the_verdict_fails(pytester, place, few, other):
    """In pytest a check that is not ok fails its test, whether or not anybody looks at what it returned."""
    shutil.copytree(place, pytester.path, dirs_exist_ok=True)
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.parametrize("candidate", {list(STATUSES.values())!r})
        def test_it(golden, candidate):
            golden.check("bloom/few", candidate)
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=6)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


# --- 7: quotas -----------------------------------------------------------------------------------


def test_way_07_one_bad_position_among_thousands(many, model):
    """An error of 40 times round-off at one of 1,900 positions fails, where the average of all hides it."""
    sigma = many.floors["float32"].sigma
    row = int(np.flatnonzero((many.rows.request == 0) & (many.rows.position == LONG + 1))[0])
    assert (many.rows.position[many.rows.request != 0] < LONG).all()

    def port(times: float) -> Port:
        return Port(model, change=at(LONG, 3, times * float(sigma[row]), add=True))

    verdict = harness.check(many, port(40.0))
    assert verdict.power.positions > 1900
    assert verdict.status is Status.DEVIATES
    assert all(one.ratio < one.limit for one in verdict.passes)
    assert {finding.check for finding in verdict.failures} >= {statistics.WORST}
    assert harness.check(many, port(1.0)).ok


def test_way_07_one_bad_token_among_hundreds(many, model):
    """A single token of 720 that is clearly another one fails, and is named."""
    step = int(np.flatnonzero(many.rows.request[many.rows.generated] == 0)[5])
    rows, position = many.rows, int(many.rows.position[many.rows.generated][step])
    lift = float(metrics.margins(rows.top_logits)[step]) + 0.5
    wrong = Port(model, change=at(position - 1, int(rows.top_ids[step, 1]), lift, add=True))
    verdict = harness.check(many, wrong)
    assert verdict.status is Status.DEVIATES
    assert sum(one.flips for one in verdict.passes) == 2  # one in each view
    assert "the first at prompt 'p00' step 5" in next(one.message for one in verdict.failures if one.check == "tokens")


# --- 8: again until it passes ------------------------------------------------------------------------


def test_way_08_nothing_runs_again(few, model):
    """A port that is wrong in some visits alone fails, and is called as often as the right one: once for each pass."""
    right = Visits(model)
    assert harness.check(few, right).ok
    for wrong in (lambda visit: visit == 0, lambda visit: visit > 0, lambda visit: visit == 2):
        port = Visits(model, wrong=wrong)
        verdict = harness.check(few, port)
        assert verdict.status is Status.DEVIATES, str(verdict)
        assert port.calls == right.calls


def test_way_08_a_pass_at_the_second_try_is_no_pass(few, model):
    """A port that only ever fails the first time has failed: the second check is another one."""
    port = Visits(model, wrong=lambda visit: visit == 0)
    verdicts = [harness.check(few, port).status for _ in range(2)]
    assert verdicts == [Status.DEVIATES, Status.IDENTICAL]


def test_way_08_this_repository_reruns_nothing():
    """An expected failure that passes fails the run, and no test of ours is run again."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert configured["tool"]["pytest"]["ini_options"]["xfail_strict"] is True
    asked = " ".join(configured["project"]["optional-dependencies"]["test"])
    assert not re.search("rerun|flaky|retry", asked)
    again = re.compile(r"xfail\([^)]*strict\s*=\s*False|mark\.flaky|reruns")
    here = Path(__file__).name
    assert not [path for path in ROOT.glob("tests/**/*.py") if path.name != here and again.search(path.read_text())]


def test_way_08_a_correct_engine_need_not_repeat_itself(few):
    """The opposite: what never gives the same bits twice, and is right each time, passes at the first try."""
    assert harness.check(few, Scattered(options(few))).status is Status.DRIFT


# --- 9: compared with itself -------------------------------------------------------------------------


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a bug of the modelling code of transformers itself, for all models of this process."""
    from transformers.models.bloom.modeling_bloom import BloomMLP

    right = BloomMLP.forward

    def inject(factor: float) -> None:
        monkeypatch.setattr(BloomMLP, "forward", lambda self, *given, **more: right(self, *given, **more) * factor)

    return inject


@pytest.mark.parametrize("loaded", [False, True], ids=["hf", "reference_model"])
def test_way_09_a_bug_in_shared_code_is_seen(few, place, injected, loaded):
    """The reference that would be recomputed has the bug as well; the golden does not, and is not written again."""
    before = contents(place / "golden/bloom/few")

    def candidate() -> Any:
        return harness.reference_model(few, dtype=torch.float32) if loaded else "hf:dtype=float32"

    assert harness.check(few, candidate()).ok
    injected(0.9)
    verdict = harness.check(few, candidate())
    assert verdict.status is Status.DEVIATES
    assert contents(place / "golden/bloom/few") == before


@pytest.mark.parametrize("spec", ["hf:dtype=float32,weights=int8", "hf:dtype=bfloat16,weights=int4"])
def test_way_09_a_live_reference_with_the_bug_is_not_believed(few, injected, spec):
    """What quantised weights should give is asked of the live reference; one that left the golden has no say."""
    assert harness.check(few, spec).ok
    injected(0.9)
    verdict = harness.check(few, spec)
    assert verdict.status is Status.UNMEASURED
    assert any("its code has changed" in finding.message for finding in verdict.failures)


def test_way_09_nor_about_tokens_behind_a_tie(many, injected):
    """A served model that turned at ties is judged by the live reference behind them, if that is still the same."""
    spec = "hf:dtype=bfloat16,show=tokens"
    served = harness.check(many, spec)
    assert served.status is Status.DRIFT
    assert served.passes[0].flips > 0
    injected(1.0001)  # far too little for a token to show it
    verdict = harness.check(many, spec)
    assert verdict.status is Status.UNMEASURED
    assert any("its code has changed" in reason for reason in verdict.power.unmeasured)


# --- 10: settings that never ran -----------------------------------------------------------------------


def test_way_10_the_kernel_in_the_name(few):
    """An engine that is called after another attention than the one that runs fails."""
    really = {"attn": "eager"}
    wrong = harness.check(few, Named(options(few), declared={"attn": "sdpa"}, really={}))
    assert wrong.status is Status.STRUCTURAL
    assert "says attn=sdpa, but attn=eager is in force" in wrong.failures[0].message
    assert harness.check(few, Named(options(few), declared=really, really={})).ok
    with pytest.raises(ModelError, match="attention"):  # BLOOM has no such kernel, and none is put in its place
        harness.check(few, "hf:dtype=float32,attn=sdpa")


@pytest.mark.parametrize("really", [{"tensor_parallel": 1}, {}], ids=["one rank", "not shown"])
def test_way_10_eight_ranks_that_are_one(few, really):
    """A name that says eight ranks where one runs, or where nobody can tell, fails."""
    verdict = harness.check(few, Named(options(few), declared={"tensor_parallel": 8}, really=really))
    assert verdict.status is Status.STRUCTURAL
    assert "says tensor_parallel=8, but tensor_parallel=" in verdict.failures[0].message
    one = {"tensor_parallel": 1}
    assert harness.check(few, Named(options(few), declared=one, really=one)).ok


def test_way_10_the_precision_in_the_name(few):
    """A module that is asked for bfloat16 and stays in float32 fails; asked for what it is, it passes."""
    verdict = harness.check(few, f"{PORTS}:float32_anyway?dtype=bfloat16")
    assert verdict.status is Status.STRUCTURAL
    assert "says dtype=bfloat16, but dtype=float32 is in force" in verdict.failures[0].message
    assert harness.check(few, f"{PORTS}:as_asked?dtype=bfloat16").ok
    assert harness.check(few, f"{PORTS}:float32_anyway?dtype=float32").ok


def test_way_10_a_callable_that_shows_no_weights(few):
    """What computes in float32 inside is told from its error, or from its logits, that it is not bfloat16."""
    verdict = harness.check(few, f"{PORTS}:float32_inside?dtype=bfloat16")
    assert "its error is of the size of float32's round-off" in str(verdict)
    assert "its error is of the size of" not in str(harness.check(few, f"{PORTS}:right?dtype=bfloat16"))


def test_way_10_a_setting_that_nothing_made_use_of_is_named(few):
    """Prompts shorter than a chunk never were fed in pieces, and the verdict says so; shorter chunks were."""
    told = "not seen: the setting chunk: no view made use of it"
    assert told in str(harness.check(few, "hf:dtype=float32,chunk=999"))
    assert told not in str(harness.check(few, "hf:dtype=float32,chunk=7"))


# --- 11: behind the first differing token ----------------------------------------------------------------


def test_way_11_a_bug_behind_an_excused_tie(many):
    """A server that loses a near-tie is excused for it and for all that follows, and not for a bug that follows."""
    request, step = near_tie(many)
    rows = many.centre_rows("bfloat16")
    second = int(rows.top_ids[12 * request + step, 1])
    shown = options(many, dtype="bfloat16", show="tokens")
    prompt = many.requests[request].id

    @contextmanager
    def lost(live: Any) -> Iterator[None]:
        weight = live.get_parameter(WEIGHT)
        before = weight.data
        weight.data = before * 0
        try:
            yield
        finally:
            weight.data = before

    right = harness.check(many, Served(shown, prompt=prompt, flip=(step, second)))
    assert right.status is Status.DRIFT, str(right)
    verdict = harness.check(many, Served(shown, prompt=prompt, flip=(step, second), wrong=(step + 2, lost)))
    assert verdict.status is Status.DEVIATES
    where = next(one.where for one in verdict.failures if one.check == "tokens")
    assert f"prompt {prompt!r}" in where
    assert int(where.rpartition(" ")[2]) >= step + 2


def near_tie(golden: Golden) -> tuple[int, int]:
    """(prompt, step) of the nearest tie in bfloat16 among the first steps of all prompts but the long one."""
    margin = metrics.margins(golden.centre_rows("bfloat16").top_logits) / golden.floors["bfloat16"].pair
    early = margin.reshape(60, 12)[1:, :4]
    request, step = np.unravel_index(int(early.argmin()), early.shape)
    assert early[request, step] < 1
    return int(request) + 1, int(step)


def test_way_11_every_step_is_forced_onto_the_prefix(few, model):
    """With logits, a bug at the last step is found by its own place, whatever happened to the first token."""
    rows = few.rows
    position = rows.position[rows.generated & (rows.request == 1)]
    first = int(np.flatnonzero(rows.request[rows.generated] == 1)[0])

    def change(logits_BTV: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        here = position_BT == int(position[0]) - 1
        logits_BTV[here, int(rows.top_ids[first, 7])] += 100.0
        return logits_BTV

    def both(logits_BTV: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        return at(int(position[-1]) - 1, int(rows.top_ids[first + 5, 7]), 100.0, add=True)(
            change(logits_BTV, position_BT), position_BT
        )

    flips = []
    for wrong in (change, both):
        verdict = harness.check(few, Port(model, change=wrong), quick=True)
        assert verdict.status is Status.DEVIATES
        flips.append(next(one.flips for one in verdict.passes if one.view == "replay"))
    assert flips == [1, 2]
    assert harness.check(few, Port(model), quick=True).ok


# --- 12: unequal lengths -----------------------------------------------------------------------------------


def _cut(given: Any) -> Any:
    return replace(given, tokens=given.tokens[:-1])


def _on(given: Any) -> Any:
    return replace(given, tokens=(*given.tokens, given.tokens[-1]))


def _ends_early(given: Any) -> Any:
    return replace(given, tokens=given.tokens[:2], finish="eos")


def _says_length(given: Any) -> Any:
    return replace(given, finish="length")


@pytest.mark.parametrize("change", [_cut, _on, _ends_early, _says_length])
def test_way_12_the_same_prefix_is_not_the_same_text(ends, change):
    """A token less, a token more, or another end fails, though every token that both sides have is right."""
    verdict = harness.check(ends, Told(options(ends), change))
    assert verdict.status is Status.STRUCTURAL
    assert {finding.check for finding in verdict.failures} == {"lengths"}
    assert harness.check(ends, Told(options(ends), lambda given: given)).ok


def test_way_12_going_on_behind_the_end(ends):
    """A candidate that does not stop where the text ends fails, though all up to there is right."""

    class Endless(HFEngine):
        """Ignores its stop ids."""

        def generate(self, requests: Any, *, batch_size: int | None, stop_ids: frozenset[int]) -> Any:
            return super().generate(requests, batch_size=batch_size, stop_ids=frozenset())

    verdict = harness.check(ends, Endless(options(ends), text="endless"))
    assert verdict.status is Status.STRUCTURAL
    assert "its own tokens end it at" in verdict.failures[0].message


def test_way_12_a_prompt_that_begins_the_same(few):
    """Prompt ids with one more at their end, or one less, fail."""
    for change in (lambda ids: (*ids, 2), lambda ids: ids[:-1]):
        verdict = harness.check(few, Tokenizing(options(few), change), quick=True)
        assert verdict.status is Status.STRUCTURAL
        assert {finding.check for finding in verdict.failures} == {"prompt ids"}
    assert harness.check(few, Tokenizing(options(few), lambda ids: ids), quick=True).ok


# --- 13: values without ids ----------------------------------------------------------------------------------

#: From the ids of a step, best first, to those that are shown with the same values.
WRONG_IDS = {
    "all others": lambda ids: tuple((token + 150) % 301 for token in ids),
    "all but the best": lambda ids: (ids[0], *((token + 150) % 301 for token in ids[1:])),
    "second and third exchanged": lambda ids: (ids[0], ids[2], ids[1], *ids[3:]),
    "turned round": lambda ids: ids[::-1],
    "the best of all": lambda ids: (ids[0],) * len(ids),
}


@pytest.mark.parametrize("shown", [5, 20])
@pytest.mark.parametrize("name", WRONG_IDS)
def test_way_13_right_values_of_wrong_tokens(few, name, shown):
    """The right values under other token ids fail, though the tokens themselves are right."""

    def change(given: Any) -> Any:
        ids = tuple(WRONG_IDS[name](step[:shown]) for step in given.top_ids)
        return replace(given, top_ids=ids, top_logits=tuple(step[:shown] for step in given.top_logits))

    verdict = harness.check(few, Told(options(few, show="top"), change))
    assert verdict.status is Status.DEVIATES
    assert sum(one.flips for one in verdict.passes) == 0


@pytest.mark.parametrize("shown", [5, 20])
def test_way_13_right_values_of_right_tokens(few, shown):
    """The same entries with their own ids pass, however many there are, and in whatever constant units."""

    def change(given: Any) -> Any:
        moved = tuple(tuple(value + 3 for value in step[:shown]) for step in given.top_logits)
        return replace(given, top_ids=tuple(step[:shown] for step in given.top_ids), top_logits=moved)

    assert harness.check(few, Told(options(few, show="top"), change)).ok


def test_way_13_nor_where_round_off_was_never_measured(place, model, tmp_path):
    """Against a golden without floors the tokens alone pass nothing; a repeat of all its bits does."""
    suite = write_suite(tmp_path / "ids.toml", FOREIGN)
    golden = flow.record(f"{PORTS}:right?model={model}", suite, out=tmp_path / "golden/ids")
    assert not golden.floors
    assert harness.check(golden, Port(model)).status is Status.IDENTICAL
    for change in (lambda given: given, lambda given: replace(given, top_ids=given.top_ids[::-1])):
        shows = Told(Options(model=str(model), dtype="float32", show="top"), change)
        assert harness.check(golden, shows).status is Status.UNMEASURED


# --- 14: updates ---------------------------------------------------------------------------------------------


@pytest.fixture
def changed(place: Path, ends: Golden, tmp_path: Path) -> Path:
    """A project whose model is another than the one that its golden was recorded from."""
    shutil.copytree(place / "golden/ends", tmp_path / "project/golden/ends")
    shutil.copytree(place / "prompts", tmp_path / "project/prompts")
    scaled(ends, 1.5, torch.bfloat16).save_pretrained(tmp_path / "project/golden/ends/model")
    return tmp_path / "project"


@pytest.fixture
def project(pytester: pytest.Pytester, changed: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """The same with a test of its golden, as the working directory."""
    monkeypatch.delenv("CI", raising=False)
    shutil.copytree(changed, pytester.path, dirs_exist_ok=True)
    pytester.makepyfile('def test_it(golden):\n    golden.check("ends/ends", "hf:dtype=float32")\n')
    return pytester


def test_way_14_an_update_does_not_pass_in_its_own_run(project):
    """Without a reason nothing is written; with one the test that wrote it is red, and green in the next run."""

    def outcome(*arguments: str) -> tuple[dict[str, int], bool]:
        before = contents(project.path / "golden/ends/ends")
        result = project.runpytest_inprocess("-p", "no:cacheprovider", *arguments)
        counts = {word: count for word, count in result.parseoutcomes().items() if word in ("passed", "failed")}
        return counts, contents(project.path / "golden/ends/ends") != before

    assert outcome() == ({"failed": 1}, False)
    assert outcome("--golden-update") == ({"failed": 1}, False)
    assert outcome("--golden-update", "--golden-reason=retrained") == ({"failed": 1}, True)
    assert outcome() == ({"passed": 1}, False)
    assert outcome("--golden-update") == ({"passed": 1}, False)  # nothing to update


def test_way_14_record_refuses_what_is_more_than_drift(changed, monkeypatch):
    """`record --update` leaves the file to the bit as it was, until somebody says why; the reason is kept."""
    monkeypatch.chdir(changed)
    golden = Path("golden/ends/ends")
    before = contents(golden)
    shown = []
    with pytest.raises(HarnessError, match="--reason"):
        flow.rerecord(golden, show=shown.append)
    assert shown[0].worst in (Kind.BUG_SIZED, Kind.STRUCTURAL)
    assert contents(golden) == before
    assert command(monkeypatch, "record", "--update", "--out", golden) == 2
    assert contents(golden) == before
    assert command(monkeypatch, "record", "--update", "--out", golden, "--reason", "retrained") == 0
    assert contents(golden) != before
    assert harness.load_golden(golden).provenance["history"][-1]["reason"] == "retrained"
    assert command(monkeypatch, "check", golden, "-c", "hf:dtype=float32") == 0
