"""Ranks that an outer launcher started: who is who, what is told when one fails, and how all end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from harness import cli
from harness.engines import build_engine
from harness.engines.ranks import outer
from harness.engines.ranks.outer import Followed, Outer, OuterTeam, launched
from harness.errors import EngineError, UsageError

ROOT = Path(__file__).parents[3]
_GOLDEN = "golden/llama-tiny/headline"
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    """These tests are not ranks themselves, and number their requests from 1."""
    for name in (*_LAUNCHERS, *(name for names in outer._NAMES for name in names)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(outer._Requests, "number", 0)
    monkeypatch.setattr(outer._Requests, "lost", None)
    monkeypatch.setattr(outer._Requests, "_ending", False)


# --- who is who ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Outer(rank=1, world=4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "x", "WORLD_SIZE": "4"}, None),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, Outer(rank=3, world=4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Outer(rank=1, world=2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Outer(rank=1, world=2)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            Outer(rank=0, world=2),
        ),
    ],
)
def test_launchers_are_told_by_their_environment(environment, found):
    """Torchrun, deepspeed, Slurm's steps (a batch script is none), Open MPI and PMI; one process alone is no launch."""
    assert launched(environment) == found


def test_a_rank_that_cannot_be_is_refused():
    """A rank that was inherited from another launch is an error, with the variable to unset."""
    with pytest.raises(UsageError, match=r"RANK=5 is no rank of WORLD_SIZE=2\. Unset RANK"):
        launched({"RANK": "5", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_without_other_ranks_nothing_is_followed(monkeypatch, environment):
    """No launcher, or one that started a single process, changes nothing."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outer.follow()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_launch_without_an_address_says_what_to_export(monkeypatch, rank):
    """Slurm gives no address: every rank says how to give one."""
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError, match=f"rank {rank} of 2 was launched.* Export MASTER_ADDR .* and MASTER_PORT"):
        outer.follow()


def test_an_address_that_cannot_be_is_told_in_one_line(monkeypatch):
    """A port that is none is the user's error, with what to check."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"rank 0 of 2 cannot meet the others at 127\.0\.0\.1:port"):
        outer.follow()


def test_the_number_of_ranks_may_be_left_to_the_launcher(monkeypatch):
    """Under a launcher a SPEC without a size takes all ranks, and without a launcher it is an error."""
    with pytest.raises(UsageError, match="names no size"):
        build_engine("tp:dtype=float32")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert build_engine("tp:dtype=float32").options.layout.tensor == 4
    assert build_engine("tp:stages=2").options.layout.tensor == 2


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "met"), [("check", True), ("run", True), ("record", True), ("--help", False), ("lint", False)]
)
def test_only_commands_that_open_engines_meet(monkeypatch, command, met):
    """Of several launched ranks only rank 0 sees the command line, without what deepspeed adds to it."""
    meetings = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(outer, "follow", lambda: meetings.append(1))
    monkeypatch.setattr(sys, "argv", ["harness", command, "--local_rank=0", "--quick"])
    given = cli._arguments()
    assert bool(meetings) is met
    assert given == [command, "--quick"] if met else [command, "--local_rank=0", "--quick"]


# --- requests and answers --------------------------------------------------------------------------


class Recorded:
    """A server that answers, or raises what it is given."""

    def __init__(self, rank, error=None):
        self.rank, self.error, self.closed = rank, error, 0

    def answer(self, request, *arguments):
        """Its rank and what it was asked."""
        if self.error is not None and request != "close":
            raise self.error
        return (self.rank, request, *arguments)

    def close(self):
        """Leave the groups."""
        self.closed += 1


def team_of(monkeypatch, errors, following=None):
    """(rank 0's team, the servers, the threads of the others) of ranks that raise ``errors``; None answers."""
    store = HashStore()
    servers = [Recorded(rank, error) for rank, error in enumerate(errors)]
    monkeypatch.setattr(outer, "_store", lambda _rank, _world: store)
    monkeypatch.setattr(outer, "Server", lambda rank, _store, _pulse: servers[rank])
    ended = []
    monkeypatch.setattr(outer.atexit, "register", ended.append)
    outer._Requests.end_at_exit(store, len(errors))
    team = OuterTeam(Outer(rank=0, world=len(errors)))
    team.spec = "tp:size=9"
    threads = [
        threading.Thread(target=outer._do_as_asked, args=(store, rank, servers[rank]))
        for rank in range(1, len(errors))
        if following is None or rank in following
    ]
    for thread in threads:
        thread.start()

    def end():
        (tell,) = ended
        tell()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)

    return team, servers, end


def test_every_rank_answers_and_ends_when_rank_0_does(monkeypatch):
    """Answers come in the order of the ranks, and at the end of rank 0 the others are told to end."""
    team, _, end = team_of(monkeypatch, [None, None, None])
    for request in ("open", "run", "close"):
        assert team.call(request, "work", world=3) == [(rank, request, "work") for rank in range(3)]
    end()


