"""Write and read traces: one safetensors file that carries its words as JSON, never pickle.

What is read is what was written, to the bit: a trace that was made on the machine with the device is judged anywhere
else as it would have been there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import TraceError, first_line
from harness.files import replace_file
from harness.numerics.constants import PROJECTIONS
from harness.values import Generation, Pass, Rows, Trace

FORMAT = 1
SUFFIX = ".trace"

#: Dtype and axes of each array of Rows (N rows, G generated ones among them, J projections, T top entries).
_ARRAYS: Mapping[str, tuple[type[np.generic], str]] = {
    "request": (np.int32, "N"), "position": (np.int32, "N"), "generated": (np.bool_, "N"), "argmax": (np.int32, "N"),
    "nonfinite": (np.int32, "N"), "logsumexp": (np.float32, "N"), "logp": (np.float32, "N"),
    "entropy": (np.float32, "N"), "projections": (np.float32, "NJ"), "top_ids": (np.int32, "GT"),
    "top_logits": (np.float32, "GT"), "fingerprint": (np.int64, "G"),
}  # fmt: skip
_AGAIN = "Make it again with `harness run`"

Arrays = dict[str, NDArray[Any]]


# --- writing -----------------------------------------------------------------------------------


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write ``trace`` to the file ``path`` in one step.

    Raises:
        TraceError: for a directory that is not there.
    """
    from safetensors.numpy import save

    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise TraceError(f"{path} cannot be written", fix="Name a file in a directory that exists")
    arrays: Arrays = {}
    document = {"format": FORMAT, "trace": _words(trace, "", arrays)}
    text = json.dumps(document)
    replace_file(path, save(arrays, metadata={"trace": text, "sha256": _digest(text, arrays)}))


def _words(trace: Trace, prefix: str, arrays: Arrays) -> dict[str, Any]:
    """All of a trace but its arrays, which are added to ``arrays`` under names that begin with ``prefix``."""
    words: dict[str, Any] = {
        name: getattr(trace, name)
        for name in (
            "engine", "declared", "settings", "vocabulary", "suite_digest", "prompt_ids", "upcast_reason", "forced",
            "quick", "limits", "basis",
        )
    }  # fmt: skip
    words["capabilities"] = sorted(trace.capabilities)
    words["passes"] = [_pass_words(one, f"{prefix}{number}.", arrays) for number, one in enumerate(trace.passes)]
    words["upcast"] = None if trace.upcast is None else _words(trace.upcast, f"{prefix}upcast.", arrays)
    return words


def _pass_words(one: Pass, prefix: str, arrays: Arrays) -> dict[str, Any]:
    if one.rows is not None:
        arrays |= {f"{prefix}{name}": np.ascontiguousarray(getattr(one.rows, name)) for name in _ARRAYS}
        if one.rows.fine is not None:
            arrays[f"{prefix}fine"] = np.ascontiguousarray(one.rows.fine)
    return {
        **{name: getattr(one, name) for name in ("run", "view", "repeat", "requests", "seconds")},
        "rows": one.rows is not None,
        "generations": [{name: getattr(given, name) for name in _GENERATION} for given in one.generations],
    }


_GENERATION = tuple(field.name for field in fields(Generation))


def _digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the words and over name, dtype, shape and bytes of each array."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


# --- reading -----------------------------------------------------------------------------------


