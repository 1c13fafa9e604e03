import math
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from harness.environment import thread_count
from harness.models.ports.ladder import kernels

DTYPES = [torch.float32, torch.bfloat16]

if reason := kernels.why_not():
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)


def drawn(*shape, seed, dtype):
    """Random numbers of a dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, kernels.MOST_ROWS),
    width=st.integers(1, 100),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    gelu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_a_product_is_that_of_float64(rows, width, outputs, bias, gelu, dtype, seed):
    """Of any shape, with a bias or a GELU or without, it is right to the round-off of its sum and of its dtype."""
    x, weight = drawn(rows, 1, width, seed=seed, dtype=dtype), drawn(outputs, width, seed=seed + 1, dtype=dtype)
    added = drawn(outputs, seed=seed + 2, dtype=dtype) if bias else None
    found = kernels.load().linear(x, weight, added, gelu=gelu)
    exact = functional.linear(x.double(), weight.double(), None if added is None else added.double())
    # A sum of n products in float32 is off by at most n eps times the sum of their sizes.
    sizes = functional.linear(x.double().abs(), weight.double().abs()) + (0 if added is None else added.double().abs())
    allowed = (width + 2) * torch.finfo(torch.float32).eps * sizes
    if gelu:
        exact, allowed = functional.gelu(exact, approximate="tanh"), 1.2 * allowed + 1e-6 * (1 + exact.abs())
    allowed = allowed + torch.finfo(dtype).eps * exact.abs()
    assert found.dtype == dtype
    assert found.shape == (rows, 1, outputs)
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    """A row has the same bits alone and in any batch, with one thread and with two."""
    x, weight = drawn(13, 150, seed=1, dtype=dtype), drawn(1021, 150, seed=2, dtype=dtype)
    with thread_count(1):
        alone = torch.cat([kernels.load().linear(row[None], weight, None) for row in x])
        for count in (1, 2, 5, 8, 13):
            assert torch.equal(kernels.load().linear(x[:count], weight, None), alone[:count])
    with thread_count(2):
        assert torch.equal(kernels.load().linear(x, weight, None), alone)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(value, dtype):
    """Infinities and NaN come out where they belong, and nowhere else."""
    x = drawn(2, 40, seed=1, dtype=dtype)
    x[1, 7] = value
    found = kernels.load().linear(x, torch.ones((3, 40), dtype=dtype), None)
    assert bool(found[0].isfinite().all())
    assert not bool(found[1].isfinite().any())


def test_reading_reads_everything():
    """The sum that shows how fast memory is read depends on every byte of it."""
    words = torch.arange(100_003, dtype=torch.int64) * 7919
    assert kernels.load().read(words) == int(words.sum())


@pytest.mark.parametrize(
    ("x", "weight", "taken"),
    [
        (torch.ones(1, 1, 8), torch.ones(4, 8), True),
        (torch.ones(16, 1, 8), torch.ones(4, 8), True),
        (torch.ones(17, 1, 8), torch.ones(4, 8), False),
        (torch.ones(0, 1, 8), torch.ones(4, 8), False),
        (torch.ones(1, 1, 8), torch.ones(8, 4).T, False),
        (torch.ones(1, 1, 8).double(), torch.ones(4, 8).double(), False),
        (torch.ones(1, 1, 8).bfloat16(), torch.ones(4, 8), False),
        (torch.ones(1, 1, 8, device="meta"), torch.ones(4, 8, device="meta"), False),
    ],
)
def test_what_it_takes(x, weight, taken):
    """Few rows, of one dtype that it has, contiguous, on the CPU; all else is torch's."""
    assert kernels.takes(x, weight) is taken


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty directory for compiled kernels; nothing is remembered of another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load.cache_clear()
    yield tmp_path
    kernels.load.cache_clear()


def test_without_a_compiler_there_are_none(elsewhere, monkeypatch):
    """The reason says what to install."""
    monkeypatch.setattr(kernels, "compiler", lambda: None)
    assert "install g++" in kernels.why_not()


def test_a_compiler_that_fails_is_quoted(elsewhere, monkeypatch, tmp_path):
    """After all variants the first line of what it said is the reason, and nothing half-made is left."""
    (tmp_path / "wrong.cpp").write_text("this is no C++\n", encoding="utf-8")
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "wrong.cpp")
    assert "does not compile them" in kernels.why_not()
    assert not list(elsewhere.rglob("*.so"))


@pytest.mark.slow
def test_a_damaged_file_is_compiled_anew(elsewhere):
    """A file that is no library is not kept for ever, and a whole one is not compiled twice."""
    kernels.load()
    (made,) = elsewhere.rglob("*.so")
    made.unlink()
    made.write_bytes(b"no library")
    kernels.load.cache_clear()
    assert kernels.load().read(torch.arange(10)) == 45
    before = made.stat().st_mtime_ns
    kernels.load.cache_clear()
    kernels.load()
    assert made.stat().st_mtime_ns == before


@pytest.mark.slow
def test_it_compiles_without_threads_and_without_the_processor_s_own_instructions(tmp_path):
    """The portable variant gives the same products: each processor has that one."""
    command = kernels.compiler()
    made = tmp_path / "plain.so"
    subprocess.run([command, *kernels._FLAGS, str(kernels.SOURCE), "-o", str(made)], check=True, timeout=120)
    plain = kernels.Kernels(kernels.ctypes.CDLL(str(made)), ())
    x, weight = drawn(3, 50, seed=1, dtype=torch.bfloat16), drawn(20, 50, seed=2, dtype=torch.bfloat16)
    found, other = (one.linear(x, weight, None, gelu=True).float() for one in (plain, kernels.load()))
    assert torch.allclose(found, other, rtol=2**-7, atol=1e-6)
