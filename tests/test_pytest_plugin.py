"""The pytest plugin, by running pytest inside pytest: real checks of a small recorded golden."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import harness
from harness import flow, store
from harness.pytest_plugin import GoldenFailed
from harness.values import Difference, Finding, Status, Verdict
from tests.killing import ROOT
from tests.support import write_model

GOLDEN = Path("golden/small/small")

GOOD = """
def test_good(golden):
    assert golden.check("small/small", "hf:dtype=float32", quick=True).ok
"""

#: Starts a file of tests: what gives a model that is not the same any more.
WRONG = """
import pytest
import torch

def changed(golden, factor):
    model = golden.reference_model("small/small", dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(factor)
    return model
"""

BAD = (
    WRONG
    + """
def test_bad(golden):
    golden.check("small/small", changed(golden, 1.5), quick=True)
"""
)


@pytest.fixture(scope="module")
def warm(small_home):
    """Whatever a check imports is imported: a run in this process forgets again what it was the first to import."""
    assert flow.check(small_home / GOLDEN, "hf:dtype=float32", quick=True).ok
    import harness.report.junit
    import harness.report.markdown
    import harness.report.plain  # noqa: F401  # as above


@pytest.fixture
def project(pytester, small_home, warm, monkeypatch):
    """A project with the small golden, as the working directory."""
    shutil.copytree(small_home, pytester.path, dirs_exist_ok=True)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that pytest-xdist starts
    return pytester


@pytest.fixture
def pretended(monkeypatch):
    """Let every check give this verdict, for what cannot be had cheaply."""

    def pretend(verdict):
        monkeypatch.setattr(flow, "check", lambda *_given, **_more: verdict)

    return pretend


def written(project, **files):
    """Write test files of these names."""
    for name, text in files.items():
        project.path.joinpath(f"{name}.py").write_text(text, encoding="utf-8")
    return project


#: Without a plugin that costs seconds a run, and a warning of runs in a process that has the package already.
PLAIN = ("-p", "no:hypothesispytest", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def run(project, *arguments):
    """Run pytest in this process."""
    return project.runpytest_inprocess(*PLAIN, "-p", "no:cacheprovider", *arguments)


def block(result):
    """Lines of the block at the end; empty where there is none."""
    lines = result.outlines
    starts = [index for index, line in enumerate(lines) if line.strip("=") == " golden " and line.startswith("=")]
    assert len(starts) <= 1
    if not starts:
        return []
    rest = lines[starts[0] + 1 :]
    return rest[: next(index for index, line in enumerate(rest) if line.startswith("="))]


def failure(result, test):
    """What pytest prints of one failed test, below its title."""
    lines = result.outlines
    [start] = [index for index, line in enumerate(lines) if line.strip("_") == f" {test} "]
    rest = lines[start + 1 :]
    return rest[: next(index for index, line in enumerate(rest) if line.startswith(("=", "_")))]


def refused(result, *words):
    """A usage error of one line, before anything ran."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [line] = [line for line in result.errlines if line.strip()]
    assert line.startswith("ERROR: ")
    for word in words:
        assert word in line
    assert "Traceback" not in line
    assert not any("collected" in line for line in result.outlines)


def listing(directory=GOLDEN):
    """The bytes and the time of each file of a golden."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def another(name="other"):
    """A second golden, of the same model and suite."""
    shutil.copytree(GOLDEN, GOLDEN.parent / name)


# --- verdicts ----------------------------------------------------------------------------------


def test_the_same_model_passes(project):
    """An ok verdict is returned, passes, and is counted in a block of one line."""
    result = run(written(project, test_it=GOOD))
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.OK
    assert block(result) == ["1 check: 1 identical"]


def test_another_model_fails_with_the_report(project):
    """What the test prints is the report alone: what was measured, what is allowed; no traceback, no code of ours."""
    result = run(written(project, test_it=BAD))
    result.assert_outcomes(failed=1)
    [counts, line] = block(result)
    assert counts == "1 check: 1 deviates"
    assert line.startswith("deviates: test_it.py::test_bad: ")
    assert " against small/small: " in line
    shown = failure(result, "test_bad")
    assert shown[0].startswith("deviates: ")
    assert any(re.search(r"error is [\d.e+]+ x .* \(allowed [\d.e+]+\)", line) for line in shown)
    for trace in ("Traceback", "pytest_plugin", "test_it.py:", ">  ", "E  ", "def test_bad"):
        assert not any(trace in line for line in shown), trace
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_bad - GoldenFailed: deviates: *"])


def test_a_failed_check_is_an_assertion_error(project):
    """Whoever expects an AssertionError gets one, with the report as its text, and pytest sees a failed test."""
    assert issubclass(GoldenFailed, AssertionError)
    assert issubclass(GoldenFailed, pytest.fail.Exception)
    text = """
def test_expected(golden):
    with pytest.raises(AssertionError, match="^deviates: .*measured") as raised:
        golden.check("small/small", changed(golden, 1.5), quick=True)
    assert str(raised.value).startswith("deviates: ")

@pytest.mark.xfail(raises=AssertionError, strict=True)
def test_known(golden):
    golden.check("small/small", changed(golden, 1.5), quick=True)
"""
    result = run(written(project, test_it=WRONG + text.replace("measured", "")))
    result.assert_outcomes(passed=1, xfailed=1)


def test_unmeasured_fails(project):
    """A candidate that shows too little is no pass."""
    text = 'def test_it(golden):\n    golden.check("small/small", "hf:dtype=float32,show=tokens", quick=True)\n'
    result = run(written(project, test_it=text))
    result.assert_outcomes(failed=1)
    assert block(result)[0] == "1 check: 1 unmeasured"


def test_stale_fails(project):
    """A model of other shapes than the golden's is no pass."""
    write_model(project.path / "other", "gpt2")
    text = 'def test_it(golden):\n    golden.check("small/small", "hf:model=other", quick=True)\n'
    result = run(written(project, test_it=text))
    result.assert_outcomes(failed=1)
    assert block(result)[0] == "1 check: 1 stale"
    assert "another model" in block(result)[1]


def test_a_suite_that_was_changed_fails(project):
    """A golden whose suite asks other questions by now is stale."""
    suite = project.path / "prompts/small.toml"
    suite.write_text(suite.read_text().replace("In the morning", "In the evening"))
    result = run(written(project, test_it=GOOD))
    result.assert_outcomes(failed=1)
    assert block(result)[0] == "1 check: 1 stale"


def test_error_fails(project):
    """A candidate that raises is no pass, and what it raised is said."""
    text = (
        WRONG
        + """
def test_it(golden, monkeypatch):
    model = golden.reference_model("small/small")
    def forward(*given, **more):
        raise RuntimeError("no such kernel")
    monkeypatch.setattr(model, "forward", forward)
    golden.check("small/small", model, quick=True)
"""
    )
    result = run(written(project, test_it=text))
    result.assert_outcomes(failed=1)
    assert block(result)[0] == "1 check: 1 error"
    assert "no such kernel" in block(result)[1]


def test_structural_fails(project):
    """NaN where the golden has numbers is no pass."""
    result = run(written(project, test_it=BAD.replace("1.5", "float('nan')")))
    result.assert_outcomes(failed=1)
    assert block(result)[0] == "1 check: 1 structural"


@pytest.mark.parametrize("status", Status)
def test_everything_but_ok_fails(project, pretended, status):
    """Of all statuses that there are, `identical` and `drift` alone pass."""
    finding = Finding(status=status, check="tokens", message="two\nlines")
    pretended(Verdict(golden="small/small", candidate="c", status=status, findings=(finding,)))
    text = 'def test_it(golden):\n    golden.check("small/small", "hf")\n'
    result = run(written(project, test_it=text))
    result.assert_outcomes(**{"passed" if status.ok else "failed": 1})
    expected = [] if status.ok else [f"{status.value}: test_it.py::test_it: c against small/small: two lines"]
    assert block(result) == [f"1 check: 1 {status.value}", *expected]


def test_the_environment_is_named_once(project, pretended):
    """What is another today than at recording stands in one line, however many checks saw it."""
    difference = Difference(name="torch", golden="2.12", today="2.13")
    verdict = Verdict(golden="small/small", candidate="c", status=Status.DRIFT, findings=())
    pretended(replace(verdict, environment=(difference, replace(difference, name="threads"))))
    text = 'def test_it(golden):\n    golden.check("small/small", "hf")\n    golden.check("small/small", "hf")\n'
    result = run(written(project, test_it=text))
    assert block(result) == [
        "2 checks: 2 drift",
        "environment since the goldens: torch 2.12 -> 2.13, threads 2.12 -> 2.13",
    ]


def test_what_the_call_says_arrives(project, monkeypatch):
    """What is named is what harness.check gets: a reference as the rootdir sees it, the SPEC of one as it is."""
    seen = []

    def check(golden, candidate, **how):
        seen.append((golden.name, candidate, how))
        return Verdict(golden="g", candidate="c", status=Status.DRIFT, findings=())

    monkeypatch.setattr(flow, "check", check)
    text = """
def test_it(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden.check("small/small", "hf")
    golden.check("small/small", "hf", quick=True, reference="golden/small/model", upcast=False, diagnose=True)
    golden.check("small/small", "hf", reference="stream:hidden_gb=1")
"""
    run(written(project, test_it=text)).assert_outcomes(passed=1)
    where = project.path / "golden/small/model"
    assert seen == [
        ("small/small", "hf", {"quick": False, "reference": None, "upcast": True, "diagnose": False}),
        ("small/small", "hf", {"quick": True, "reference": where, "upcast": False, "diagnose": True}),
        ("small/small", "hf", {"quick": False, "reference": "stream:hidden_gb=1", "upcast": True, "diagnose": False}),
    ]


def test_parametrised_tests_and_two_of_one_golden(project):
    """Each test counts for itself, with its own name in the block; tests without the fixture do not count."""
    text = (
        WRONG
        + """
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_it(golden, factor):
    golden.check("small/small", changed(golden, factor), quick=True)

def test_other(golden):
    golden.check("small/small", "hf:dtype=bfloat16", quick=True)
    golden.check("small/small", "hf:dtype=float32", quick=True)

def test_unrelated():
    pass
"""
    )
    result = run(written(project, test_it=text))
    result.assert_outcomes(passed=3, failed=1)
    [counts, line] = block(result)
    assert counts == "4 checks: 3 identical, 1 deviates"
    assert line.startswith("deviates: test_it.py::test_it[1.5]: ")


def test_checks_of_other_fixtures_count(project):
    """A check may stand in a fixture, before or after the test: it counts, and a bad one is an error of that test."""
    text = (
        WRONG
        + """
@pytest.fixture
def before(golden):
    return golden.check("small/small", "hf:dtype=float32", quick=True)

@pytest.fixture
def after(golden):
    yield
    golden.check("small/small", changed(golden, 1.5), quick=True)

def test_it(before, after):
    assert before.ok
"""
    )
    result = run(written(project, test_it=text))
    result.assert_outcomes(passed=1, errors=1)
    assert block(result)[0] == "2 checks: 1 identical, 1 deviates"
    assert block(result)[1].startswith("deviates: test_it.py::test_it: ")


def test_a_wider_fixture_cannot_ask(project):
    """A verdict belongs to one test, so pytest refuses a fixture of a module that asks for it."""
    text = "import pytest\n@pytest.fixture(scope='module')\ndef wide(golden):\n    pass\ndef test_it(wide):\n    pass\n"
    result = run(written(project, test_it=text))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ScopeMismatch*golden*"])
    assert not block(result)


# --- where goldens lie -------------------------------------------------------------------------


def test_names_and_paths(project):
    """A name is looked up under the root of goldens, else under the rootdir; paths of either kind do as well."""
    shutil.copytree(GOLDEN.parent, "elsewhere/small")
    text = """
import pathlib
HERE = pathlib.Path(__file__).parent

def test_it(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [golden.load(name).directory for name in
              ("small/small", "golden/small/small", HERE / "golden/small/small", "elsewhere/small/small")]
    assert [str(pathlib.Path(place).relative_to(HERE)) for place in places] == [
        "golden/small/small"] * 3 + ["elsewhere/small/small"]
    assert golden.check("elsewhere/small/small", "hf:dtype=float32", quick=True).ok
"""
    run(written(project, test_it=text)).assert_outcomes(passed=1)


def test_the_root_of_goldens_is_an_option(project):
    """`golden_root` of the ini file says where goldens lie, also for those that are not used."""
    os.rename("golden", "kept")
    Path("pytest.ini").write_text("[pytest]\ngolden_root = kept\n")
    shutil.copytree("kept/small/small", "kept/small/other")
    result = run(written(project, test_it=GOOD))
    result.assert_outcomes(passed=1)
    assert block(result)[1:] == ["unused: kept/small/other: no test asked for it"]


def test_goldens_are_read_once(project, monkeypatch):
    """However many tests and ways to write its name; again where its file was written meanwhile."""
    reads = []
    read = store.read_golden
    monkeypatch.setattr(store, "read_golden", lambda directory: reads.append(directory) or read(directory))
    text = """
import os, shutil

def test_first(golden):
    assert golden.load("small/small") is golden.load("golden/small/small")
    golden.reference_model("small/small")

def test_second(golden):
    golden.check("small/small", "hf:dtype=float32", quick=True)

def test_third(golden):
    before = golden.load("small/small")
    shutil.copy("golden/small/small/golden.json", "copy.json")
    os.replace("copy.json", "golden/small/small/golden.json")
    assert golden.load("small/small") is not before
"""
    result = run(written(project, test_it=text))
    result.assert_outcomes(passed=3)
    assert len(reads) == 2


def test_the_reference_model(project):
    """The recorded model, fresh each time, in its own dtype or in the one asked for."""
    text = """
import torch

def test_it(golden):
    model, wide = golden.reference_model("small/small"), golden.reference_model("small/small", dtype=torch.float32)
    assert (model.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert model is not golden.reference_model("small/small")
    assert golden.load("small/small").model.signature
"""
    result = run(written(project, test_it=text))
    result.assert_outcomes(passed=1)
    assert block(result) == ["no checks"]


#: Calls that cannot be followed, and words of the line that each gives.
MISUSES = {
    'golden.check("small/tiny", "hf")': (
        "there is no golden 'small/tiny' (golden/small/tiny)",
        "`harness record --model DIR --suite FILE --out golden/small/tiny`",
        "name model= and suite= in the call and run with --golden-update-new-only",
    ),
    'golden.check("small/tiny", "hf", model="m", suite="s.toml")': (
        "`harness record --model m --suite s.toml --out golden/small/tiny`, or run with --golden-update-new-only",
    ),
    'golden.check("golden/small/tiny", "hf")': ("--out golden/small/tiny`",),
    'golden.load("small/tiny")': ("there is no golden 'small/tiny'",),
    'golden.reference_model("small/tiny")': ("there is no golden 'small/tiny'",),
    'golden.check(golden.load("small/small"), "hf")': ("is a Golden, not the name or directory", "harness.check takes"),
    'golden.check("small/small", None)': ("a NoneType is not a candidate",),
    'golden.check("small/small", "hff")': ("no engine 'hff'", "Did you mean 'hf'?"),
    'golden.check("small/small", "hf", model="golden/small/model")': ("model= and suite= go together",),
    'golden.check("small/small", "hf", reference="nowhere")': ("there is no model directory",),
    'golden.check("damaged", "hf")': ("golden.json is not JSON", "record it again"),
}


@pytest.mark.parametrize("call", MISUSES)
def test_misuse_is_a_failed_test_of_one_line(project, call):
    """A call that cannot be followed fails its test with one line that says what to do; a check counts as `error`."""
    shutil.copytree(GOLDEN, "golden/damaged")
    Path("golden/damaged/golden.json").write_text("{")
    result = run(written(project, test_it=f"def test_it(golden):\n    {call}\n"), "--golden-report=all.json")
    result.assert_outcomes(failed=1)
    [line] = failure(result, "test_it")
    for word in MISUSES[call]:
        assert word in line
    checks = [] if ".check" not in call else ["error"]
    assert [one["status"] for one in json.loads(Path("all.json").read_text())] == checks
    assert len(block(result)) == 1 + len(checks)


def test_a_golden_of_another_model_by_now(project):
    """Where the model beside the golden was exchanged, the check is stale, and says so in the report."""
    shutil.rmtree("golden/small/model")
    write_model(Path("golden/small/model"), seed=1)
    result = run(written(project, test_it=GOOD), "--golden-report=all.json")
    result.assert_outcomes(failed=1)
    assert [one["status"] for one in json.loads(Path("all.json").read_text())] == ["stale"]


# --- nothing where it is not used --------------------------------------------------------------


def test_silent_and_light_where_nobody_asks(pytester):
    """The plugin is loaded for every project of an environment: no heavy import, and nothing is printed."""
    (pytester.path / "golden").mkdir()
    text = """
import sys

def test_it(request):
    assert request.config.pluginmanager.hasplugin("golden_harness")
    assert "harness.pytest_plugin" in sys.modules
    heavy = {"torch", "numpy", "transformers", "scipy", "safetensors", "rich", "click", "harness.values"}
    assert not heavy & set(sys.modules)

def test_last():
    test = set(sys.modules)
    assert not {name for name in test if name.startswith("harness")} - {
        "harness", "harness.errors", "harness.pytest_plugin"}
"""
    pytester.makepyfile(test_it=text)
    result = pytester.runpytest_subprocess(*PLAIN)
    result.assert_outcomes(passed=2)
    assert not block(result)


def test_the_import_is_light():
    """Importing the plugin imports pytest, our errors and the standard library."""
    code = (
        "import sys, pytest; before = set(sys.modules); import harness.pytest_plugin;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['harness']"


def test_without_the_plugin(project):
    """`-p no:golden_harness` leaves it out, with fixture, options and block."""
    result = run(written(project, test_it=GOOD), "-p", "no:golden_harness")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'golden' not found*"])
    assert not block(result)
    assert run(project, "-p", "no:golden_harness", "--golden-update").ret == pytest.ExitCode.USAGE_ERROR


def test_the_fixture_is_documented(project):
    """`pytest --fixtures` and `--help` show what there is, each with a sentence."""
    shown = run(project, "--fixtures").stdout.str()
    assert "golden.check(NAME, candidate)" in shown
    shown = run(project, "--help").stdout.str()
    for option in ("--golden-update", "--golden-update-new-only", "--golden-reason=TEXT", "--golden-report=FILE"):
        assert option in shown
    assert "golden_root" in shown


def test_junit_of_pytest_itself(project):
    """The --junitxml of pytest itself holds the tests as ever, the report as the text of the failure."""
    run(written(project, test_bad=BAD, test_good=GOOD), "--junitxml=own.xml")
    cases = {case.get("name"): case for case in ElementTree.parse("own.xml").getroot().iter("testcase")}
    assert list(cases) == ["test_bad", "test_good"]
    assert len(cases["test_good"]) == 0
    assert cases["test_bad"].find("failure").text.startswith("deviates: ")


# --- reports -----------------------------------------------------------------------------------


def test_reports_of_all_three_kinds(project):
    """JSON is the list of verdicts, JUnit a test case a verdict, Markdown a table; in the order of tests' names."""
    files = [project.path / name for name in ("all.json", "all.xml", "all.md")]
    options = [f"--golden-report={file.name}" for file in files]
    result = run(written(project, test_b=GOOD, test_a=BAD), *options, "test_b.py", "test_a.py")
    result.assert_outcomes(passed=1, failed=1)
    verdicts = json.loads(files[0].read_text())
    assert [one["status"] for one in verdicts] == ["deviates", "identical"]
    assert verdicts[1]["candidate"] == "hf:dtype=float32"
    assert verdicts[1]["statistics"]
    cases = list(ElementTree.parse(files[1]).getroot().iter("testcase"))
    assert [case.find("failure") is not None for case in cases] == [True, False]
    table = files[2].read_text()
    assert "deviates" in table
    assert "small/small" in table
    assert not list(project.path.glob(".*.tmp"))


def test_a_report_is_what_the_check_said(project):
    """The JSON of a run is the JSON of the same check without pytest, but for the seconds."""
    run(written(project, test_it=GOOD), "--golden-report=all.json")
    [seen] = json.loads(Path("all.json").read_text())
    own = json.loads(json.dumps(harness.check(GOLDEN, "hf:dtype=float32", quick=True).to_dict()))
    assert without_seconds(seen) == without_seconds(own)


def without_seconds(value):
    """A JSON value without the times that something took."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_a_report_of_no_checks_replaces_an_old_one(project):
    """Where nothing was checked the file says so; the one of an earlier run would tell of a pass that was not."""
    Path("all.json").write_text("[1]")
    result = run(written(project, test_it="def test_it():\n    pass\n"), "--golden-report=all.json")
    assert Path("all.json").read_text() == "[]\n"
    assert not block(result)
    run(project, "--collect-only", "--golden-report=none.json")
    assert not Path("none.json").exists()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("all.txt", "end its name in .json, .xml, .md"),
        ("all", "end its name in"),
        ("nowhere/all.json", "does not exist: make it first"),
        ("some.json", "is a directory"),
    ],
)
def test_a_report_that_cannot_be_written(project, file, words):
    """Is a usage error before the first test."""
    Path("some.json").mkdir()
    refused(run(written(project, test_it=GOOD), f"--golden-report={file}"), "--golden-report", file, words)


def test_a_report_that_cannot_be_written_any_more(project):
    """A run whose report is lost at the end is not green, and says which file and why."""
    Path("reports").mkdir()
    text = GOOD + '\ndef test_last():\n    import shutil\n    shutil.rmtree("reports")\n'
    result = run(written(project, test_it=text), "--golden-report=reports/all.json", "--golden-report=all.md")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert block(result)[1].endswith("reports/all.json was not written: No such file or directory")
    assert Path("all.md").exists()


# --- unused goldens ----------------------------------------------------------------------------


def test_unused_goldens_are_named(project):
    """A golden that no test of a full run asked for is named; loading it, or its model, is using it."""
    for name in ("a", "b", "c"):
        another(name)
    text = """
def test_load(golden):
    golden.load("small/a")

def test_model(golden):
    golden.reference_model("golden/small/b")
"""
    result = run(written(project, test_good=GOOD, test_it=text))
    assert block(result) == ["1 check: 1 identical", "unused: golden/small/c: no test asked for it"]
    for arguments in ((".",), (str(project.path),), ("test_good.py", "."), ("-v",), ("-x",)):
        assert block(run(project, *arguments))[1:] == ["unused: golden/small/c: no test asked for it"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "good"), ("-k", "test"), ("-m", "not slow"), ("test_good.py",), ("test_good.py::test_good",),
        ("--deselect", "test_more.py::test_more"), ("--ignore", "test_more.py"), ("--ignore-glob", "*more*"),
        ("test_good.py", "test_more.py"), ("more",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_unused_goldens_are_not_named_when_tests_may_be_missing(project, arguments):
    """With a selection of any kind, what was not used may well be used by what did not run."""
    another()
    written(project, test_good=GOOD, test_more=GOOD.replace("test_good", "test_more"))
    Path("more").mkdir()
    shutil.copy("test_good.py", "more/test_inner.py")
    result = run(project, *arguments)
    assert result.ret == pytest.ExitCode.OK
    assert block(result)[0].endswith(" identical")
    assert len(block(result)) == 1


@pytest.mark.parametrize("option", ["--lf", "--ff", "--sw"])
def test_unused_goldens_are_not_named_when_failures_go_first(project, option):
    """Options of pytest's cache leave tests out as well."""
    another()
    written(project, test_good=GOOD, test_bad="def test_bad(golden):\n    assert False\n")
    project.runpytest_inprocess(*PLAIN)
    Path("test_bad.py").write_text("def test_bad(golden):\n    golden.load('small/small')\n")
    result = project.runpytest_inprocess(*PLAIN, option)
    assert result.ret == pytest.ExitCode.OK
    assert len(block(result)) == 1


@pytest.mark.parametrize(
    "text",
    [
        'def test_it(golden):\n    assert False\n    golden.load("small/other")\n',
        'import pytest\n@pytest.mark.skip\ndef test_it(golden):\n    golden.load("small/other")\n',
        'import pytest\npytest.skip("no device", allow_module_level=True)\n',
        'import pytest\n@pytest.mark.xfail(run=False)\ndef test_it(golden):\n    golden.load("small/other")\n',
        "import nothing_of_this_name\n",
        'import pytest\ndef test_it():\n    pytest.exit("enough", returncode=0)\n',
    ],
    ids=["failed", "skipped", "module skipped", "not run", "not collected", "ended"],
)
def test_unused_goldens_are_not_named_when_a_test_did_not_end(project, text):
    """A test that was skipped or failed might have gone on to the golden that seems unused."""
    another()
    result = run(written(project, test_good=GOOD, test_it=text), "--continue-on-collection-errors")
    assert block(result) == ["1 check: 1 identical"]


def test_unused_goldens_are_not_named_when_stopped(project):
    """A run that stops at the first failure says nothing of the goldens of the rest."""
    another()
    written(project, test_good=GOOD, test_it="def test_it():\n    assert False\n")
    assert block(run(project))[1:] == ["unused: golden/small/other: no test asked for it"]
    assert len(block(run(project, "-x"))) == 1


def test_unused_goldens_are_not_named_when_a_conftest_deselects(project):
    """Tests may be left out by a project's own hooks."""
    another()
    hook = """
def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=items[1:])
    del items[1:]
"""
    written(project, conftest=hook, test_good=GOOD, test_more=GOOD)
    assert block(run(project)) == ["1 check: 1 identical"]


def test_testpaths_are_the_full_run(project):
    """Where an ini file names testpaths, a run of these is a full one, from the rootdir alone."""
    another()
    Path("pytest.ini").write_text("[pytest]\ntestpaths = first sec*\n")
    for name in ("first", "second"):
        Path(name).mkdir()
        Path(name, f"test_{name}.py").write_text(GOOD)
    for arguments in ((), ("first", "second"), (".",)):
        assert len(block(run(project, *arguments))) == 2, arguments
    for arguments in (("first",), ("first", "second/test_second.py")):
        assert len(block(run(project, *arguments))) == 1, arguments
    os.chdir("first")
    assert len(block(run(project))) == 1
    os.chdir(project.path)


# --- updates -----------------------------------------------------------------------------------

UPDATES = ("--golden-update", "--golden-update-new-only")


@pytest.mark.parametrize("option", UPDATES)
@pytest.mark.parametrize("value", ["1", "true", "yes", "woodpecker"])
def test_no_update_under_ci(project, monkeypatch, option, value):
    """With CI set an update is refused before anything runs, and no file is touched."""
    monkeypatch.setenv("CI", value)
    before = listing()
    refused(run(written(project, test_it=GOOD), option), option, "CI", "run it elsewhere and commit")
    assert listing() == before
    run(project).assert_outcomes(passed=1)


@pytest.mark.parametrize("value", ["", "0", "false", "False"])
def test_a_ci_that_is_none(project, monkeypatch, value):
    """An empty CI, 0 or false is no CI."""
    monkeypatch.setenv("CI", value)
    run(written(project, test_it=GOOD), UPDATES[1]).assert_outcomes(passed=1)


@pytest.mark.parametrize("option", UPDATES)
@pytest.mark.parametrize("more", [("-n1",), ("-nauto",), ("--dist", "load", "--tx", "popen")])
def test_no_update_in_several_processes(project, option, more):
    """Two workers would record one golden twice."""
    refused(run(written(project, test_it=GOOD), option, *more), option, "run updates in one process")


def test_a_reason_without_an_update(project):
    """A reason for nothing is a mistake, and not passed over."""
    refused(run(written(project, test_it=GOOD), "--golden-reason=x"), "--golden-reason is of an update")


def bumped(by):
    """Write the golden with its numbers moved by so many times its own round-off; what a reference would say later."""
    golden = store.read_golden(GOLDEN)
    moved = golden.rows.projections + np.float32(by) * golden.floors["float32"].sigma[:, None]
    store.write_golden(replace(golden, rows=replace(golden.rows, projections=moved)), GOLDEN)


def exchanged():
    """Give the model beside the golden other weights of the same shapes."""
    shutil.rmtree("golden/small/model")
    write_model(Path("golden/small/model"), seed=1)


def history():
    """The reasons that a golden keeps."""
    return [entry["reason"] for entry in store.read_golden(GOLDEN).provenance["history"]]


TWO = (
    GOOD
    + """
def test_again(golden):
    golden.check("golden/small/small", "hf:dtype=bfloat16", quick=True)

def test_load(golden):
    golden.load("small/small")
"""
)


def test_an_update_is_red_and_the_next_run_green(project, monkeypatch):
    """Each test of an updated golden fails in that run, which records it once and shows what changed."""
    recorded = []
    rerecord = flow.rerecord
    monkeypatch.setattr(flow, "rerecord", lambda *given, **more: recorded.append(given) or rerecord(*given, **more))
    bumped(0.1)
    before = listing()
    result = run(written(project, test_it=TWO), "--golden-update")
    result.assert_outcomes(failed=3)
    assert len(recorded) == 1
    after = listing()
    assert after["golden.json"] != before["golden.json"]
    counts, updated, *table = block(result)
    assert counts == "no checks"
    assert updated == "updated golden/small/small: run again without --golden-update"
    assert any("short" in line and "drift" in line for line in table)
    assert history() == ["recorded", "recorded"]
    result.stdout.fnmatch_lines(["updated golden/small/small: run again without --golden-update"])
    run(project).assert_outcomes(passed=3)
    assert listing() == after


def test_an_update_beyond_drift_needs_a_reason(project):
    """Other weights: refused, table shown, every file as it was; with a reason written, red, and green afterwards."""
    exchanged()
    before = listing()
    result = run(written(project, test_it=TWO), "--golden-update")
    result.assert_outcomes(failed=3)
    assert listing() == before
    _, refusal, *table = block(result)
    assert refusal.startswith("not updated golden/small/small: ")
    assert "--golden-reason TEXT" in refusal
    assert any("bug-sized" in line or "structural" in line for line in table)
    assert run(project, "--golden-update", "--golden-reason", "trained on").ret == pytest.ExitCode.TESTS_FAILED
    assert listing() != before
    assert history() == ["recorded", "trained on"]
    run(project).assert_outcomes(passed=3)


def test_an_update_of_what_is_as_it_was(project):
    """Where nothing would change nothing is written, and the test goes on to its check."""
    before = listing()
    result = run(written(project, test_it=TWO), "--golden-update")
    result.assert_outcomes(passed=3)
    assert listing() == before
    assert block(result) == ["2 checks: 2 identical"]


def test_an_update_from_another_directory(project, monkeypatch):
    """The golden still finds its model and its suite, wherever the run and the test were started."""
    bumped(0.1)
    Path("inner").mkdir()
    Path("pytest.ini").write_text("[pytest]\n")
    written(project, test_it="def test_it(golden, tmp_path, monkeypatch):\n"
            "    monkeypatch.chdir(tmp_path)\n    golden.load('small/small')\n")  # fmt: skip
    os.chdir("inner")
    result = run(project, "--golden-update", "../test_it.py")
    os.chdir(project.path)
    result.assert_outcomes(failed=1)
    golden = store.read_golden(GOLDEN)
    assert (golden.model.path, golden.provenance["suite_path"]) == ("../model", "../../../prompts/small.toml")


def test_an_update_that_cannot_be_made(project):
    """Without the model there is nothing to record from: one line, and the file as it was."""
    shutil.rmtree("golden/small/model")
    before = listing()
    result = run(written(project, test_it=GOOD), "--golden-update")
    result.assert_outcomes(failed=1)
    assert listing() == before
    assert block(result)[1].startswith("not updated golden/small/small: the model of small/small is not beside it")


NEW = """
import pytest

@pytest.mark.parametrize("name", ["small/new", "golden/small/new"])
def test_new(golden, name):
    golden.check(name, "hf:dtype=float32", quick=True, model="golden/small/model", suite="prompts/small.toml")
"""


def test_a_new_golden_is_red_and_then_green(project):
    """What is missing is recorded from the model and the suite of its call, and what is there is left alone."""
    before = listing()
    result = run(written(project, test_good=GOOD, test_it=NEW), "--golden-update-new-only", "--golden-reason=first")
    result.assert_outcomes(passed=1, failed=2)
    assert listing() == before
    said = "recorded golden/small/new: run again without --golden-update-new-only"
    assert block(result) == ["1 check: 1 identical", said]
    golden = store.read_golden("golden/small/new")
    assert (golden.name, golden.model.path) == ("small/new", "../model")
    assert [entry["reason"] for entry in golden.provenance["history"]] == ["first"]
    run(project).assert_outcomes(passed=3)


def test_a_new_golden_without_model_and_suite(project):
    """A call that does not name them gets the line that says so; one that names what is not there as well."""
    text = """
def test_none(golden):
    golden.check("small/new", "hf")

def test_nowhere(golden):
    golden.check("small/newer", "hf", model="nowhere", suite="prompts/small.toml")
"""
    result = run(written(project, test_it=text), "--golden-update-new-only")
    result.assert_outcomes(failed=2)
    assert not Path("golden/small/new").exists()
    assert not Path("golden/small/newer").exists()
    result.stdout.fnmatch_lines(["there is no golden 'small/new' *", "not recorded golden/small/newer: *nowhere*"])


def test_an_update_leaves_missing_goldens_alone(project):
    """--golden-update is for goldens that are there."""
    result = run(written(project, test_it=NEW), "--golden-update")
    result.assert_outcomes(failed=2)
    assert not Path("golden/small/new").exists()
    result.stdout.fnmatch_lines(["there is no golden 'small/new' *"])


# --- several processes -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_report_what_one_process_does(project):
    """With -n 2 the reports hold every verdict, to the last bit, in the same order, and the block the same lines."""
    written(project, test_a=BAD, test_b=GOOD, test_c=GOOD.replace("float32", "bfloat16"))
    names = ("all.json", "all.xml", "all.md")
    options = [f"--golden-report={name}" for name in names]
    alone = run(project, *options)
    expected = without_seconds(json.loads(Path("all.json").read_text()))
    for name in names:
        Path(name).unlink()
    result = project.runpytest_subprocess(*PLAIN, "-n2", "--dist", "loadfile", *options)
    result.assert_outcomes(passed=2, failed=1)
    assert block(result) == block(alone)
    assert block(result)[0] == "3 checks: 2 identical, 1 deviates"
    assert without_seconds(json.loads(Path("all.json").read_text())) == expected
    assert len(list(ElementTree.parse("all.xml").getroot().iter("testcase"))) == 3
    assert "deviates" in Path("all.md").read_text()


@pytest.mark.slow
def test_a_crashing_worker(project):
    """What its tests said before it crashed is reported, and nothing is said of unused goldens."""
    another()
    crash = GOOD + "\ndef test_crash(golden):\n    import os\n    os._exit(1)\n"
    written(project, test_a=crash, test_b=GOOD)
    result = project.runpytest_subprocess(*PLAIN, "-n2", "--golden-report=all.json")
    result.assert_outcomes(passed=2, failed=1)
    assert block(result) == ["2 checks: 2 identical"]
    assert len(json.loads(Path("all.json").read_text())) == 2


def test_workers_that_leave_tests_out(project):
    """Tests that a project's hook deselects in the workers are missing for the process that reports, too."""
    another()
    text = "def test_load(golden):\n    golden.load('small/small')\n"
    written(project, test_good=text, test_more=text)
    result = project.runpytest_subprocess(*PLAIN, "-n2")
    assert block(result) == ["no checks", "unused: golden/small/other: no test asked for it"]
    hook = "def pytest_collection_modifyitems(config, items):\n    config.hook.pytest_deselected(items=[items.pop()])\n"
    written(project, conftest=hook)
    assert block(project.runpytest_subprocess(*PLAIN, "-n2")) == ["no checks"]
