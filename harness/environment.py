"""Observe versions and devices; pin threads, seeds and flags, and put them back."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from harness.values import Difference

_PACKAGES = ("golden-harness", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Version of each package that can move a number, and of Python."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def dtype_key() -> str:
    """What transformers calls the dtype of a model that it makes: `torch_dtype` before 4.56, `dtype` since."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def machine() -> dict[str, Any]:
    """What the numbers were computed on; no host name, no path."""
    import torch

    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def differences(recorded: Mapping[str, Any], today: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Versions and parts of the machine that are not what they were, by name.

    Args:
        recorded: a golden's provenance, with ``versions`` and ``machine``.
        today: a trace's settings, with the same.
    """
    found = []
    for part in ("versions", "machine"):
        before, now = recorded.get(part), today.get(part)
        if not isinstance(before, Mapping) or not isinstance(now, Mapping):
            continue
        for name in sorted({*before, *now}):
            then, here = (None if one is None else str(one) for one in (before.get(name), now.get(name)))
            if then != here:
                found.append(Difference(name=str(name), golden=then, today=here))
    return tuple(found)


def compiler() -> str | None:
    """The C++ compiler that torch.compile and native extensions would use, None without one."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")


@contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads and deterministic kernels; restore both afterwards."""
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with thread_count(count):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Run with ``count`` torch threads (None: leave them), and restore the number afterwards."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Quiet:
    """Keeps libraries' progress bars, log lines and warnings off the terminal while an engine is open."""

    def __enter__(self) -> Self:
        from transformers.utils import logging as transformers_logging

        self._logging = transformers_logging
        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        self._dynamo = logging.getLogger("torch._dynamo").level
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._caught.__exit__(kind, error, traceback)
        logging.getLogger("torch._dynamo").setLevel(self._dynamo)
        self._logging.set_verbosity(self._verbosity)
        if self._bars:
            self._logging.enable_progress_bar()


def devices() -> dict[str, str]:
    """Devices that torch can compute on here, each with its name or the reason why not."""
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    if torch.cuda.is_available():
        found |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    else:
        found["cuda"] = "no CUDA device, or a CPU build of torch"
    return found
