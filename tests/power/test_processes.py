"""Parts of a run in processes of their own: all run, one that fails ends the others, and none is left behind."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import EngineError
from harness.power import processes
from harness.power.processes import end_with_parent, run_parts

#: Takes the place of the interpreter: called as `python -m harness CODE PLACE ... --shard I/N`, it runs the code.
STAND_IN = """#!{python} -IS
import os, pathlib, signal, sys, time
place, index = pathlib.Path(sys.argv[4]), int(sys.argv[-1].partition("/")[0])
(place / f"{{index}}.begun").write_text(str(os.getpid()))
(place / f"{{index}}.begun").rename(place / f"{{index}}.pid")
exec(sys.argv[3])
"""
SLEEP = "time.sleep(60)"


class Parts:
    """Runs code in parts, and knows which processes these were."""

    def __init__(self, place):
        self.place = place

    def run(self, code, jobs=2, done=lambda: 0, **more):
        """Run it, with short looks."""
        started = time.monotonic()
        try:
            run_parts([code, str(self.place), "more"], jobs, done, **{"poll": 0.02, **more})
        finally:
            self.seconds = time.monotonic() - started

    @property
    def ids(self):
        """Process ids of the parts that began, and of what these left behind."""
        return [int(path.read_text(encoding="utf-8")) for path in sorted(self.place.glob("*.pid"))]

    def began(self, number):
        """Whether so many have begun."""
        return len(self.ids) >= number

    def alive(self):
        """Those that are still there."""
        return [number for number in self.ids if is_running(number)]


def is_running(number):
    """Whether a process is there and is no zombie, which an init that reaps nothing leaves."""
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts that run code instead of `harness`."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
    stand_in.chmod(0o755)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(sys, "executable", str(stand_in))
    found = Parts(place)
    yield found
    assert found.alive() == []


# --- all goes well -----------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_part_runs_once(parts, jobs):
    """Each is told its own shard after the other arguments, and has one thread and a session of its own."""
    code = """
told = (*sys.argv[1:3], *sys.argv[5:], os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid(), sys.stdin.read())
(place / f"{index}.told").write_text(repr(told))
"""
    parts.run(code, jobs)
    assert len(parts.ids) == len(set(parts.ids)) == jobs
    for index in range(jobs):
        told = (parts.place / f"{index}.told").read_text(encoding="utf-8")
        assert told == repr(("-m", "harness", "more", "--shard", f"{index}/{jobs}", "1", True, ""))


def test_what_they_print_is_not_shown(parts, capfd):
    """Standard output goes nowhere, errors are kept aside; neither fills a pipe that nobody reads."""
    parts.run("print('x' * 2_000_000); print('y' * 2_000_000, file=sys.stderr)")
    assert capfd.readouterr() == ("", "")


def test_results_are_counted_to_the_last(parts):
    """`done` is asked while they run, and once more after the last of them ended."""
    seen = []

    def done():
        found = len(list(parts.place.glob("*.result")))
        seen.append((found, not parts.alive() and parts.began(2)))
        return found

    parts.run("time.sleep(0.1 + index / 5); (place / f'{index}.result').touch()", done=done)
    assert seen[0] == (0, False)
    assert seen[-1] == (2, True)
    assert [found for found, _ in seen] == sorted(found for found, _ in seen)


def test_looking_takes_little_of_the_time(parts, monkeypatch):
    """A look that takes long is taken less often: the parts have work for every core."""
    monkeypatch.setattr(processes, "_REST", 5.0)
    looks = []

    def done():
        looks.append(time.monotonic())
        time.sleep(0.05)
        return 0

    parts.run("time.sleep(0.6)", done=done)
    # The first is before the loop; of the others each takes 0.05 s and rests 0.25 s.
    assert all(later - earlier >= 0.3 for earlier, later in itertools.pairwise(looks[1:]))
    assert len(looks) >= 3


# --- it does not -------------------------------------------------------------------------------


def test_a_part_that_fails_ends_the_others(parts):
    """The error has its code and the last line that it said, blank ones left out; the other is ended at once."""
    code = f"""