def test_the_rank_that_failed_is_named_and_leaves(monkeypatch):
    """Rank 1's own exception is told, not what others say of it; it leaves its groups, and can be asked again."""
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    team, servers, end = team_of(monkeypatch, [lost, ArithmeticError("so not"), lost])
    with pytest.raises(EngineError) as caught:
        team.call("run", world=3)
    assert caught.value.problem == "rank 1 of tp:size=9: ArithmeticError: so not"
    assert "in answer" in caught.value.details
    assert team.call("close", world=3) == []
    servers[0].error = servers[1].error = servers[2].error = None
    again = OuterTeam(Outer(rank=0, world=3))
    assert len(again.call("open", world=3)) == 3
    end()
    assert [server.closed for server in servers] == [1, 1, 1]


def test_a_rank_that_does_not_answer_is_named_and_not_asked_again(monkeypatch):
    """A rank that hangs or is gone is told by its silence, and whatever follows fails at once."""
    monkeypatch.setattr(outer, "_GRACE", 0.2)
    echo = RuntimeError("Timed out waiting 1000ms for recv operation to complete")
    team, _, end = team_of(monkeypatch, [echo, None, None], following={1})
    with pytest.raises(EngineError, match="rank 2 of tp:size=9: did not answer"):
        team.call("run", world=3)
    again = OuterTeam(Outer(rank=0, world=3))
    again.spec = "tp:size=8"
    with pytest.raises(EngineError, match="rank 2 of tp:size=8: did not answer"):
        again.call("open", world=3, loading=True)
    end()


def test_a_rank_that_hangs_does_not_hide_what_another_one_says(monkeypatch):
    """An exception of one rank comes before the silence of those that wait for it."""
    monkeypatch.setattr(outer, "_GRACE", 0.2)
    team, _, end = team_of(monkeypatch, [None, None, ArithmeticError("so not")], following={2})
    team.timeout = 0.5
    with pytest.raises(EngineError, match=r"rank 2 \(and rank 1\) of tp:size=9: ArithmeticError: so not"):
        team.call("run", world=3)
    end()


def test_a_rank_that_has_lost_rank_0_says_so():
    """Where rank 0 has ended without a word, the others end with an error."""

    class Gone:
        def wait(self, keys, patience):
            assert keys == ["1/request"]
            assert patience > timedelta(hours=1)
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(EngineError, match="rank 3 lost rank 0"):
        outer._do_as_asked(Gone(), 3, Recorded(3))


def test_a_follower_ends_without_a_verdict(monkeypatch):
    """A rank that has followed to the end is ended, whatever it was about to do."""
    store = HashStore()
    outer._put(store, "1/request", ("end", ()))
    monkeypatch.setattr(outer, "_store", lambda _rank, _world: store)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Followed) as ended:
        outer.follow()
    assert ended.value.code == 0
    assert store.add("ended", 0) == 1


def test_rank_0_is_ended_when_it_hangs(monkeypatch, capfd):
    """Nobody else can tell of rank 0: its own watch ends it with the exit code of an engine, and not one that beats."""
    codes = []
    hanging = threading.Event()

    def end(code):
        codes.append(code)
        hanging.set()

    monkeypatch.setattr(outer.os, "_exit", end)
    watch = outer._Watch()
    with watch.over(1.0, "tp:size=2"):
        for _ in range(15):
            time.sleep(0.1)
            watch.beat()
    assert codes == []
    with watch.over(0.3, "tp:size=2"):
        assert hanging.wait(60)
    assert set(codes) == {4}
    shown = capfd.readouterr().err
    assert "error: rank 0 of tp:size=2: got nowhere for 0.3 s" in shown
    assert "test_rank_0_is_ended_when_it_hangs" in shown


# --- real launches ---------------------------------------------------------------------------------


def _environment():
    kept = {key: value for key, value in os.environ.items() if key not in _LAUNCHERS}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.slow
def test_torchrun_gives_one_report():
    """Launched by torchrun, the ranks join, one of them reports, and all end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    harness = ["-m", "harness", "check", _GOLDEN, "--quick", "-c", "tp:size=2,dtype=float32,threads=1"]
    done = subprocess.run(
        [*command, *harness], cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("against llama-tiny/headline") == 1
    assert done.stdout.startswith("identical: tp:size=2,dtype=float32,threads=1 against llama-tiny/headline: ")
    assert done.stderr == ""


@pytest.mark.slow
def test_a_rank_that_fails_under_mpi_is_named_by_rank_0():
    """Launched as by mpirun, rank 0 shows the traceback of rank 1 and ends with 4, and rank 1 follows it to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = "pp:stages=2,dtype=float32,threads=1,timeout=60,prepare=tests.engines.ranks.breaking:raising"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "harness", "check", _GOLDEN, "--quick", "-c", spec, f"--local_rank={rank}"],
            cwd=ROOT,
            env={
                **_environment(),
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        shown = [rank.communicate(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [4, 0], shown
    assert f"rank 1 of {spec}: ArithmeticError: rank 1 alone is broken" in shown[0][0]
    assert "in break_it" in shown[0][0]
    assert shown[1] == ("", "")
