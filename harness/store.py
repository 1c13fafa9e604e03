"""Read, write and list goldens: readable JSON beside safetensors, never pickle; the only writer under golden/.

A golden is two files, or more where its arrays are in shards (arrays.py). `golden.json` names the SHA-256 of each and
carries a digest of itself, so whatever is truncated, flipped or exchanged is seen before a number is used. Writing is
one atomic step: the new arrays are staged under names that hold their digests, replacing `golden.json` commits, and
only then do the arrays take their plain names. A reader accepts either name, so at every moment the directory holds
exactly the old golden or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import arrays, suites
from harness.errors import GoldenError, HarnessError
from harness.files import content_digest, locked, readable_json, replace_file
from harness.numerics import metrics
from harness.numerics.bounds import tie_factor
from harness.numerics.constants import ALPHA_TOKENS, BUCKETS, PROJECTIONS
from harness.numerics.sketch import GENERATOR
from harness.values import Centre, Finish, Floor, Generation, Golden, ModelRef, Moments, Request, Rows, Suite

FORMAT = 2
JSON_NAME = "golden.json"
_LARGEST_JSON = 64 * 2**20
_RERECORD = "Restore it from version control, or record it again with `harness record`"
_FLOAT_ARRAYS = ("logsumexp", "logp", "entropy", "projections", "top_logits")


# --- writing -----------------------------------------------------------------------------------


def write_golden(golden: Golden, directory: Path) -> None:
    """Write ``golden`` to ``directory`` atomically; the previous golden, if any, is there until it is replaced."""
    document = _document(golden)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        document["arrays"] = arrays.stage(directory, _arrays(golden))
        document["digest"] = content_digest(document)
        replace_file(directory / JSON_NAME, readable_json(document).encode())
        arrays.settle(directory, document["arrays"])
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _arrays(golden: Golden) -> dict[str, NDArray[Any]]:
    rows = golden.rows
    found: dict[str, NDArray[Any]] = {f"reference.{name}": getattr(rows, name) for name in _FLOAT_ARRAYS}
    found |= {"reference.argmax": rows.argmax, "reference.top_ids": rows.top_ids}
    for precision, centre in golden.centres.items():
        found |= {f"centre.{precision}.{name}": getattr(centre, name) for name in (*_FLOAT_ARRAYS, "top_ids")}
    for precision, floor in golden.floors.items():
        found |= {f"floor.{precision}.{name}": getattr(floor, name) for name in ("sigma", "pair")}
        found |= {f"floor.{precision}.{name}": getattr(floor.moments, name) for name in _MOMENTS}
    found |= {f"direction.{name}": direction for name, direction in golden.directions.items()}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


#: Axes of each array of Moments, K replicas first.
_MOMENTS: Mapping[str, str] = {
    "square": "KP2", "largest": "KP2", "gain": "KP2", "logp": "KP2", "entropy": "KP2", "along": "KP2D",
    "bias": "K2J", "bucket": "K2B",
    "margin": "KP", "top": "KP", "top_largest": "KP", "flips": "KP", "deficit": "KP",
}  # fmt: skip


def _document(golden: Golden) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": golden.name,
        "suite": suites.suite_to_dict(golden.suite),
        "suite_digest": golden.suite.digest,
        "model": {name: getattr(golden.model, name) for name in ModelRef.__slots__},
        "tokenizer_digest": golden.tokenizer_digest,
        "stop_ids": list(golden.stop_ids),
        "vocabulary": golden.vocabulary,
        "precision": golden.precision,
        "projections": GENERATOR,
        "centres": {
            precision: {"shift": centre.shift, "inexact_tensors": centre.inexact_tensors}
            for precision, centre in golden.centres.items()
        },
        "floors": {
            precision: {
                "median_sigma": float(np.median(floor.sigma)) if len(floor.sigma) else 0.0,
                "replicas": floor.replicas,
                "effective": floor.effective,
                "families": list(floor.families),
            }
            for precision, floor in golden.floors.items()
        },
        "directions": list(golden.directions),
        "provenance": dict(golden.provenance),
        "prompts": [_prompt(golden, index) for index in range(len(golden.requests))],
    }


def _prompt(golden: Golden, index: int) -> dict[str, Any]:
    request, generation, rows = golden.requests[index], golden.generations[index], golden.rows
    margin = metrics.margins(rows.top_logits)[rows.request[rows.generated] == index]
    decidable = {
        precision: "".join("+" if step else "." for step in steps[rows.request[rows.generated] == index])
        for precision, steps in decidable_steps(golden).items()
    }
    return {
        "id": request.id,
        "text": request.text,
        "max_new_tokens": request.max_new_tokens,
        "prompt_ids": list(request.prompt_ids),
        "tokens": list(generation.tokens),
        "finish": generation.finish,
        "margins": [round(float(value), 4) if np.isfinite(value) else None for value in margin],
        "decidable": decidable,
    }


def decidable_steps(golden: Golden) -> dict[str, NDArray[np.bool_]]:
    """Per precision, the generated steps whose margin exceeds what round-off can turn, [G]."""
    steps = max(1, int(golden.rows.generated.sum()))
    factor = tie_factor(steps, ALPHA_TOKENS)
    with np.errstate(over="ignore"):  # a golden of others may hold any number; beyond all floats nothing is decidable
        return {
            precision: metrics.margins(golden.centre_rows(precision.partition("/")[0]).top_logits) > factor * floor.pair
            for precision, floor in golden.floors.items()
        }


# --- reading -----------------------------------------------------------------------------------


def array_names(directory: Path) -> tuple[str, ...]:
    """Names of the files of a golden's arrays.

    Raises:
        GoldenError: where its golden.json cannot be read.
    """
    return arrays.names(_read_document(directory / JSON_NAME).get("arrays"))


def list_goldens(root: Path) -> list[Path]:
    """Directories under ``root`` that hold a golden, sorted."""
    return sorted(path.parent for path in root.rglob(JSON_NAME))


def read_golden(directory: str | Path) -> Golden:
    """Read and verify a golden. Nothing in it is executed, and no array is used before its digest is right.

    Raises:
        GoldenError: naming what is wrong and how to mend it.
    """
    directory = Path(directory)
    document = _read_document(directory / JSON_NAME)
    try:
        found = _read_arrays(directory, document)
    except GoldenError:
        # A writer may have committed between the two reads: then, and only then, the JSON is another one by now.
        again = _read_document(directory / JSON_NAME)
        if again["digest"] == document["digest"]:
            raise
        document, found = again, _read_arrays(directory, again)
    try:
        return replace(_golden(document, found), directory=str(directory))
    except (HarnessError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise GoldenError(
            f"{directory / JSON_NAME} is not a golden of format {FORMAT} ({type(error).__name__}: {error})",
            fix=_RERECORD,
        ) from None


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GoldenError(
            f"there is no golden at {path.parent}", fix="`harness record` makes one; `harness check --all` lists them"
        )
    if path.stat().st_size > _LARGEST_JSON:
        raise GoldenError(f"{path} has {path.stat().st_size:,} bytes, which no golden.json has", fix=_RERECORD)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GoldenError(f"{path} is not JSON ({type(error).__name__})", fix=_RERECORD) from None
    if not isinstance(document, dict) or "format" not in document:
        raise GoldenError(f"{path} is JSON but not a golden", fix=_RERECORD)
    if document["format"] != FORMAT:
        raise GoldenError(
            f"{path} has format {document['format']!r}, this version reads {FORMAT}",
            fix="Record it again, or install the golden-harness that wrote it",
        )
    try:
        sound = document.get("digest") == content_digest(document)
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise GoldenError(f"{path} was changed after it was written (its digest is wrong)", fix=_RERECORD)
    return document


def _read_arrays(directory: Path, document: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    try:
        return arrays.read(directory, document.get("arrays"))
    except ValueError as error:
        raise GoldenError(str(error), fix=_RERECORD) from None


def _golden(document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Golden:
    suite = suites.suite_from_dict(document["suite"], where=f"golden {document['name']}")
    if document["projections"] != GENERATOR:
        raise ValueError(f"its projections are {document['projections']!r}, and these are {GENERATOR!r}")
    vocabulary = int(document["vocabulary"])
    if not 1 <= vocabulary < 2**31:
        raise ValueError("a vocabulary of no or of too many tokens")
    requests = tuple(_request(prompt, vocabulary) for prompt in document["prompts"])
    generations = tuple(
        Generation(tokens=_ids(prompt["tokens"], vocabulary), finish=_finish(prompt["finish"]))
        for prompt in document["prompts"]
    )
    _check_limits(suite, requests, generations)
    layout = _layout(requests, generations)
    directions = [_text(name, "direction") for name in document["directions"]]
    if len(set(directions)) != len(directions):
        raise ValueError("a direction is named twice")
    take = _Taker(
        arrays,
        rows=len(layout[0]),
        steps=int(layout[2].sum()),
        prompts=len(requests),
        directions=len(directions),
    )
    rows = Rows(
        request=layout[0],
        position=layout[1],
        generated=layout[2],
        argmax=take("reference.argmax", np.int32, "N"),
        nonfinite=np.zeros(len(layout[0]), dtype=np.int32),
        fingerprint=np.zeros(int(layout[2].sum()), dtype=np.int64),
        **take.centre("reference"),
    )
    model = document["model"]
    return Golden(
        name=str(document["name"]),
        suite=suite,
        requests=requests,
        generations=generations,
        model=ModelRef(**{name: _text(model[name], name) for name in ModelRef.__slots__}),
        tokenizer_digest=document["tokenizer_digest"],
        stop_ids=_ids(document["stop_ids"]),
        vocabulary=vocabulary,
        precision=str(document["precision"]),
        rows=rows,
        centres={
            precision: Centre(
                shift=float(words["shift"]),
                inexact_tensors=int(words["inexact_tensors"]),
                **take.centre(f"centre.{precision}"),
            )
            for precision, words in document["centres"].items()
        },
        floors={
            precision: Floor(
                **take.floor(f"floor.{precision}", replicas=words["replicas"]),
                effective=float(words["effective"]),
                families=_families(words),
            )
            for precision, words in document["floors"].items()
        },
        directions={name: take(f"direction.{name}", np.float16, "NJ") for name in directions},
        provenance=dict(document["provenance"]),
    )


def _families(words: Mapping[str, Any]) -> tuple[str, ...]:
    """What each replica varied; one for each of them."""
    if len(words["families"]) != words["replicas"]:
        raise ValueError(f"{len(words['families'])} families for {words['replicas']} replicas")
    return tuple(map(str, words["families"]))


def _check_limits(suite: Suite, requests: Sequence[Request], generations: Sequence[Generation]) -> None:
    """Limits must be the suite's, and each continuation must end where its limit or its stop id ends it."""
    limits = {prompt.id: prompt.max_new_tokens or suite.max_new_tokens for prompt in suite.prompts}
    for request, given in zip(requests, generations, strict=True):
        length = len(given.tokens)
        if request.max_new_tokens != limits.get(request.id) or not 1 <= length <= request.max_new_tokens:
            raise ValueError(f"prompt {request.id!r} has {length} tokens and the limit {request.max_new_tokens}")
        if given.finish == "length" and length != request.max_new_tokens:
            raise ValueError(f"prompt {request.id!r} ends by length after {length} of {request.max_new_tokens} tokens")