if index == 0:
    while not (place / "1.pid").exists(): time.sleep(0.01)
    print("error: first\\nerror: the model is gone\\n\\n", file=sys.stderr)
    sys.exit(3)
{SLEEP}
"""
    with pytest.raises(EngineError, match=r"^a part of the run ended with code 3: error: the model is gone\.") as error:
        parts.run(code)
    assert "--jobs 1" in str(error.value)
    assert parts.began(2)
    assert parts.alive() == []
    assert parts.seconds < 5


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit(1)", "code 1: it said nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "code -9: it said nothing"),
        ("sys.stderr.buffer.write(b'\\xff no text'); sys.exit(1)", "code 1: \N{REPLACEMENT CHARACTER} no text"),
        ("raise ZeroDivisionError('here')", "code 1: ZeroDivisionError: here"),
    ],
)
def test_every_way_to_fail_is_told(parts, code, words):
    """Silence, a signal, bytes that are no text, a traceback."""
    with pytest.raises(EngineError, match=words):
        parts.run(code)


def test_a_failure_counts_after_all_have_ended(parts):
    """One that ended well does not hide one that failed."""
    with pytest.raises(EngineError, match="code 7"):
        parts.run("sys.exit(7 * index)", poll=0.5)


def test_one_that_does_not_listen_is_killed(parts, monkeypatch):
    """Who ignores the request to end has some time, and is then ended all the same."""
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    code = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if index == 0:
    while not (place / "1.deaf").exists(): time.sleep(0.01)
    sys.exit(1)
(place / "1.deaf").touch()
{SLEEP}
"""
    with pytest.raises(EngineError, match="code 1"):
        parts.run(code)
    assert 0.3 <= parts.seconds < 5


def test_one_that_listens_may_clean_up(parts):
    """What a part does when it is asked to end is waited for."""
    code = f"""
def ended(*_):
    time.sleep(0.2)
    (place / "1.clean").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, ended)
if index == 0:
    while not (place / "1.ready").exists(): time.sleep(0.01)
    sys.exit(1)
(place / "1.ready").touch()
{SLEEP}
"""
    with pytest.raises(EngineError, match="code 1"):
        parts.run(code)
    assert (parts.place / "1.clean").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_part_leaves_behind_is_ended(parts, code):
    """A process of a part that is gone, well or not, goes with the run."""
    parts_code = f"""
child = os.fork()
if child == 0:
    {SLEEP}
(place / f"child-{{index}}.pid").write_text(str(child))
os._exit({code})
"""
    if code:
        with pytest.raises(EngineError):
            parts.run(parts_code)
    else:
        parts.run(parts_code)
        assert parts.began(4)
    wait_for(lambda: not parts.alive())


def wait_for(condition, seconds=5.0):
    """Until it holds: who was killed is gone a moment later."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- patience ----------------------------------------------------------------------------------


def test_without_a_result_patience_ends(parts):
    """The same number of results for that long ends the run, and says how long it was."""
    with pytest.raises(EngineError, match=r"^no result came within 1 s\.") as error:
        parts.run(SLEEP, patience=1.0, done=lambda: 5)
    assert "--jobs 1" in str(error.value)
    assert 1.0 <= parts.seconds < 4


def test_every_result_renews_patience(parts):
    """A run that takes longer than patience in all is not ended while results come."""
    parts.run(
        "[(time.sleep(0.2), (place / f'{index}-{i}.result').touch()) for i in range(6)]",
        patience=0.9,
        done=lambda: len(list(parts.place.glob("*.result"))),
    )
    assert parts.seconds > 1.2


# --- interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_an_interruption_ends_the_parts(parts, error):
    """Whatever is raised while they run is passed on after they were ended."""

    def done():
        if parts.began(2):
            raise error
        return 0

    with pytest.raises(error):
        parts.run(SLEEP, done=done)
    assert parts.alive() == []
    assert parts.seconds < 5


def test_a_part_that_cannot_be_started_ends_those_that_were(parts, monkeypatch):
    """Half a run is none."""
    start, started = subprocess.Popen, []

    def popen(*arguments, **options):
        if started:
            raise OSError("no more processes")
        started.append(start(*arguments, **options))
        return started[0]

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no more processes"):
        parts.run(SLEEP)
    assert started[0].returncode is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_part_ends_with_a_parent_that_is_killed(tmp_path):
    """A kill -9 lets the parent clean up nothing; the part is gone all the same."""
    part = (
        "import time; from harness.power.processes import end_with_parent; "
        "end_with_parent(); print('ready', flush=True); time.sleep(120)"
    )
    parent = (
        "import os, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {part!r}], stdout=subprocess.PIPE, "
        "env={**os.environ, 'GOLDEN_HARNESS_PARENT': str(os.getpid())}, start_new_session=True); "
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_no_part_is_left_alone(monkeypatch):
    """Without the word of a parent nothing is asked of the kernel."""
    monkeypatch.delenv("GOLDEN_HARNESS_PARENT", raising=False)
    end_with_parent()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_part_whose_parent_is_gone_already_ends():
    """It ended before the kernel could be asked."""
    part = "from harness.power.processes import end_with_parent; end_with_parent(); print('went on')"
    done = subprocess.run(
        [sys.executable, "-c", part], env={**os.environ, "GOLDEN_HARNESS_PARENT": "1"}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "has ended" in done.stderr
