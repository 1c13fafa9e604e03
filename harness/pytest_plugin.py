"""The pytest plugin: the fixture `golden`, its options, and one block at the end of the run.

pytest imports this file in every project of an environment that has the package, so it imports nothing heavy, and
nothing at all happens until a test asks for the fixture.

What a test did travels in its reports: pytest-xdist runs the tests in workers, and reports are what these send.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import GoldenError, HarnessError, StaleError, UsageError

if TYPE_CHECKING:
    import torch
    from _pytest.outcomes import Failed
    from transformers import PreTrainedModel

    from harness.values import Changes, Golden, Suite, Verdict
else:
    Failed = pytest.fail.Exception  # the public way to the same class, which type checkers cannot follow

#: Where a test report carries what its test did with goldens.
_ATTRIBUTE = "golden_harness"
#: Key of a worker's last words: not every test that was collected ran.
_PARTIAL = "golden_harness_partial"
#: Options that leave tests out, or stop before the last one.
_NARROWING = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "failedfirst", "stepwise")


class GoldenFailed(Failed, AssertionError):  # noqa: N818  # as pytest's Failed: it is shown to people by this name
    """Fails a test with a report and no traceback; an AssertionError for whoever expects one."""

    __module__ = "builtins"  # as pytest's own outcomes: the last lines of a run show the bare name

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


@dataclass(kw_only=True, slots=True)
class _Notes:
    """What a test did with goldens since its last report."""

    used: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)


_NOTES = pytest.StashKey[_Notes]()
_GOLDENS = pytest.StashKey["_Goldens"]()


# --- the fixture -------------------------------------------------------------------------------


class GoldenFixture:
    """Goldens as one test sees them. A NAME stands for a directory under `golden_root`, else under the rootdir."""

    def __init__(self, goldens: _Goldens, notes: _Notes) -> None:
        self._goldens = goldens
        self._notes = notes

    def check(
        self,
        name: str | Path,
        candidate: Any,
        *,
        quick: bool = False,
        reference: str | Path | None = None,
        upcast: bool = True,
        diagnose: bool = False,
        model: str | Path | None = None,
        suite: Suite | str | Path | None = None,
    ) -> Verdict:
        """The verdict on a candidate; a status other than `identical` or `drift` fails the test with the report.

        Every check counts in the summary and in `--golden-report`, so a test that *expects* a bad verdict calls
        ``harness.check(golden.load(name), candidate)`` instead.

        Args:
            name: the golden, under `golden_root` or the rootdir, or the path of its directory.
            candidate: a SPEC, an Engine, a transformers model, an nn.Module, a callable, or a Trace.
            quick: only the suite's quick runs.
            reference: directory of the golden's model, where it does not lie beside the golden; or ``stream:...``,
                whose own paths are as the directory sees them that the run started in.
            upcast: also judge a copy of a 16-bit candidate, widened to float32.
            diagnose: also look for the bugs of the catalogue, as `harness check --diagnose` does.
            model: directory of a model, to record the golden from with `--golden-update-new-only`.
            suite: a suite or its file, for the same. Paths are relative to the rootdir.

        Raises:
            AssertionError: unless the status is ok; also where the golden is missing, or was written in this run.
        """
        __tracebackhide__ = True
        try:
            stored = self._stored(name, reference=reference, model=model, suite=suite)
            verdict = _check(
                stored,
                candidate,
                reference=self._goldens.under_root(reference),
                quick=quick,
                upcast=upcast,
                diagnose=diagnose,
            )
        except HarnessError as error:
            # What could not be checked stands in the reports: a list without it would read as if all was well.
            self._note(_unable(name, candidate, error))
            raise GoldenFailed(str(error)) from None
        self._note(verdict)
        if not verdict.ok:
            raise GoldenFailed(str(verdict))
        return verdict

    def load(self, name: str | Path) -> Golden:
        """A golden, read once a run."""
        __tracebackhide__ = True
        try:
            return self._stored(name)
        except HarnessError as error:
            raise GoldenFailed(str(error)) from None

    def reference_model(self, name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A fresh transformers model, the one that the golden was recorded from, in its own dtype or in ``dtype``."""
        __tracebackhide__ = True
        from harness import flow

        try:
            return flow.reference_model(self._stored(name), dtype=dtype)
        except HarnessError as error:
            raise GoldenFailed(str(error)) from None

    def _stored(
        self,
        name: str | Path,
        *,
        reference: str | Path | None = None,
        model: str | Path | None = None,
        suite: Suite | str | Path | None = None,
    ) -> Golden:
        __tracebackhide__ = True
        if not isinstance(name, (str, os.PathLike)):
            raise UsageError(
                f"the first argument is a {type(name).__name__}, not the name or directory of a golden",
                fix='Write e.g. golden.check("bloom-tiny/core", candidate); harness.check takes goldens in memory',
            )
        if (model is None) != (suite is None):
            raise UsageError("model= and suite= go together", fix="Name both, so that the golden can be made, or none")
        place = self._goldens.place(name)
        written = self._goldens.written(place, reference=reference, model=model, suite=suite)
        if _exists(place):
            self._notes.used.append(str(place.resolve()))
        if written:
            raise GoldenFailed(written)
        if not _exists(place):
            raise _missing(name, self._goldens.label(place), model, suite)
        return self._goldens.read(place)

    def _note(self, verdict: Verdict) -> None:
        from harness.report.plain import pack

        self._notes.verdicts.append(pack(verdict))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> GoldenFixture:
    """Recorded goldens: `golden.check(NAME, candidate)` fails the test unless the candidate is still the same model."""
    notes = request.node.stash.setdefault(_NOTES, _Notes())
    return GoldenFixture(request.config.stash[_GOLDENS], notes)


