"""Who failed, from what every rank showed."""

from __future__ import annotations

import pytest

from harness.engines.ranks.failure import Failure, error_of, killed, raised, waits_in
from harness.errors import EngineError, UsageError

_GLOO = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3121"


def _echo(rank, message=_GLOO):
    return Failure(rank=rank, kind="RuntimeError", message=message, trace="in all_reduce")


def test_a_rank_that_only_complains_of_another_is_not_the_one():
    """The rank that died is named, whatever its neighbours say before it."""
    error = error_of("tp:size=4", [_echo(0), _echo(3), killed(2, -9, ""), _echo(1)])
    assert error.problem.startswith("rank 2 of tp:size=4: was killed by SIGKILL")
    assert isinstance(error, EngineError)


@pytest.mark.parametrize(
    "message",
    [
        _GLOO,
        "Timed out waiting 1800000ms for recv operation to complete",
        "[Rank 1] NCCL communicator was aborted on rank 1",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely",
        "[Errno 32] Broken pipe",
        "Connection reset by peer",
    ],
)
def test_what_libraries_say_of_a_lost_peer_is_an_echo(message):
    """gloo's, NCCL's and the system's words for a peer that has gone, also where a loader has wrapped them."""
    assert _echo(0, message).is_echo
    assert raised(0, UsageError(f"the model cannot be loaded ({message})", fix="Look")).is_echo
    assert not _echo(0, "mat1 and mat2 shapes cannot be multiplied").is_echo


def test_of_echoes_alone_the_first_is_told_with_the_others():
    """Where every rank complains of another one, none is passed over."""
    error = error_of("pp:stages=3", [_echo(1), _echo(0), _echo(2)])
    assert error.problem.startswith("rank 1 (and ranks 0, 2) of pp:stages=3: RuntimeError: ")
    assert error.details == "in all_reduce"


def test_ranks_that_fail_alike_are_told_together():
    """A bug that every rank has names them all, with one traceback."""
    both = [Failure(rank=rank, kind="ValueError", message="no", trace=f"trace {rank}") for rank in (0, 1)]
    error = error_of("tp:size=2", both)
    assert error.problem == "rank 0 (and rank 1) of tp:size=2: ValueError: no"
    assert error.fix == "Its own traceback says where"
    assert error.details == "trace 0"


def test_a_long_message_is_cut():
    """A message of a megabyte is no line."""
    assert len(error_of("tp", [Failure(rank=0, message="x" * 10**6)]).problem) < 500


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-9, "was killed by SIGKILL, as the kernel does to a process when memory runs out"),
        (-11, "was killed by SIGSEGV"),
        (-7, "was killed by SIGBUS"),
        (-250, "was killed by signal 250"),
    ],
)
def test_how_a_process_ended_is_told_in_words(code, message):
    """Exit codes and signals, those too that have no name."""
    found = killed(1, code, "last lines")
    assert (found.message, found.trace, found.kind) == (message, "last lines", "")
    assert found.fix
    assert not found.is_echo


def test_what_was_raised_keeps_its_traceback():
    """Any exception comes with its class and where it was raised; an error of this package as its author wrote it."""
    try:
        raise ZeroDivisionError("first line\nsecond line")
    except ZeroDivisionError as error:
        found = raised(2, error)
    assert (found.rank, found.kind, found.message) == (2, "ZeroDivisionError", "first line")
    assert "test_what_was_raised" in found.trace
    assert "second line" in found.trace
    known = raised(1, UsageError("7 heads cannot be divided", fix="Choose another number"))
    assert (known.kind, known.message, known.fix) == ("", "7 heads cannot be divided", "Choose another number")
    assert raised(0, MemoryError()).message == "no message"
    assert raised(0, SystemExit(3)).message == "3"


def _stack(*frames):
    lines = [f'  File "{file}", line 12 in {function}' for file, function in frames]
    return "\n".join(["Current thread 0x00007f0000000740 (most recent call first):", *lines, ""])


_TORCH = "/venv/lib/python3.11/site-packages/torch"
_LAYER = (f"{_TORCH}/nn/modules/module.py", "_call_impl")


@pytest.mark.parametrize(
    ("frames", "waiting"),
    [
        ([(f"{_TORCH}/distributed/distributed_c10d.py", "all_reduce"), _LAYER], "all_reduce"),
        (
            [(f"{_TORCH}/_ops.py", "__call__"), (f"{_TORCH}/distributed/_functional_collectives.py", "wait_tensor")],
            "wait_tensor",
        ),
        ([("/src/engines/ranks/groups.py", "receive"), ("/src/engines/ranks/rank.py", "_step")], "receive"),
        ([("/my/port.py", "all_reduce"), _LAYER], ""),
        ([("/my/broadcast/model.py", "forward"), _LAYER, _LAYER], ""),
        (
            [
                ("/my/port.py", "stuck"),
                *[_LAYER] * 3,
                (f"{_TORCH}/distributed/distributed_c10d.py", "all_reduce"),
            ],
            "",
        ),
        ([(f"{_TORCH}/distributed/tensor/_dispatch.py", "dispatch"), _LAYER], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_waiting_is_told_from_working_by_the_innermost_frames(frames, waiting):
    """A rank waits in a collective or on a link; a function of such a name, or one far outside, is no wait."""
    assert waits_in(f"a line of a log\n{_stack(*frames)}") == waiting
