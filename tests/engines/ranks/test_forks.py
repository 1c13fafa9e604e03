"""Workers that start anew: each life is a process of its own, and whatever happens to one happens to the worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness.engines.ranks import forks, spawned
from harness.engines.ranks.worker import RENEW
from harness.errors import EngineError
from tests.engines.ranks.leftovers import WatchedTeam, everything_gone

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for what is left in Linux' /proc")


@pytest.fixture
def team():
    """A team of one worker that can start anew; nothing of it is left afterwards."""
    WatchedTeam.made.clear()
    found = WatchedTeam(1, threads=1, server="tests.engines.ranks.breaking:Renewing")
    found.spec, found.timeout = "hf", 2.0
    yield found
    found.close()
    assert [seen.left() for seen in WatchedTeam.made] == [[]] * len(WatchedTeam.made)


def told(team):
    """What the worker tells of itself."""
    return team.call("tell", world=1)[0]


def test_a_life_ends_with_what_it_had_and_the_next_begins_from_what_was_prepared(team):
    """Another process without what the last one kept, prepared once, and with memory at another place."""
    first, again = told(team), told(team)
    assert (again["pid"], again["lives"]) == (first["pid"], 2)
    assert team.renews
    lives = [first]
    for _ in range(4):
        team.call(RENEW, world=1)
        lives.append(told(team))
    assert len({one["pid"] for one in lives} | set(team.pids)) == 6
    assert {(one["prepared"], one["lives"]) for one in lives} == {(1, 1)}
    assert len({one["address"] for one in lives}) > 1
    assert "closed" in (team._directory / "rank-0.log").read_text()


def test_a_worker_that_prepares_nothing_is_not_asked_to_start_anew():
    """Its team says so, and a new one takes its place."""
    found = WatchedTeam(1, threads=1, server="tests.engines.ranks.breaking:Light")
    found.spec = "hf"
    found.call("echo", 0, world=1)
    assert not found.renews
    found.close()
    assert not found.renews


@pytest.mark.parametrize(
    ("request_", "message"),
    [("fail", "ArithmeticError: so not"), ("kill", "SIGKILL"), ("exit_at_once", "ended with exit code 9")],
)
def test_what_ends_a_life_ends_the_worker(team, request_, message):
    """In the words of a worker with one life, also after others."""
    team.call(RENEW, world=1)
    arguments = {"fail": ["so not"], "exit_at_once": [9]}.get(request_, [])
    with pytest.raises(EngineError, match=message):
        team.call(request_, 0, *arguments, world=1)
    assert not team.alive


def test_a_life_that_hangs_is_told_from_its_own_stack(team):
    """Who asks the worker what it does is told what the life does."""
    with pytest.raises(EngineError) as caught:
        team.call("sleep", 0, world=1)
    assert "in sleep" in caught.value.details


def test_a_life_that_is_stopped_is_told_as_a_worker_that_is(team):
    """Not as one that computes and gets nowhere."""
    with pytest.raises(EngineError, match=r"is stopped \(SIGSTOP\)"):
        team.call("stop", 0, world=1)


def test_where_the_system_refuses_a_file_for_a_process_lives_follow_each_other_too(monkeypatch):
    """An old kernel, or a sandbox, has no pidfd_open: the keeper looks from time to time."""
    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    assert forks._watched(os.getpid()) is None
    child = os.fork()
    if not child:
        os._exit(forks.RENEWED)
    reading, writing = os.pipe()
    assert forks._ended(child, reading) == forks.RENEWED
    os.close(reading)
    os.close(writing)


def refuse(_pid):
    """As a kernel without the call."""
    raise OSError(38, "Function not implemented")


def test_a_life_ends_with_the_worker_and_with_its_parent(team):
    """Whether the process that forks is killed, or the pipe that it watches closes."""
    pid = told(team)["pid"]
    os.kill(team.pids[0], signal.SIGKILL)
    assert everything_gone([pid])
    other = spawned.SpawnedTeam(1, threads=1, server="tests.engines.ranks.breaking:Renewing")
    other.spec = "hf"
    life, worker = told(other)["pid"], other.pids[0]
    os.close(other._ranks[0].lifeline)
    assert everything_gone([life, worker])
    other._ranks[0].lifeline = os.open(os.devnull, os.O_RDONLY)
    other.close()
