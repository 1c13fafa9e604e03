"""A team of processes: whatever happens to a rank or to the parent, it ends soon, names the culprit, leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import harness
from harness.engines import build_engine
from harness.engines.ranks import spawned
from harness.errors import EngineError
from harness.values import Status
from tests.commands import runner
from tests.engines.ranks.leftovers import Seen, WatchedTeam, everything_gone

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for what is left in Linux' /proc")

ROOT = Path(__file__).parents[3]
_BREAKING = "tests.engines.ranks.breaking"
_GOLDEN = ROOT / "golden/llama-tiny/headline"

#: Seconds of silence that are allowed: far more than a rank needs, and short to wait for.
_LIMIT = 2.0


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    """Every team is looked at before it is closed, and nothing of any is left after the test."""
    monkeypatch.setattr(spawned, "SpawnedTeam", WatchedTeam)
    WatchedTeam.made.clear()
    yield
    assert WatchedTeam.made
    assert [seen.left() for seen in WatchedTeam.made] == [[]] * len(WatchedTeam.made)


def light(size=2, server="Light", limit=_LIMIT, **options):
    """A team of ranks without a model."""
    team = WatchedTeam(size, **{"threads": 1, **options}, server=f"{_BREAKING}:{server}")
    team.spec, team.timeout = "tp:size=2", limit
    return team


def failed(team, request, *arguments):
    """The error of a request that rank 1 fails."""
    with pytest.raises(EngineError) as caught:
        team.call(request, 1, *arguments, world=team.size)
    assert not team.alive
    return caught.value


# --- what goes well --------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_ranks_and_only_those_asked_are_heard():
    """A request goes to the first ranks of a team, with arguments larger than a socket's buffer, and their answers."""
    team = light(3)
    large = bytes(2**22)
    assert team.call("echo", 7, large, world=3) == [(rank, [large]) for rank in range(3)]
    assert team.call("echo", 7, world=2) == [(0, []), (1, [])]
    assert team.alive
    team.close()
    assert not team.alive


def test_a_slow_rank_is_no_failed_one():
    """Silence shorter than the limit, and any time with pulses in it, are work."""
    team = light()
    assert team.call("slow", 1, _LIMIT / 4, world=2) == [0, 1]
    assert team.call("get_on", 1, 12, _LIMIT / 8, world=2) == [0, 1]
    team.close()


def test_progress_says_where_a_rank_is():
    """While ranks work the block that one is in is shown."""
    team, shown = light(), []
    team.progress = shown.append
    team.call("get_on", 1, 3, 0.3, world=2)
    team.close()
    assert any(text.startswith("starting 2 ranks") for text in shown)
    assert any(text.startswith("rank 1: model.layers.") for text in shown)


def test_a_kept_team_is_used_again_and_ended_at_last(monkeypatch):
    """Inside `kept` engines share processes, a larger team or one that has died is replaced, and all end with it."""
    monkeypatch.setattr(spawned, "SpawnedTeam", light)
    with spawned.kept():
        first = spawned.team_of(2, None)
        spawned.release(first)
        assert spawned.team_of(1, None) is first
        spawned.release(first)
        second = spawned.team_of(3, None)
        assert second is not first
        assert not first.alive
        os.kill(second.pids[0], signal.SIGKILL)
        os.waitid(os.P_PID, second.pids[0], os.WEXITED | os.WNOWAIT)
        spawned.release(second)
        third = spawned.team_of(1, None)
        assert third is not second
        spawned.release(third)
        assert third.alive
    assert not third.alive


@pytest.mark.parametrize(
    ("made", "asked", "same"),
    [
        ({"threads": 3}, {"threads": 3}, True),
        ({"threads": 3}, {"threads": None}, False),
        ({"threads": None}, {"threads": 3}, False),
        # 8 cores over the 2 ranks that it has.
        ({"threads": None}, {"threads": 4}, True),
        ({"threads": None, "device": "cuda"}, {"threads": None, "device": "cuda"}, True),
        ({"threads": None, "device": "cuda"}, {"threads": None}, False),
    ],
)
def test_a_kept_team_serves_only_what_asks_for_ranks_like_its_own(monkeypatch, made, asked, same):
    """Threads and device of a kept team are what the next SPEC asks for; without threads these are its shared cores."""
    monkeypatch.setattr(spawned, "SpawnedTeam", light)
    monkeypatch.setattr(spawned.os, "cpu_count", lambda: 8)
    with spawned.kept():
        first = spawned.team_of(2, **made)
        spawned.release(first)
        second = spawned.team_of(1, **asked)
        assert (second is first) is same
        assert first.alive is same
        spawned.release(second)


