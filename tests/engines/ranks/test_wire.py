"""Values over a socket: whole, in order, and without waiting at the end that watches."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.ranks.wire import Wire, _packed


def pair():
    """(the end that watches, the socket of the other one)."""
    ours, theirs = socket.socketpair()
    wire = Wire(ours)
    wire.watch()
    return wire, theirs


def exchanged(wire, times=50):
    """All that comes in so many exchanges."""
    return [value for _ in range(times) for value in wire.exchange()]


@given(values=st.lists(st.one_of(st.integers(), st.text(), st.binary(max_size=200))), piece=st.integers(1, 60))
def test_values_come_whole_whatever_pieces_they_are_sent_in(values, piece):
    """Any values, cut anywhere, are the same values in the same order."""
    wire, theirs = pair()
    with theirs:
        data, found = b"".join(map(_packed, values)), []
        for start in range(0, len(data), piece):
            theirs.sendall(data[start : start + piece])
            found += wire.exchange()
    wire.close()
    assert found == values


def test_half_a_value_is_none_and_does_not_block():
    """Nothing is shown, and nothing waited for, before a value is whole."""
    wire, theirs = pair()
    with theirs:
        data = _packed("whole")
        theirs.sendall(data[:-1])
        assert exchanged(wire) == []
        assert not wire.ended
        theirs.sendall(data[-1:])
        assert exchanged(wire) == ["whole"]
    wire.close()


def test_what_nobody_reads_does_not_block():
    """A value larger than the socket's buffer is begun, goes on when the other end reads, and waits until then."""
    wire, theirs = pair()
    with theirs:
        large = bytes(2**22)
        wire.put(large)
        wire.put("next")
        assert exchanged(wire) == []
        assert wire.wants_to_write
        got = bytearray()
        while wire.wants_to_write:
            got += theirs.recv(2**20)
            wire.exchange()
        while len(got) < len(_packed(large)) + len(_packed("next")):
            got += theirs.recv(2**20)
        assert bytes(got) == _packed(large) + _packed("next")
    wire.close()


def test_what_was_sent_before_the_end_is_still_heard():
    """The last words of a process that has ended are read, also by an end that has more to send."""
    wire, theirs = pair()
    theirs.sendall(_packed("last"))
    theirs.close()
    wire.put("too late")
    assert exchanged(wire) == ["last"]
    assert wire.ended
    assert not wire.wants_to_write
    wire.finish()
    wire.close()


def test_the_waiting_end_gets_one_value_at_a_time_and_then_the_end():
    """`receive` waits for whole values, and raises when no more can come."""
    wire, theirs = pair()
    waiting = Wire(theirs)
    wire.put(1)
    wire.put([2])
    assert exchanged(wire) == []
    assert (waiting.receive(), waiting.receive()) == (1, [2])
    waiting.send("answer")
    assert exchanged(wire) == ["answer"]
    wire.finish()
    with pytest.raises(EOFError):
        waiting.receive()
    waiting.close()
    wire.close()


def test_a_value_that_cannot_be_packed_leaves_the_wire_clean():
    """Nothing of a value that cannot be pickled is sent."""
    wire, theirs = pair()
    waiting = Wire(theirs)
    with pytest.raises((TypeError, AttributeError)):
        waiting.send(lambda: None)
    waiting.send("clean")
    assert exchanged(wire) == ["clean"]
    waiting.close()
    wire.close()