def _check(golden: Golden, candidate: Any, **how: Any) -> Verdict:
    from harness import flow

    return flow.check(golden, candidate, **how)


def _exists(place: Path) -> bool:
    return (place / "golden.json").is_file()


def _stamp(place: Path) -> tuple[int, int]:
    """Another one whenever the golden was written: writing replaces its file."""
    seen = (place / "golden.json").stat()
    return seen.st_ino, seen.st_mtime_ns


def _missing(name: str | Path, label: str, model: str | Path | None, suite: Suite | str | Path | None) -> GoldenError:
    by_hand = f"harness record --model {model or 'DIR'} --suite {_file_of(suite)} --out {label}"
    run = "run" if model is not None else "name model= and suite= in the call and run"
    return GoldenError(
        f"there is no golden {str(name)!r} ({label})",
        fix=f"Make it with `{by_hand}`, or {run} with --golden-update-new-only",
    )


def _file_of(suite: Suite | str | Path | None) -> str:
    return str(suite) if isinstance(suite, (str, os.PathLike)) else "FILE"


def _unable(name: object, candidate: Any, error: HarnessError) -> Verdict:
    """The verdict on a check that could not begin."""
    from harness.flow.candidates import name_of
    from harness.values import Status
    from harness.verdict import failed

    status = Status.STALE if isinstance(error, StaleError) else Status.ERROR
    label = str(name) if isinstance(name, (str, os.PathLike)) else type(name).__name__
    return failed(status, error.problem, golden=label, candidate=name_of(candidate), fix=error.fix, check="input")