def environment_of(pid):
    """What a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(pair.decode().split("=", 1) for pair in pairs if pair)


def test_ranks_on_the_cpu_see_no_accelerator(monkeypatch):
    """Ranks of a candidate on the CPU see no GPU, whatever there is; those of another see what their parent does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    for device, expected in {"cpu": ["", "", "3"], "cuda": ["0,1", None, "3"]}.items():
        team = light(device=device, threads=3)
        found = [environment_of(pid) for pid in team.pids]
        team.close()
        assert [[one.get(name) for name in names] for one in found] == [expected] * 2


def test_a_team_outlives_the_thread_that_opened_it():
    """A team that a short-lived thread has started works in another one."""
    teams = []

    def opened():
        teams.append(light())
        # The kernel watches over a rank from when this says that it is ready.
        teams[0].call("echo", 1, world=2)

    opener = threading.Thread(target=opened)
    opener.start()
    opener.join()
    assert teams[0].call("slow", 1, 0.3, world=2) == [0, 1]
    teams[0].close()


def test_an_error_in_a_starting_thread_is_raised_where_the_team_is_opened(monkeypatch):
    """Ranks that cannot be started raise in the thread that asks for them, and those before are ended."""
    start = WatchedTeam._started

    def second_fails(self, number):
        if number == 1:
            raise OSError("no more processes")
        return start(self, number)

    monkeypatch.setattr(WatchedTeam, "_started", second_fails)
    caught = []

    def opener():
        try:
            light()
        except OSError as error:
            caught.append(str(error))

    thread = threading.Thread(target=opener)
    thread.start()
    thread.join()
    assert caught == ["no more processes"]


# --- what does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "arguments", "message", "trace"),
    [
        ("fail", ["so not"], "ArithmeticError: so not", "in fail\n"),
        ("lose_connection", [], "ConnectionError: Connection closed by peer", "in lose_connection\n"),
        ("exit", [5], "SystemExit: 5", "in exit\n"),
        ("eat_memory", [], "MemoryError", "in eat_memory\n"),
        ("answer_with_a_lock", [], "TypeError: cannot pickle", "in _packed\n"),
        ("kill", [], "was killed by SIGKILL, as the kernel does to a process when memory runs out", ""),
        ("exit_at_once", [0], "ended with exit code 0", "last words"),
        ("sleep", [], "got nowhere for 2 s after model.layers.0", " in sleep\n"),
        ("hang_in_c", [], "got nowhere for 2 s after model.layers.0", " in hang_in_c\n"),
        ("stop", [], "is stopped (SIGSTOP)", ""),
        ("stop_halfway", [], "is stopped (SIGSTOP)", ""),
    ],
)
def test_the_rank_that_failed_is_named(request_, arguments, message, trace):
    """While rank 0 waits for it, rank 1 fails in each of the ways there are."""
    error = failed(light(), request_, *arguments)
    assert error.problem.startswith(f"rank 1 of tp:size=2: {message}")
    assert trace in f"{error.details}\n"
    assert error.exit_code == 4


@pytest.mark.parametrize(
    ("server", "message", "trace"),
    [
        ("Silent", "got nowhere for 2 s while it started", " in sleep\n"),
        ("Broken", "ImportError: there is no such library", "in __init__\n"),
    ],
)
def test_a_rank_that_does_not_get_ready_is_named(server, message, trace):
    """A rank that hangs while it starts uses no processor time, and one that cannot start says why."""
    error = failed(light(server=server), "echo")
    assert error.problem == f"rank 1 of tp:size=2: {message}"
    assert trace in error.details


def test_a_rank_that_loads_is_seen_to_work():
    """Loading sends no pulses: a rank that computes longer than the limit goes on, and one that sleeps does not."""
    team = light(limit=1.0)
    assert team.call("compute", 1, 3.0, world=2, loading=True) == [0, 1]
    with pytest.raises(EngineError, match="got nowhere for 1 s"):
        team.call("slow", 1, 600, world=2, loading=True)


def test_ranks_that_are_not_there_are_not_asked():
    """A closed team, and one that is too small, is an error and no empty answer."""
    team = light()
    with pytest.raises(EngineError, match="tp:size=2 asks 3 ranks, and its team has 2"):
        team.call("echo", 1, world=3)
    assert team.alive
    team.close()
    with pytest.raises(EngineError, match="tp:size=2 asks 2 ranks, and its team has 0"):
        team.call("echo", 1, world=2)


def test_all_that_wait_are_named_where_nobody_else_is_at_work():
    """Where every rank waits for another one, none is singled out."""
    error = failed(light(), "wait_for_it")
    assert error.problem.startswith("rank 0 (and rank 1) of tp:size=2: waits in all_reduce for a rank that does not")