def load_trace(path: str | Path) -> Trace:
    """Read and verify a trace. Nothing in it is executed.

    Raises:
        TraceError: naming what is wrong and how to mend it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise TraceError(f"there is no trace at {path}", fix="Check the path; `harness run` makes one")
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise TraceError(f"{path} is not a trace ({first_line(error)})", fix=_AGAIN) from None
    text = metadata.get("trace", "")
    if metadata.get("sha256") != _digest(text, arrays):
        raise TraceError(f"{path} is no trace, or was changed after it was written", fix=_AGAIN)
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise TraceError(
                f"{path} has format {document['format']!r}, this version reads {FORMAT}",
                fix="Make it again, or install the golden-harness that wrote it",
            )
        return _trace(document["trace"], "", arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        problem = f"{path} is not a trace of format {FORMAT} ({type(error).__name__}: {first_line(error)})"
        raise TraceError(problem, fix=_AGAIN) from None


def _trace(words: Mapping[str, Any], prefix: str, arrays: Arrays) -> Trace:
    ids = words["prompt_ids"]
    return Trace(
        engine=_typed(words, "engine", str),
        declared=_typed(words, "declared", dict),
        settings=_typed(words, "settings", dict),
        capabilities=frozenset(map(str, words["capabilities"])),
        vocabulary=_typed(words, "vocabulary", int),
        suite_digest=_typed(words, "suite_digest", str),
        prompt_ids=None if ids is None else tuple(_whole(one) for one in ids),
        passes=tuple(_pass(one, f"{prefix}{number}.", arrays) for number, one in enumerate(words["passes"])),
        upcast=None if words["upcast"] is None else _trace(words["upcast"], f"{prefix}upcast.", arrays),
        upcast_reason=_typed(words, "upcast_reason", str),
        forced=_typed(words, "forced", str),
        quick=_typed(words, "quick", bool),
        limits=tuple(map(str, words["limits"])),
        basis=_typed({"basis": "", **words}, "basis", str),
    )


def _pass(words: Mapping[str, Any], prefix: str, arrays: Arrays) -> Pass:
    view = words["view"]
    if view not in ("generate", "replay", "prefill"):
        raise ValueError(f"a view {view!r}")
    return Pass(
        run=_typed(words, "run", str),
        view=view,
        repeat=_typed(words, "repeat", int),
        requests=_whole(words["requests"]),
        generations=tuple(_generation(one) for one in words["generations"]),
        rows=_rows(prefix, arrays) if words["rows"] is True else None,
        seconds=float(words["seconds"]),
    )


def _generation(words: Mapping[str, Any]) -> Generation:
    finish = words["finish"]
    if finish not in ("eos", "length"):
        raise ValueError(f"a finish reason {finish!r}")
    return Generation(
        tokens=_whole(words["tokens"]),
        finish=finish,
        top_ids=tuple(_whole(step) for step in words["top_ids"]),
        top_logits=tuple(tuple(map(float, step)) for step in words["top_logits"]),
    )


def _rows(prefix: str, arrays: Arrays) -> Rows:
    request, steps = arrays[f"{prefix}request"], arrays[f"{prefix}fingerprint"]
    top = arrays[f"{prefix}top_ids"]
    sizes = {"N": len(request), "G": len(steps), "J": PROJECTIONS, "T": top.shape[-1] if top.ndim == 2 else -1}
    taken: dict[str, Any] = {}
    for name, (dtype, axes) in _ARRAYS.items():
        array, wanted = arrays[f"{prefix}{name}"], tuple(sizes[axis] for axis in axes)
        if array.dtype != dtype or array.shape != wanted:
            raise ValueError(f"{prefix}{name} is {array.dtype}{list(array.shape)}, not {dtype.__name__}{list(wanted)}")
        taken[name] = array
    if int(taken["generated"].sum()) != sizes["G"]:
        raise ValueError(f"{prefix}generated marks {int(taken['generated'].sum())} rows, and {sizes['G']} are there")
    fine = arrays.get(f"{prefix}fine")
    if fine is not None and (fine.dtype != np.float64 or fine.ndim != 2 or len(fine) != sizes["N"]):
        raise ValueError(f"{prefix}fine is {fine.dtype}{list(fine.shape)}, not float64[{sizes['N']}, R]")
    return Rows(**taken, fine=fine)


def _whole(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise ValueError("ids and indices must be whole numbers below 2^31")
    return tuple(values)


def _typed(words: Mapping[str, Any], name: str, kind: type) -> Any:
    if type(words[name]) is not kind:
        raise ValueError(f"{name} is no {kind.__name__}")
    return words[name]