# --- options -----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, in a group of their own, and where goldens lie."""
    group = parser.getgroup("golden-harness", "golden-harness: is it still the same model?")
    group.addoption(
        "--golden-update",
        action="store_true",
        help="Record the goldens of the tests that run again, each from its own model and suite. These tests fail: "
        "run again without it.",
    )
    group.addoption(
        "--golden-update-new-only",
        action="store_true",
        help="Record goldens that are missing and whose call names model= and suite=. These tests fail as well.",
    )
    group.addoption(
        "--golden-reason",
        metavar="TEXT",
        help="Why, kept in the golden's history. Needed to update a golden that changes beyond drift.",
    )
    group.addoption(
        "--golden-report",
        action="append",
        default=[],
        metavar="FILE",
        help=f"Write the verdicts to FILE ({', '.join(_WRITERS)}); may be repeated.",
    )
    parser.addini("golden_root", default="golden", help="Directory of the goldens, relative to the rootdir.")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that cannot be followed before anything runs."""
    if not _is_worker(config):  # a worker has the options of a run that was accepted
        _refuse_update(config)
        for file in _report_files(config):
            _refuse_report(file)
    goldens = config.stash[_GOLDENS] = _Goldens(config)
    config.pluginmanager.register(_Run(config, goldens), "golden_harness_run")


def _refuse_update(config: pytest.Config) -> None:
    options = ("--golden-update", "--golden-update-new-only")
    given = next((option for option in options if config.getoption(option)), None)
    if given is None:
        if config.getoption("--golden-reason") is not None:
            raise pytest.UsageError("--golden-reason is of an update: give it with --golden-update, or leave it out")
        return
    if os.environ.get("CI", "").strip().lower() not in ("", "false", "0"):
        raise pytest.UsageError(
            f"{given} writes goldens, and CI must not (the variable CI is set): run it elsewhere and commit the result"
        )
    if config.getoption("numprocesses", None) or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(f"{given} does not go with -n of pytest-xdist: run updates in one process")


def _report_files(config: pytest.Config) -> list[Path]:
    return [config.invocation_params.dir / file for file in config.getoption("--golden-report")]


def _refuse_report(file: Path) -> None:
    """Before hours of work, not after them."""
    problem = None
    if file.suffix.lower() not in _WRITERS:
        problem = f"is none of the kinds that can be written: end its name in {', '.join(_WRITERS)}"
    elif file.is_dir():
        problem = "is a directory: name a file in it"
    elif not file.parent.is_dir():
        problem = "lies in a directory that does not exist: make it first"
    elif not os.access(file.parent, os.W_OK):
        problem = "cannot be written: its directory is read-only"
    if problem:
        raise pytest.UsageError(f"--golden-report {file} {problem}")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is a process of pytest-xdist that runs tests and reports elsewhere."""
    return hasattr(config, "workerinput")


# --- goldens of a run --------------------------------------------------------------------------


class _Goldens:
    """Where goldens lie, which were read, and which were written in this run."""

    def __init__(self, config: pytest.Config) -> None:
        self._rootpath = config.rootpath
        self._root = config.rootpath / config.getini("golden_root")
        self._update: bool = config.getoption("--golden-update")
        self._update_new: bool = config.getoption("--golden-update-new-only")
        self._reason: str | None = config.getoption("--golden-reason")
        self._read: dict[Path, tuple[tuple[int, int], Golden]] = {}
        self._written: dict[Path, str] = {}
        #: Of each golden that was to be written: what happened, and the table of changes.
        self.updates: list[tuple[str, str]] = []

    def place(self, name: str | Path) -> Path:
        """The directory of a golden: under the root of goldens, else under the rootdir; where it would be made."""
        inside, beside = self._root / name, self._rootpath / name
        if _exists(beside) and not _exists(inside):
            return beside
        # "golden/m/core" is another way to write "m/core", and no reason for a golden/golden/m/core.
        return beside if beside.is_relative_to(self._root) else inside

    def under_root(self, path: str | Path | None) -> str | Path | None:
        """A path as the rootdir sees it, as a run may start in any directory; the SPEC of a streamed model as it is."""
        from harness.engines.spec import is_streamed

        return path if path is None or is_streamed(str(path)) else self._rootpath / path

    def label(self, place: Path) -> str:
        """A directory as people write it."""
        return str(place.relative_to(self._rootpath) if place.is_relative_to(self._rootpath) else place)

    def read(self, place: Path) -> Golden:
        """The golden there, read again only when its file is another."""
        from harness.store import read_golden

        key, stamp = place.resolve(), _stamp(place)
        if key not in self._read or self._read[key][0] != stamp:
            self._read[key] = (stamp, read_golden(place))
        return self._read[key][1]

    def written(
        self,
        place: Path,
        *,
        reference: str | Path | None,
        model: str | Path | None,
        suite: Suite | str | Path | None,
    ) -> str:
        """Write the golden if the options ask for it, once a run; what became of it, "" where it is as it was."""
        key = place.resolve()
        if key not in self._written:
            if self._update and _exists(place):
                self._written[key] = self._rerecord(place, reference)
            elif self._update_new and not _exists(place) and model is not None and suite is not None:
                self._written[key] = self._record(place, model, suite)
        return self._written.get(key, "")

    def _rerecord(self, place: Path, reference: str | Path | None) -> str:
        from harness import flow

        shown: list[Changes] = []
        before = _stamp(place)
        try:
            with contextlib.chdir(self._rootpath):  # goldens name their model and suite relative to the tree
                flow.rerecord(place, reference=self.under_root(reference), reason=self._reason, show=shown.append)
        except HarnessError as error:
            text = f"not updated {self.label(place)}: {error}"
        else:
            if _stamp(place) == before:
                return ""  # the golden is as it was: the test goes on
            text = f"updated {self.label(place)}: run again without --golden-update"
        self.updates.append((text, "\n".join(str(one) for one in shown)))
        return text

    def _record(self, place: Path, model: str | Path, suite: Suite | str | Path) -> str:
        from harness import flow

        try:
            with contextlib.chdir(self._rootpath):
                flow.record(model, suite, out=place, reason=self._reason)
            text = f"recorded {self.label(place)}: run again without --golden-update-new-only"
        except HarnessError as error:
            text = f"not recorded {self.label(place)}: {error}"
        self.updates.append((text, ""))
        return text

    def unused(self, used: Container[str]) -> list[str]:
        """Goldens under the root of goldens that are not among ``used``."""
        from harness.store import list_goldens

        return [self.label(place) for place in list_goldens(self._root) if str(place.resolve()) not in used]