def test_a_stopped_rank_does_not_hold_up_who_asks_it():
    """A request larger than a socket's buffer to a rank that is stopped does not block, and neither does the end."""
    team = light()
    team.call("echo", 1, world=2)
    os.kill(team.pids[1], signal.SIGSTOP)
    error = failed(team, "echo", bytes(2**24))
    assert error.problem.startswith("rank 1 of tp:size=2: is stopped (SIGSTOP)")


def test_a_stopped_idle_rank_is_ended():
    """Closing a team does not wait for a rank that cannot hear it."""
    team = light()
    team.call("echo", 1, world=2)
    os.kill(team.pids[1], signal.SIGSTOP)
    team.close()


def test_what_a_rank_has_started_ends_with_it(tmp_path):
    """A process that a rank had started before it was killed is in its session, and goes too."""
    written = tmp_path / "child"
    failed(light(), "leave_a_child", str(written))
    assert everything_gone([int(written.read_text(encoding="utf-8"))])


def test_an_interrupted_call_ends_the_team():
    """Ctrl-C while ranks work ends them, and is passed on."""
    team = light(limit=60)

    def interrupt(_text):
        raise KeyboardInterrupt

    team.call("echo", 1, world=2)
    team.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        team.call("slow", 1, 600, world=2)
    assert not team.alive
    team.close()


# --- the parent ------------------------------------------------------------------------------------

_PARENT = f"""
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from harness.engines.ranks.spawned import SpawnedTeam

def work():
    team = SpawnedTeam(3, threads=1, server="{_BREAKING}:Light")
    team.timeout = 600
    team.call("echo", 1, world=3)
    print(team._directory, *team.pids, flush=True)
    os.kill(team.pids[2], signal.SIGSTOP)
    team.call("hang_in_c", 1, world=3)

HERE
"""
_HERE = {"main thread": "work()", "other thread": "threading.Thread(target=work).start()\ntime.sleep(600)"}


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("main thread", signal.SIGINT),
        ("main thread", signal.SIGKILL),
        ("main thread", signal.SIGTERM),
        ("other thread", signal.SIGKILL),
    ],
)
def test_no_rank_outlives_the_parent(where, number):
    """A parent that is interrupted or killed takes a stopped rank and one that hangs in C with it."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT.replace("HERE", _HERE[where])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        directory, *pids = parent.stdout.readline().split()
        seen = Seen(map(int, pids), directory)
        WatchedTeam.made.append(seen)
        assert len(seen._left()) >= len(pids)
        try:
            parent.send_signal(number)
            parent.wait(60)
        finally:
            parent.kill()
            parent.wait()
    try:
        assert everything_gone(seen.pids)
    finally:
        seen.kill()
    if number != signal.SIGINT:
        # Nobody is left to remove the directory of a parent that was killed.
        shutil.rmtree(directory)


# --- real ranks ------------------------------------------------------------------------------------


def spec(hook, what="tp:size=2"):
    """A candidate whose rank 1 breaks in a forward."""
    return f"{what},dtype=float32,threads=1,timeout=5,prepare={_BREAKING}:{hook}"


def test_an_exception_in_a_rank_is_shown_by_the_command(monkeypatch, capsys):
    """`harness check` ends with exit code 4, and shows the rank and its own traceback."""
    ended = runner(monkeypatch, capsys)("check", _GOLDEN, "--quick", "-c", spec("raising"))
    assert ended.code == 4
    assert f"rank 1 of {spec('raising')}: ArithmeticError: rank 1 alone is broken" in ended.out
    assert "in break_it" in ended.out
    assert WatchedTeam.made[0].sockets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "what", "message"),
    [
        ("killing", "tp:size=2", "was killed by SIGKILL"),
        ("hanging", "pp:stages=2", "got nowhere for 5 s after "),
    ],
)
def test_a_rank_that_is_gone_or_hangs_is_named_and_not_one_that_waits_in_a_collective(hook, what, message):
    """A rank that dies or hangs in a forward gives the status error, in which it is named."""
    verdict = harness.check(_GOLDEN, spec(hook, what), quick=True)
    assert verdict.status is Status.ERROR
    assert f"rank 1 of {spec(hook, what)}: {message}" in verdict.findings[0].message


def test_engines_of_a_spec_have_the_limit_that_it_names():
    """timeout=SECONDS is the engine's limit of silence."""
    WatchedTeam.made.append(Seen([], "/nothing/at/all"))
    assert build_engine("tp:size=2,timeout=7.5").options.timeout == 7.5
    assert build_engine("tp:size=2").options.timeout == 60.0
