"""Ranks that an outer launcher started: who is who, what is told when one fails, and how all end."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

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
    monkeypatch.setattr(outer.atexit, "register", lambda *_: None)
    forget = outer._store.cache_clear  # whatever a test puts in its place
    forget()
    yield
    forget()


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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("command", "met"), [("check", True), ("run", True), ("record", True), ("--help", False), ("lint", False)]
)
def test_only_commands_that_open_engines_have_ranks(monkeypatch, command, met, rank):
    """Ranks other than 0 follow; rank 0 goes on with its command line, without what deepspeed adds to it."""
    followed = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(outer, "follow", lambda: followed.append(1))
    with cli._as_rank([command, "--local_rank=0", "--quick"]) as given:
        assert given == ([command, "--quick"] if met else [command, "--local_rank=0", "--quick"])
    assert bool(followed) is (met and rank == 1)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def address(monkeypatch):
    """Names a place where ranks can meet, and rank 0 of 2 as this process."""
    port = free_port()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    return port


def test_rank_0_does_not_wait_for_ranks_that_it_does_not_need(monkeypatch, address):
    """A command without a SPEC of several ranks runs alone in a pod that only inherited RANK and WORLD_SIZE."""
    monkeypatch.setattr(outer, "_GRACE", 1.0)
    begun = time.monotonic()
    with cli._as_rank(["check", "--quick"]) as given:
        assert given == ["check", "--quick"]
        inside = time.monotonic()
    assert inside - begun < 30
    assert time.monotonic() - inside < 30


def test_rank_0_runs_where_nobody_can_meet(monkeypatch, address):
    """A port that another program has is no error before others are needed, and then one line."""
    monkeypatch.setattr(outer, "_GRACE", 1.0)
    with socket.socket() as taken:
        taken.bind(("", address))
        taken.listen()
        with cli._as_rank(["check"]) as given:
            assert given == ["check"]
            with pytest.raises(UsageError, match=f"rank 0 of 2 cannot meet the others at 127.0.0.1:{address}"):
                outer.follow()


def test_rank_0_says_how_many_came(monkeypatch, address):
    """Where it needs the others, rank 0 waits for them for as long as is said."""
    monkeypatch.setattr(outer, "_ARRIVAL", timedelta(seconds=0.3))
    with pytest.raises(UsageError, match=f"1 of 2 ranks came to 127.0.0.1:{address} in 0.3 s"):
        outer.follow()


_FOLLOWER = "from harness.cli import main; import sys; sys.argv = ['harness', 'check']; main()"


def test_a_rank_that_waits_says_so_and_ends_with_rank_0(address):
    """A follower tells whom it waits for, and ends when rank 0 does, where it was not needed either."""
    follower = subprocess.Popen(
        [sys.executable, "-c", _FOLLOWER],
        cwd=ROOT,
        env={**_environment(), "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(address)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with cli._as_rank(["check"]):
            assert outer._gather(outer._store(0, 2), 2, 60) == 2
        shown = follower.communicate(timeout=60)
    finally:
        follower.kill()
    assert shown == ("", f"rank 1 of 2 follows rank 0 at 127.0.0.1:{address} ...\n")
    assert follower.returncode == 0


@pytest.mark.parametrize(
    ("device", "tensor", "seen", "refused"),
    [
        ("cpu", 2, "cuda", True),
        (None, 2, "cuda", True),
        ("cpu", 1, "cuda", False),
        ("cuda", 2, "cuda", False),
        ("cpu", 2, "cpu", False),
    ],
)
def test_shards_on_the_cpu_need_ranks_that_see_no_other_device(monkeypatch, device, tensor, seen, refused):
    """Layers are cut on what torch sees: a launcher must start ranks that see nothing, and is told how."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device(seen))
    if not refused:
        outer.refuse_accelerator(device, tensor)
        return
    with pytest.raises(UsageError, match=r"device=cpu with 2 shards .* see cuda\. .*CUDA_VISIBLE_DEVICES= torchrun"):
        outer.refuse_accelerator(device, tensor)


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
    monkeypatch.setattr(outer.atexit, "register", lambda end, *given: ended.append(lambda: end(*given)))
    outer._Requests.end_at_exit(store, len(errors))
    team = OuterTeam(Outer(rank=0, world=len(errors)))
    team.spec = "tp:size=9"
    threads = [
        # A failing test leaves them waiting: they must not keep the process that tests.
        threading.Thread(target=outer._do_as_asked, args=(store, rank, servers[rank]), daemon=True)
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
    assert not team.alive
    with pytest.raises(EngineError, match="a rank of tp:size=9 has failed"):
        team.call("run", world=3)
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


def test_nothing_is_left_of_what_was_said(monkeypatch):
    """Requests and answers are removed from the store when they have been read; only counts and the end stay."""
    team, _, end = team_of(monkeypatch, [None, None, None])
    before = team._shared.num_keys()
    for _ in range(2):
        assert len(team.call("run", bytes(2 * outer._PIECE + 1), world=3)) == 3
    assert team._shared.num_keys() == before
    end()


@pytest.fixture
def far():
    """Two ends of a store between processes, as the ranks have it."""
    near = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
    other = TCPStore("127.0.0.1", near.port, 2, False, timedelta(seconds=60), wait_for_workers=False)
    return PrefixStore("ranks", near), PrefixStore("ranks", other)


def test_values_of_any_size_go_through_the_store(far):
    """20 MB, more than torch's store takes at once, arrive whole; so does what fills its pieces, and nothing."""
    near, other = far
    large = os.urandom(2 * 10**7)
    before = near.num_keys()
    for data in (large, large[: 2 * outer._PIECE], b""):
        outer._put(near, "1/request", data)
        assert outer._got(other, "1/request") == data
        outer._delete(other, "1/request")
        assert near.num_keys() == before


def test_a_follower_answers_with_more_than_the_store_takes_at_once(monkeypatch, far):
    """A request and an answer of 20 MB each, over the store of a launch."""
    near, other = far
    monkeypatch.setattr(outer, "_store", lambda _rank, _world: near)
    monkeypatch.setattr(outer, "Server", lambda rank, _store, _pulse: Recorded(rank))
    team = OuterTeam(Outer(rank=0, world=2))
    follower = threading.Thread(target=outer._do_as_asked, args=(other, 1, Recorded(1)), daemon=True)
    follower.start()
    large = bytes(2 * 10**7)
    assert team.call("run", large, world=2) == [(0, "run", large), (1, "run", large)]
    outer._Requests.end(near, 2)
    follower.join(60)
    assert not follower.is_alive()


class Lost:
    """A store that has gone after so many uses."""

    def __init__(self, uses):
        self.uses = uses

    def __getattr__(self, _name):
        def use(*_arguments):
            self.uses -= 1
            if self.uses < 0:
                raise RuntimeError("Connection reset by peer\nException raised from somewhere")
            return True

        return use


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        (0, "rank 0 of tp:size=9: cannot reach the store of the ranks (Connection reset by peer)"),
        (2, "rank 1 of tp:size=9: did not answer (Connection reset by peer)"),
        (3, "rank 1 of tp:size=9: did not answer (Connection reset by peer)"),
    ],
)
def test_a_store_that_is_lost_is_told_in_one_line(monkeypatch, uses, message):
    """What the store complains of when written or read is told as any other failure, and nobody is asked again."""
    monkeypatch.setattr(outer, "_store", lambda _rank, _world: Lost(uses))
    monkeypatch.setattr(outer, "Server", lambda rank, _store, _pulse: Recorded(rank))
    for _ in range(2):
        team = OuterTeam(Outer(rank=0, world=2))
        team.spec = "tp:size=9"
        with pytest.raises(EngineError) as caught:
            team.call("run", world=2)
        assert caught.value.problem == message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupted_rank_0_does_not_wait(monkeypatch, error):
    """Ctrl-C and an exit on rank 0 are passed on at once; the team is left, and closing it asks nobody."""
    # Rank 1 never answers: whoever waits for it waits two minutes.
    team, servers, end = team_of(monkeypatch, [error, None], following=set())
    team.timeout = 120
    begun = time.monotonic()
    with pytest.raises(type(error)):
        team.call("run", world=2)
    assert not team.alive
    assert time.monotonic() - begun < 60
    assert servers[0].closed == 1
    monkeypatch.setattr(outer, "_GRACE", 0.1)
    end()


