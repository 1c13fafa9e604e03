"""The process of a rank: its pulses, its last words, its end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness.engines.ranks import worker
from harness.engines.ranks.wire import Wire

ROOT = Path(__file__).parents[3]


@pytest.fixture
def started():
    """A function that starts a light rank: (its process, our end of the wire, our end of the lifeline)."""
    ends = []

    def start():
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", worker.__name__),
                *map(str, (theirs.fileno(), read, 3)),
                "tests.engines.ranks.breaking:Light",
            ],
            cwd=ROOT,
            pass_fds=(theirs.fileno(), read),
        )
        theirs.close()
        os.close(read)
        ends.append((process, ours))
        return process, Wire(ours), write

    yield start
    for process, ours in ends:
        process.kill()
        process.wait()
        ours.close()


def test_a_rank_answers_until_nothing_more_will_come(started):
    """A rank says that it is ready, answers, and ends by itself when its wire is closed."""
    process, wire, lifeline = started()
    assert wire.receive() == ("ready", None)
    wire.send(("echo", (0, "hello")))
    heard = [wire.receive(), wire.receive()]
    assert heard == [("pulse", "model.layers.0"), ("done", (3, ["hello"]))]
    wire.finish()
    assert process.wait(60) == 0
    os.close(lifeline)


def test_a_rank_that_failed_stays_until_it_is_ended(started):
    """The connections of a rank that failed stay open, so that the others do not complain before it is heard."""
    process, wire, lifeline = started()
    wire.receive()
    wire.send(("no such request", (3,)))
    wire.receive()
    kind, failure = wire.receive()
    assert (kind, failure.rank, failure.kind) == ("failed", 3, "AttributeError")
    assert process.poll() is None
    wire.finish()
    assert process.wait(60) == 0
    os.close(lifeline)


def test_a_rank_ends_with_its_lifeline(started):
    """A rank that is in the middle of something ends when the process that holds its lifeline does."""
    process, wire, lifeline = started()
    wire.receive()
    wire.send(("slow", (3, 600)))
    wire.receive()
    os.close(lifeline)
    assert process.wait(60) == 1


def test_pulses_are_spaced(monkeypatch):
    """Not every block is told."""
    now = [100.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    told = []
    pulse = worker.Pulse(told.append)
    for step in range(10):
        now[0] = 100 + step * 0.06
        pulse(f"h.{step}")
    assert told == [("pulse", f"h.{step}") for step in (0, 4, 8)]
