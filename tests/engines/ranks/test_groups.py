"""The link between stages: what is sent arrives, in order, and all stages hear the last one."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from harness.engines.ranks.groups import Groups
from harness.engines.ranks.layout import Layout


@pytest.fixture(autouse=True)
def _on_this_machine(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def on_each_stage(stages, work, timeout=60.0):
    """What ``work(groups)`` returns on each stage, or the exception; stages are threads of this process."""
    store, layout = HashStore(), Layout(stages=stages)
    found = [None] * stages

    def run(rank):
        try:
            with Groups(layout, layout.place(rank), store, device="cpu", timeout=timeout) as groups:
                found[rank] = work(groups)
        except Exception as error:  # noqa: BLE001  # looked at by the test
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_hidden_states_arrive_in_the_order_in_which_they_were_sent():
    """Micro-batches of unlike shapes and kinds go through three stages, each adding its own, and none is mixed up."""
    sent = [torch.full((rows, 2, 3), float(rows), dtype=torch.bfloat16) for rows in (1, 2, 1, 4)]

    def work(groups):
        shown = []
        for given in sent:
            hidden = given if groups.place.first else groups.receive(tuple(given.shape), given.dtype, "cpu")
            if groups.place.last:
                shown.append(hidden)
            else:
                groups.send((hidden + 1).transpose(0, 1).transpose(0, 1))
        groups.flush()
        return shown

    first, second, last = on_each_stage(3, work)
    assert (first, second) == ([], [])
    assert all(torch.equal(found, given + 2) for found, given in zip(last, sent, strict=True))


def test_tokens_of_the_last_stage_are_heard_by_all():
    """The last stage's choice replaces whatever the others stand in for it."""
    chosen = on_each_stage(3, lambda groups: groups.from_last([10 * groups.place.stage, 2**40 + groups.place.stage]))
    assert chosen == [[20, 2**40 + 2]] * 3


def test_a_single_process_needs_no_group():
    """Without parallelism nothing is opened, and a choice is one's own."""
    layout = Layout()
    with Groups(layout, layout.place(0), HashStore(), device="cpu", timeout=1.0) as groups:
        assert groups.from_last([5]) == [5]
        groups.flush()


def test_a_link_that_cannot_be_made_leaves_no_group(monkeypatch):
    """Where the link fails, the group of the shards that was made before it is gone: the next engine makes its own."""
    init = dist.init_process_group

    def alone(backend, *, store, rank, world_size, timeout):
        assert (rank, world_size) == (0, 2)
        init(backend, store=store, rank=0, world_size=1, timeout=timeout)
        assert dist.is_initialized()

    def refuse(*_arguments):
        raise RuntimeError("no such interface")

    monkeypatch.setattr(dist, "init_process_group", alone)
    monkeypatch.setattr(dist, "ProcessGroupGloo", refuse)
    layout = Layout(tensor=2, stages=2)
    groups = Groups(layout, layout.place(0), HashStore(), device="cpu", timeout=5.0)
    try:
        with pytest.raises(RuntimeError, match="no such interface"), groups:
            pass
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_stage_that_does_not_send_is_waited_for_no_longer_than_said():
    """A link gives up after its timeout, in words that failure.py knows as those of a rank that only waits."""
    from harness.engines.ranks.failure import raised

    _, waited = on_each_stage(
        2, lambda g: None if g.place.first else g.receive((1,), torch.float32, "cpu"), timeout=2.0
    )
    assert isinstance(waited, RuntimeError)
    assert raised(1, waited).is_echo
