"""What a machine does a second, from times that are known and once for real."""

import itertools

import pytest
import torch

from harness.speed import machine


@pytest.fixture
def lasting(monkeypatch):
    """Work that takes as long as it is told to, in order; the last goes on for ever."""

    def last(*seconds):
        times = itertools.chain(seconds, itertools.repeat(seconds[-1]))
        monkeypatch.setattr(machine, "_seconds", lambda _work, _device: next(times))

    return last


def test_a_copy_is_read_and_written(lasting):
    """Bytes count twice."""
    lasting(0.5)
    assert machine.copy_bandwidth("cpu", 1000) == 4000


def test_matrices_grow_until_a_product_lasts(lasting):
    """256, 512 and then 1024 rows, of which the last takes long enough."""
    lasting(0.0001, 0.001, 0.02)
    assert machine.product_rate("float32", "cpu", 4096) == 2 * 1024**3 / 0.02


def test_matrices_do_not_grow_beyond_the_most(lasting):
    """A device that is too fast is measured with the largest."""
    lasting(0.0001)
    assert machine.product_rate("float32", "cpu", 512) == 2 * 512**3 / 0.0001


def test_the_median_counts_and_the_first_run_does_not(monkeypatch):
    """The third of five runs in order of time, one of which was held up; a slow run before them is none of these."""
    lengths = iter((9.0, 1.0, 2.0, 50.0, 3.0, 4.0))
    clock = {"now": 0.0}
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock["now"])

    def work():
        clock["now"] += next(lengths)

    assert machine._seconds(work, "cpu") == 3.0


def test_buffers_are_beyond_the_caches():
    """Of whatever machine runs this test."""
    assert 2**26 <= machine._buffer_bytes() <= 2**29


def test_a_real_machine_is_measured_with_what_is_in_force(monkeypatch):
    """Both speeds are positive, and dtype and threads are told."""
    monkeypatch.setattr(machine, "_buffer_bytes", lambda: 2**22)
    monkeypatch.setattr(machine, "_MOST_SIZE", 256)
    found = machine.measure("bfloat16")
    assert (found.dtype, found.device, found.threads) == ("bfloat16", "cpu", torch.get_num_threads())
    assert found.bandwidth > 1e6
    assert found.rate > 1e6