def test_rank_0_is_interrupted_while_it_waits_for_answers(monkeypatch):
    """Ctrl-C is heard while the others work."""
    team, servers, end = team_of(monkeypatch, [None, None], following=set())
    team.timeout = 120
    monkeypatch.setattr(outer, "_GRACE", 0.1)

    def interrupt(_seconds):
        monkeypatch.setattr(outer.time, "sleep", sleep)
        raise KeyboardInterrupt

    sleep = time.sleep
    monkeypatch.setattr(outer.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        team.call("run", world=2)
    assert not team.alive
    assert servers[0].closed == 1
    end()


def test_a_follower_that_is_told_to_exit_says_so_and_follows_on(monkeypatch):
    """sys.exit in a hook of rank 1 is its failure, told as any other, and no end without a word."""
    team, servers, end = team_of(monkeypatch, [None, SystemExit(3)])
    with pytest.raises(EngineError, match="rank 1 of tp:size=9: SystemExit: 3"):
        team.call("open", world=2)
    servers[1].error = None
    assert len(OuterTeam(Outer(rank=0, world=2)).call("open", world=2)) == 2
    end()


def test_what_cannot_be_sent_is_told_and_does_not_confuse_the_ranks(monkeypatch):
    """An answer that cannot be pickled is that rank's failure; such a request is raised before anyone is asked."""
    team, servers, end = team_of(monkeypatch, [None, None])
    with pytest.raises(TypeError, match="cannot pickle"):
        team.call("run", threading.Lock(), world=2)
    assert outer._Requests.number == 0
    servers[1].rank = threading.Lock()
    with pytest.raises(EngineError, match="rank 1 of tp:size=9: TypeError: cannot pickle"):
        team.call("run", world=2)
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
    outer._put(store, "1/request", pickle.dumps(("end", ())))
    monkeypatch.setattr(outer, "_store", lambda _rank, _world: store)
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Followed) as ended:
        outer.follow()
    assert ended.value.code == 0
    assert (store.add("here", 0), store.add("ended", 0)) == (1, 1)


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
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", "2"]
    harness = ["-m", "harness", "check", _GOLDEN, "--quick", "-c", "tp:size=2,dtype=float32,threads=1"]
    done = subprocess.run(
        [*command, *harness], cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("against llama-tiny/headline") == 1
    assert done.stdout.startswith("identical: tp:size=2,dtype=float32,threads=1 against llama-tiny/headline: ")
    assert re.fullmatch(r"rank 1 of 2 follows rank 0 at \S+:\d+ \.\.\.\n", done.stderr)


@pytest.mark.slow
def test_a_rank_that_fails_under_mpi_is_named_by_rank_0():
    """Launched as by mpirun, rank 0 shows the traceback of rank 1 and ends with 4, and rank 1 follows it to the end."""
    port = free_port()
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
    assert shown[1] == ("", f"rank 1 of 2 follows rank 0 at 127.0.0.1:{port} ...\n")
