"""How many bytes a second this machine copies and how many operations a second its matrix products do, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_REPEATS = 5
#: A buffer is this many times the largest cache, as STREAM asks (McCalpin, https://www.cs.virginia.edu/stream/ref.html).
_BEYOND = 4
_LEAST_BYTES, _MOST_BYTES = 2**26, 2**29
#: Matrices are made larger until a product lasts this long, in seconds, so that starting it counts for little.
_LASTING = 0.01
_LEAST_SIZE, _MOST_SIZE = 256, 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What bounds the speed of a step.

    Attributes:
        bandwidth: bytes a second, what is read and what is written together.
        rate: additions and multiplications a second.
        dtype: of the products.
        device: type of the device, "cpu" or "cuda".
        threads: of torch on the processor.
    """

    bandwidth: float
    rate: float
    dtype: str
    device: str
    threads: int


def measure(dtype: str, device: str = "cpu") -> Machine:
    """Measure with the threads that are in force; takes about a second.

    Args:
        dtype: name of a floating dtype of torch.
        device: as torch names it.
    """
    import torch

    return Machine(
        bandwidth=copy_bandwidth(device, _buffer_bytes()),
        rate=product_rate(dtype, device, _MOST_SIZE),
        dtype=dtype,
        device=torch.device(device).type,
        threads=torch.get_num_threads(),
    )


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes a second of copies of ``size`` bytes: each is read once and written once; the median of several."""
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def product_rate(dtype: str, device: str, most: int) -> float:
    """Operations a second of square matrix products, 2 n^3 each, of at most ``most`` rows; the median of several."""
    import torch

    size = min(_LEAST_SIZE, most)
    while True:
        a, b = (torch.rand(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        seconds = _seconds(product, device)
        if seconds >= _LASTING or 2 * size > most:
            return 2.0 * size**3 / seconds
        size *= 2


def _seconds(work: Callable[[], object], device: str) -> float:
    """The median of several runs, after one that is not counted."""
    found = []
    for _ in range(_REPEATS + 1):
        _settle(device)
        start = time.perf_counter()
        work()
        _settle(device)
        found.append(time.perf_counter() - start)
    return max(1e-9, statistics.median(found[1:]))


def _settle(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _buffer_bytes() -> int:
    """Beyond the largest cache of the processor, where the system tells its size."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            # Linux writes kibibytes, as in "32768K" (Documentation/ABI/stable/sysfs-devices-system-cpu).
            sizes.append(1024 * int(file.read_text(encoding="ascii").strip().removesuffix("K")))
    return min(_MOST_BYTES, max(_LEAST_BYTES, _BEYOND * max(sizes)))
