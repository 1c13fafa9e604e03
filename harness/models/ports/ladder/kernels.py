"""decode.cpp as functions: compiled for this processor the first time, and kept.

It is a plain C interface, not an extension of torch: it compiles in seconds where torch's headers take a minute, and
what is kept does not depend on torch's version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from harness.environment import compiler

SOURCE = Path(__file__).with_name("decode.cpp")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
#: What is tried, best first: the processor's own instructions and threads; without threads; neither.
_VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_TIMEOUT = 120.0

#: Rows of a batch up to which an own product is used; beyond, a weight is used often enough for torch's to be better.
MOST_ROWS = 16
_BITS: Mapping[torch.dtype, int] = {torch.float32: 32, torch.bfloat16: 16}


class UnavailableError(Exception):
    """Why there are no kernels here, in words."""


class Kernels:
    """The functions of one compiled library.

    Args:
        library: as ctypes loads it.
        flags: that it was compiled with.
    """

    def __init__(self, library: ctypes.CDLL, flags: Sequence[str]) -> None:
        self.flags = " ".join(flags)
        self._linear, self._step, self._read = (
            getattr(library, f"harness_bloom_{name}") for name in ("linear", "step", "read")
        )
        place, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._linear.argtypes = [number, place, place, place, place, count, count, count, number, number]
        self._linear.restype = None
        self._step.argtypes = [number] + 8 * [place]
        self._step.restype = None
        self._read.argtypes = [place, count, number]
        self._read.restype = ctypes.c_uint64

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
        """Product of x [..., D] and weight [N, D], plus bias [N], in float and rounded once; optionally BLOOM's GELU.

        Whether it can take these tensors is `takes`'s to say.
        """
        x = x.contiguous()
        width, outputs = x.shape[-1], weight.shape[0]
        y = x.new_empty((*x.shape[:-1], outputs))
        self._linear(
            _BITS[x.dtype],
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            x.numel() // width,
            width,
            outputs,
            gelu,
            torch.get_num_threads(),
        )
        return y

    def step(
        self,
        sizes: Sequence[int],
        weights: Sequence[int],
        numbers: Sequence[float],
        slopes_H: Tensor,
        ids_B1: Tensor,
        mask_BS: Tensor,
        cache: Sequence[int],
        logits_B1V: Tensor,
    ) -> None:
        """One token for each row; decode.cpp says what each is. Addresses are those of contiguous tensors."""
        self._step(
            _BITS[logits_B1V.dtype],
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(weights))(*weights),
            (ctypes.c_float * len(numbers))(*numbers),
            slopes_H.data_ptr(),
            ids_B1.data_ptr(),
            mask_BS.data_ptr(),
            (ctypes.c_void_p * len(cache))(*cache),
            logits_B1V.data_ptr(),
        )

    def read(self, tensor: Tensor) -> int:
        """A sum over all of a contiguous tensor's memory, with torch's threads: how fast it can be read at all."""
        found: int = self._read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())
        return found


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product of these can be an own one: few rows, float or bfloat16, contiguous, on the CPU."""
    return (
        x.dtype in _BITS
        and x.dtype == weight.dtype
        and x.device.type == "cpu"
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and x.numel() > 0
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    )


@functools.cache
def load() -> Kernels:
    """The kernels, compiled now where they have not been.

    Raises:
        UnavailableError: where there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise UnavailableError("there is no C++ compiler (install g++ or clang++)")
    source = SOURCE.read_bytes()
    said = ""
    for variant in _VARIANTS:
        flags = (*_FLAGS, *variant)
        name = hashlib.sha256(b"\0".join([source, " ".join((command, *flags)).encode(), _processor()])).hexdigest()
        path = _directory() / f"decode-{name[:16]}.so"
        try:
            return Kernels(_library(command, flags, path), variant)
        except (OSError, subprocess.SubprocessError) as error:
            said = (str(getattr(error, "stderr", None) or error).strip().splitlines() or ["no message"])[0]
    raise UnavailableError(f"{Path(command).name} does not compile them ({said})")


def _library(command: str, flags: Sequence[str], path: Path) -> ctypes.CDLL:
    """The compiled file that is kept; one that is no library is compiled anew."""
    if path.is_file():
        with suppress(OSError):
            return ctypes.CDLL(str(path))
    _compile(command, flags, path)
    return ctypes.CDLL(str(path))


def why_not() -> str:
    """Why there are no kernels here, in words; empty where they can be had."""
    try:
        load()
    except UnavailableError as error:
        return str(error)
    return ""


def _directory() -> Path:
    """Where compiled libraries are kept, for this user alone: what is loaded from there is executed."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "golden-harness" / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory
    except OSError:
        pass
    return _temporary()


@functools.cache
def _temporary() -> Path:
    """A directory of this process, where no home can be written to."""
    return Path(tempfile.mkdtemp(prefix="golden-harness-"))


def _compile(command: str, flags: Sequence[str], path: Path) -> None:
    """Compile to a place beside, and move there: another process may be doing the same."""
    descriptor, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(descriptor)
    try:
        arguments = [command, *flags, str(SOURCE), "-o", name]
        subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _processor() -> bytes:
    """What -march=native compiled for: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(told))).encode()
