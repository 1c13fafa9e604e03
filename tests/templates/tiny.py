"""A real golden of four short prompts with templates of a few bugs, made once a process; candidates without a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from harness import flow, store
from harness.engines import hf
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation
from harness.numerics.sketch import select_rows
from harness.power.drawn import generate_suite
from harness.templates import caching, making
from harness.values import Golden, Pass, Templates, Trace

MODEL = ROOT / "golden" / "llama-tiny" / "model"
PRECISIONS = ("float32", "bfloat16")
#: One of them has no part in a Llama, one changes nothing; two show in padded rows alone.
BUGS = (
    "x-row-scaled",
    "x-rows-swapped",
    "x-attention-scale",
    "x-bias-doubled",
    "wc-eps",
    "na-gelu",
    "at-mask-as-length",
    "pos-leftpad-shared",
    "ok-norm-twice",
)
#: One whose S/N in bfloat16 is far below 1, and whose z is far beyond the limit.
HIDDEN = ("x-bias-doubled", 0.1)


@cache
def _home() -> Path:
    # Kept by the function's cache until the process ends.
    _home.kept = tempfile.TemporaryDirectory(prefix="tiny-")  # type: ignore[attr-defined]
    return Path(_home.kept.name)  # type: ignore[attr-defined]


@cache
def golden() -> Golden:
    """Prompts of 10 to 21 tokens in batches of two, six tokens behind each."""
    suite = generate_suite(5_000_003, prompts=4, new_tokens=6, longest=24, long=None)
    place = _home() / "llama-tiny" / "tiny"
    flow.record(MODEL, suite, out=place, precisions=PRECISIONS)
    return store.read_golden(place)


def bugs(_model_type: str = "llama") -> list[tuple[Mutation, float]]:
    """A few of the catalogue, in the place of `making.bugs_for`."""
    return [(CATALOGUE[name], strength) for name in BUGS for strength in CATALOGUE[name].strengths]


@cache
def bank() -> Templates:
    """The golden's templates of these bugs and of all places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "bugs_for", bugs)
        return making.make(golden(), MODEL, lambda _text: None)


def keep(directory: Path) -> Path:
    """Put the templates where a check with HARNESS_CACHE set to this directory finds them."""
    place = directory / "templates"
    place.mkdir(parents=True)
    path = place / f"{caching.key_of(golden())}.safetensors"
    caching.write(bank(), path)
    return path


@contextmanager
def broken(precision: str, *names: str, strength: float = 1.0) -> Iterator[hf.HFEngine]:
    """An open engine of the model with some bugs in it."""
    with ExitStack() as stack:
        engine = stack.enter_context(hf.HFEngine(hf.Options(model=str(MODEL), dtype=precision), text="tiny"))
        for name in names:
            stack.enter_context(CATALOGUE[name].applied(engine, strength))
        yield engine


def traced(engine: hf.HFEngine, *, upcast: bool = False) -> Trace:
    """What an open engine shows for the templates."""
    return flow.running.forced_trace(engine, golden(), upcast=upcast, basis=bank().basis)


# --- candidates without a model ----------------------------------------------------------------


def template(name: str, strength: float = 1.0) -> np.ndarray:
    """What a bug changes, in orthonormal coordinates, [M, R]."""
    one = bank()
    index = one.names.index((name, strength))
    framed = one.codes[index].astype(np.float64) * one.scales[index].astype(np.float64)[:, None]
    return np.linalg.solve(one.frame, framed.T).T


def sigma(precision: str = "bfloat16") -> np.ndarray:
    """Round-off of each row of the templates, [M, 1]."""
    return golden().floors[precision].sigma[bank().place].astype(np.float64)[:, None]


def round_off(seed: int, precision: str = "bfloat16") -> np.ndarray:
    """Round-off of one more implementation, with the mean and the covariance of the replicas', [M, R]."""
    noise = bank().noises[precision]
    drawn = (
        np.random.default_rng(seed).normal(size=noise.mean.shape) * np.sqrt(noise.row / noise.mean.shape[1])[:, None]
    )
    return sigma(precision) * (noise.mean + np.linalg.solve(noise.whiten, drawn.T).T)


def candidate(error: np.ndarray | float = 0.0, precision: str = "bfloat16", **more: object) -> Trace:
    """A trace that shows what is right and an error in orthonormal coordinates [M, R], and nothing else of interest."""
    one, work = bank(), golden()
    shown = (one.centres[precision] + error) @ np.linalg.pinv(one.turn)
    passes = []
    for index, view in enumerate(one.views):
        rows = select_rows(work.rows, one.place[one.view == index])
        passes.append(
            Pass(
                run=one.run,
                view=view,
                requests=tuple(range(len(work.requests))),
                rows=replace(rows, fine=shown[one.view == index]),
            )
        )
    given = {
        "engine": "literal",
        "declared": {"dtype": precision},
        "settings": {"dtype": precision},
        "capabilities": frozenset({"tokens", "logits", "replay", "deterministic"}),
        "vocabulary": work.vocabulary,
        "suite_digest": work.suite.digest,
        "prompt_ids": None,
        "passes": tuple(passes),
        "upcast_reason": "none was asked for",
        "basis": work.model.digest,
    }
    return Trace(**(given | more))
