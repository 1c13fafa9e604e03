"""Templates on disk: made once for a golden, a catalogue and the libraries of the day, and found again by digest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness.mutations
import harness.templates
from harness import replicas
from harness.errors import UsageError, first_line
from harness.files import locked, replace_file
from harness.numerics import constants, matched
from harness.templates import making
from harness.values import Golden, TemplateNoise, Templates, work_digest

FORMAT = 1
Progress = Callable[[str], None]
Arrays = dict[str, NDArray[Any]]


def directory() -> Path:
    """Where templates are kept: HARNESS_CACHE, else the user's cache directory."""
    own = os.environ.get("HARNESS_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "golden-harness"
    return base / "templates"


def templates_of(
    golden: Golden, model: Path, progress: Progress, *, place: Path | None = None, places: bool = True
) -> Templates:
    """The golden's templates, from the cache or made now and put there.

    Args:
        golden: whose work they are of.
        model: directory of its model.
        progress: called with a few words before each run.
        place: directory of the cache, that of `directory` by default.
        places: also templates of places, for the words about what no bug explains.

    Raises:
        UsageError: for a golden whose suite or floors allow none.
    """
    making.diagnosed_run(golden)
    place = directory() if place is None else place
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"templates cannot be kept in {place} ({first_line(error)})"
        raise UsageError(problem, fix="Set HARNESS_CACHE to a directory that you may write") from None
    path = _path(golden, place, places=places)
    with locked(place / f"{path.stem}.lock"):
        found = read(path)
        if found is None:
            found = making.make(golden, model, progress, places=places)
            write(found, path)
    return found


def _path(golden: Golden, place: Path, *, places: bool = True) -> Path:
    return place / f"{key_of(golden, places=places)}.safetensors"


def key_of(golden: Golden, *, places: bool = True) -> str:
    """Digest of all that templates depend on: the golden's work and floors, the catalogue, the libraries."""
    run = making.diagnosed_run(golden)
    words = f"{FORMAT} {golden.model.digest} {work_digest(golden)} {golden.precision} {run} {places}"
    digest = hashlib.sha256(words.encode())
    for name in sorted(golden.floors):
        digest.update(name.encode() + golden.floors[name].sigma.tobytes())
    for path in _sources():
        digest.update(path.read_bytes())
    for name in ("torch", "transformers"):
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()[:32]


def _sources() -> list[Path]:
    """The code that decides what templates are."""
    packages = [Path(str(package.__file__)).parent for package in (harness.mutations, harness.templates)]
    files = [Path(str(module.__file__)) for module in (constants, matched, replicas)]
    return [*(path for package in packages for path in sorted(package.glob("*.py"))), *files]


# --- the file ----------------------------------------------------------------------------------

_ARRAYS = ("view", "place", "basis", "turn", "frame", "codes", "scales")
#: Dtypes of the arrays that are not of float64.
_KINDS: Mapping[str, type[np.generic]] = {
    "view": np.int64, "place": np.int64, "codes": np.int8, "scales": np.float32, "mean": np.float32, "row": np.float32,
}  # fmt: skip
_WORDS = ("run", "views", "names", "wrong", "places", "left_out", "seconds")


def write(bank: Templates, path: Path) -> None:
    """Put templates into one file, in one step."""
    from safetensors.numpy import save

    arrays: Arrays = {name: getattr(bank, name) for name in _ARRAYS}
    arrays |= {f"centre.{name}": centre for name, centre in bank.centres.items()}
    for precision, noise in bank.noises.items():
        arrays |= {f"noise.{precision}.{name}": getattr(noise, name) for name in TemplateNoise.__slots__}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    words = {name: getattr(bank, name) for name in _WORDS} | {"precisions": list(bank.noises), "format": FORMAT}
    replace_file(path, save(arrays, metadata={"words": json.dumps(words)}))


#: What reading a file raises that holds no templates.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, MemoryError, RecursionError)


def read(path: Path) -> Templates | None:
    """The templates of a file, None where it is missing or damaged: then they are made again."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not path.is_file():
        return None
    try:
        payload = path.read_bytes()
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        words, arrays = json.loads(header["__metadata__"]["words"]), load(payload)
        return _bank(words, arrays)
    except (SafetensorError, *_DAMAGED):
        return None


def _bank(words: dict[str, Any], arrays: Arrays) -> Templates:
    """Templates whose arrays have the shapes that their words say.

    Raises:
        ValueError: for others.
    """
    count, (rows, columns) = len(words["names"]) + len(words["places"]), arrays["codes"].shape[1:]
    views = len(words["views"])
    shapes = {"view": (rows,), "place": (rows,), "codes": (count, rows, columns), "scales": (count, rows)}
    shapes |= {"frame": (columns, columns), "turn": (arrays["basis"].shape[1], columns)}
    for name in words["precisions"]:
        replicas, _, prompts = arrays[f"noise.{name}.square"].shape
        shapes |= {f"centre.{name}": (rows, columns), f"noise.{name}.mean": (rows, columns)}
        shapes |= {f"noise.{name}.row": (rows,), f"noise.{name}.whiten": (columns, columns)}
        shapes |= {f"noise.{name}.square": (replicas, views, prompts)}
        shapes |= {f"noise.{name}.along": (replicas, views, prompts, count)}
        shapes |= {f"noise.{name}.gram": (views, prompts, count, count)}
    for name, shape in shapes.items():
        kind = _KINDS.get(name.rpartition(".")[2], np.float64)
        if arrays[name].shape != shape or arrays[name].dtype != kind:
            raise ValueError(f"{name} is {arrays[name].dtype}{arrays[name].shape}, not {np.dtype(kind)}{shape}")
    if len(words["wrong"]) != len(words["names"]) or not set(words["views"]) <= {"replay", "prefill"}:
        raise ValueError("its words do not fit")
    if words["format"] != FORMAT:
        raise ValueError(f"format {words['format']}")
    return Templates(
        run=str(words["run"]),
        views=tuple(words["views"]),
        names=tuple((str(name), float(strength)) for name, strength in words["names"]),
        wrong=tuple(map(str, words["wrong"])),
        places=tuple(map(str, words["places"])),
        left_out={str(name): str(reason) for name, reason in words["left_out"].items()},
        seconds=float(words["seconds"]),
        centres={name: arrays[f"centre.{name}"] for name in words["precisions"]},
        noises={
            precision: TemplateNoise(**{name: arrays[f"noise.{precision}.{name}"] for name in TemplateNoise.__slots__})
            for precision in words["precisions"]
        },
        **{name: arrays[name] for name in _ARRAYS},
    )


def size_of(golden: Golden) -> int:
    """Bytes of a golden's templates on disk; 0 where there are none."""
    path = _path(golden, directory())
    return path.stat().st_size if path.is_file() else 0