# --- what the tests did ------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach what the test did with goldens, in types that pytest-xdist can send."""
    report = yield
    notes = item.stash.get(_NOTES, None)
    if notes is not None or "golden" in getattr(item, "fixturenames", ()):
        vars(report)[_ATTRIBUTE] = {
            "asked": notes is not None,
            "cut": report.when != "teardown" and not report.passed,
            "used": [] if notes is None else notes.used,
            "verdicts": [] if notes is None else notes.verdicts,
        }
    if notes is not None:
        notes.used, notes.verdicts = [], []
    return report


class _Run:
    """Gathers the reports of a run, writes the files and the block at its end."""

    def __init__(self, config: pytest.Config, goldens: _Goldens) -> None:
        self._config = config
        self._goldens = goldens
        self._asked = False
        self._partial = False
        self._used: set[str] = set()
        self._checks: list[tuple[str, str]] = []
        self._verdicts: list[tuple[str, Verdict]] = []
        self._unused: list[str] = []
        self._problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        did: dict[str, Any] | None = getattr(report, _ATTRIBUTE, None)
        if did is None:
            return
        self._asked |= did["asked"]
        self._partial |= did["cut"]  # what it would have used is not known
        self._used.update(did["used"])
        self._checks += [(report.nodeid, text) for text in did["verdicts"]]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._partial |= not report.passed

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._partial |= bool(items)
        if items and _is_worker(self._config):
            vars(self._config)["workeroutput"][_PARTIAL] = True

    def pytest_keyboard_interrupt(self) -> None:
        self._partial = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker of pytest-xdist ended: what it left out, this process did not see."""
        self._partial |= bool(error) or getattr(node, "workeroutput", {}).get(_PARTIAL, False)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if _is_worker(self._config) or self._config.option.collectonly:
            return
        if self._checks:
            from harness.report.plain import unpack

            # In the order of the tests' names: that in which workers finish is another every time.
            checks = sorted(self._checks, key=lambda check: check[0])
            self._verdicts = [(nodeid, unpack(text)) for nodeid, text in checks]
        if self._asked and self._is_whole(session):
            self._unused = self._goldens.unused(self._used)
        verdicts = [verdict for _, verdict in self._verdicts]
        # Also where nothing was checked: an old file would tell of another run.
        written = (_write_report(file, verdicts) for file in _report_files(self._config))
        self._problems = [problem for problem in written if problem]
        if self._problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _is_whole(self, session: pytest.Session) -> bool:
        """Whether every test of the project ran to its end, so that a golden that was not used is used by none."""
        stopped = session.shouldfail or session.shouldstop
        ended = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        narrowed = any(self._config.getoption(option, None) for option in _NARROWING)
        return ended and not (self._partial or stopped or narrowed) and _names_everything(self._config)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._asked and not self._problems:
            return
        terminalreporter.write_sep("=", "golden")
        for text, markup in self._lines():
            terminalreporter.write_line(text, **markup)

    def _lines(self) -> Generator[tuple[str, Mapping[str, bool]]]:
        verdicts = [verdict for _, verdict in self._verdicts]
        yield _counts(verdicts), {"bold": True}
        for nodeid, verdict in self._verdicts:
            if not verdict.ok:
                yield _not_ok(nodeid, verdict), {"red": True}
        if environment := _environment(verdicts):
            yield environment, {}
        for text, table in self._goldens.updates:
            yield text, {"yellow": True}
            for line in table.splitlines():
                yield f"  {line}", {}
        for name in self._unused:
            yield f"unused: {name}: no test asked for it", {"yellow": True}
        for problem in self._problems:
            yield problem, {"red": True}


def _names_everything(config: pytest.Config) -> bool:
    """Whether the arguments cover all that runs without arguments: the testpaths, else the rootdir."""
    start = config.invocation_params.dir
    arguments = [Path(os.path.abspath(start / argument)) for argument in config.args]
    patterns = [str(config.rootpath / pattern) for pattern in config.getini("testpaths")]
    wanted = [Path(path) for pattern in patterns for path in glob.glob(pattern, recursive=True)] or [config.rootpath]
    return all(any(path.is_relative_to(argument) for argument in arguments) for path in wanted)


# --- the block at the end ----------------------------------------------------------------------


def _counts(verdicts: Sequence[Verdict]) -> str:
    """How many checks there were, and how many of each status."""
    if not verdicts:
        return "no checks"
    by_status = Counter(verdict.status for verdict in verdicts)
    counts = ", ".join(
        f"{by_status[status]} {status.value}" for status in type(verdicts[0].status) if by_status[status]
    )
    return f"{len(verdicts)} check{'s' if len(verdicts) > 1 else ''}: {counts}"


def _not_ok(nodeid: str, verdict: Verdict) -> str:
    """One line: what, which test, and the first finding that decided it."""
    message = next((one.message for one in verdict.failures if one.status is verdict.status), "")
    line = f"{verdict.status.value}: {nodeid}: {verdict.candidate} against {verdict.golden}: {message}"
    return " ".join(line.split())


def _environment(verdicts: Iterable[Verdict]) -> str:
    """What is another today than when the goldens were recorded, each difference once."""
    from harness.report.terminal import environment_words

    found = dict.fromkeys(difference for verdict in verdicts for difference in verdict.environment)
    return f"environment since the goldens: {environment_words(found)}" if found else ""


# --- reports -----------------------------------------------------------------------------------


def _json(verdicts: Sequence[Verdict]) -> str:
    return json.dumps([verdict.to_dict() for verdict in verdicts], indent=2) + "\n"


def _junit(verdicts: Sequence[Verdict]) -> str:
    from harness.report.junit import to_junit

    return to_junit(verdicts)


def _markdown(verdicts: Sequence[Verdict]) -> str:
    from harness.report.markdown import to_markdown

    return to_markdown(verdicts)


_WRITERS: Mapping[str, Callable[[Sequence[Verdict]], str]] = {".json": _json, ".xml": _junit, ".md": _markdown}


def _write_report(file: Path, verdicts: Sequence[Verdict]) -> str:
    """Write the file in one step; what went wrong, "" if nothing did."""
    from harness.files import replace_file

    try:
        replace_file(file, _WRITERS[file.suffix.lower()](verdicts).encode())
    except OSError as error:
        return f"--golden-report {file} was not written: {error.strerror or error}"
    return ""