def _request(prompt: Mapping[str, Any], vocabulary: int) -> Request:
    text = prompt["text"]
    if text is not None and not isinstance(text, str):
        raise ValueError("a prompt's text is not text")
    return Request(
        id=str(prompt["id"]),
        text=text,
        prompt_ids=_ids(prompt["prompt_ids"], vocabulary),
        max_new_tokens=int(prompt["max_new_tokens"]),
    )


def _ids(values: Sequence[Any], vocabulary: int = 2**31) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < vocabulary for value in values):
        raise ValueError(f"token ids must be whole numbers from 0 to {vocabulary - 1}")
    return tuple(values)


def _finish(value: Any) -> Finish:
    if value == "eos" or value == "length":
        return "eos" if value == "eos" else "length"
    raise ValueError(f"finish reason {value!r}")


def _text(value: Any, name: str) -> Any:
    if not isinstance(value, str) and not (name == "path" and value is None):
        raise ValueError(f"model.{name} is not text")
    return value


def _layout(
    requests: Sequence[Request], generations: Sequence[Generation]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Request, position and generated flag of every row: positions 1 up to the last token of each sequence."""
    request, position, generated = [], [], []
    for index, (asked, given) in enumerate(zip(requests, generations, strict=True)):
        length = len(asked.prompt_ids) + len(given.tokens)
        places = np.arange(1, length, dtype=np.int32)
        position.append(places)
        request.append(np.full(len(places), index, dtype=np.int32))
        generated.append(places >= len(asked.prompt_ids))
    return np.concatenate(request), np.concatenate(position), np.concatenate(generated)


class _Taker:
    """Takes arrays by name, and refuses one of the wrong dtype or shape, or with a NaN or an infinity in it."""

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], *, rows: int, steps: int, prompts: int, directions: int
    ) -> None:
        self._arrays = arrays
        self._sizes = {"N": rows, "G": steps, "P": prompts, "B": BUCKETS, "J": PROJECTIONS}
        self._sizes |= {"D": directions, "2": 2}
        top = arrays.get("reference.top_ids")
        self._sizes["T"] = max(1, top.shape[-1]) if top is not None and top.ndim else 1

    def __call__(self, name: str, dtype: type[np.generic], axes: str) -> NDArray[Any]:
        array = self._arrays.get(name)
        if array is None:
            raise ValueError(f"the array {name} is missing")
        wanted = [self._sizes[axis] for axis in axes]
        if array.dtype != dtype or list(array.shape) != wanted:
            raise ValueError(f"the array {name} is {array.dtype}{list(array.shape)}, not {dtype.__name__}{wanted}")
        if not np.isfinite(array).all():
            raise ValueError(f"the array {name} holds NaN or an infinity")
        return array

    def floor(self, prefix: str, *, replicas: Any) -> dict[str, Any]:
        if type(replicas) is not int or replicas < 1:
            raise ValueError(f"{replicas!r} replicas")
        self._sizes["K"] = replicas
        return {
            "sigma": self(f"{prefix}.sigma", np.float32, "N"),
            "pair": self(f"{prefix}.pair", np.float32, "G"),
            "moments": Moments(**{name: self(f"{prefix}.{name}", np.float32, axes) for name, axes in _MOMENTS.items()}),
        }

    def centre(self, prefix: str) -> dict[str, NDArray[Any]]:
        return {
            "logsumexp": self(f"{prefix}.logsumexp", np.float32, "N"),
            "logp": self(f"{prefix}.logp", np.float32, "N"),
            "entropy": self(f"{prefix}.entropy", np.float32, "N"),
            "projections": self(f"{prefix}.projections", np.float32, "NJ"),
            "top_ids": self(f"{prefix}.top_ids", np.int32, "GT"),
            "top_logits": self(f"{prefix}.top_logits", np.float32, "GT"),
        }
