"""Where a mutation changes the logits: on which view, in which rows, at which positions; and whether it goes away."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch

from conftest import ROOT
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.mutations import hosts
from harness.values import Request
from tests.engines.recorder import recorded
from tests.mutations.applied import unharmed

_IDS = torch.randint(3, 300, (240,), generator=torch.Generator().manual_seed(6)).tolist()

#: Past the original RoPE length of every host (128 at most) and every window; within the first chunk and every window.
LONG, SHORT, MIDDLE = 140, 9, 38
LENGTHS = (LONG, SHORT, MIDDLE)
REQUESTS = tuple(
    Request(id=str(length), prompt_ids=tuple(_IDS[start : start + length]), max_new_tokens=3)
    for start, length in zip((0, LONG, LONG + SHORT), LENGTHS, strict=True)
)
CONTINUATIONS = ((7, 8, 9), (44, 3, 120), (11, 5, 60))
CHUNK = 16

#: (view, rows a batch): the three in one left-padded batch, or one after another.
RUNS = (("replay", 3), ("replay", 1), ("prefill", 3), ("prefill", 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One row of logits: its run, its request, and the position of the token that it foretells."""

    view: str
    rows: int
    request: int
    position: int

    def holds(self, axis: str, *, long: int) -> bool:
        """Whether what is active on this axis alone could show here; ``long``: of more than so many tokens."""
        prompt = LENGTHS[self.request]
        decode = self.view == "replay" and self.position > prompt
        # In a step of a batch the longest row is as long as it is.
        length = LONG + self.position - prompt if decode and self.rows > 1 else self.position
        fed = prompt if self.view == "replay" else prompt + 2
        return {
            "fp32": True,
            "decode": decode,
            "padding": self.rows > 1 and LENGTHS[self.request] < LONG,
            "batch": self.rows > 1,
            "single": self.rows == 1,
            "long": length > long,
            "chunk": self.rows > 1 or fed > CHUNK,
            "second": self.rows == 1 and self.request > 0,
        }[axis]


class Trials:
    """Open engines, by host, dtype and options, for all tests of a module."""

    def __init__(self, scratch):
        self._scratch = scratch
        self._stack = ExitStack()
        self._engines = {}
        self._right = {}

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._stack.close()

    def engine(self, host, options=(), dtype="float64"):
        key = (host, options, dtype)
        if key not in self._engines:
            directory = hosts.model_directory(host, goldens=ROOT / "golden", scratch=self._scratch)
            text = "hf:" + ",".join(f"{name}={value}" for name, value in (("dtype", dtype), *options))
            self._engines[key] = self._stack.enter_context(hf.build(parse_spec(text), model=str(directory)))
        return self._engines[key]

    def right(self, host, options, run):
        """The logits of the model as it is, in float64."""
        key = (host, options, run)
        if key not in self._right:
            rest(self.engine(host, options))
            self._right[key] = shown(self.engine(host, options), run)
        return self._right[key]


def rest(engine):
    """One short request, which puts the frequencies of dynamic RoPE back to where a fresh model has them."""
    recorded(engine, "prefill", REQUESTS[1:2], CONTINUATIONS[1:2])


def shown(engine, run):
    """Place -> logits [V], float64, of a run; the longest request comes first."""
    view, rows = run
    found = recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=rows)
    return {Place(view=view, rows=rows, request=r, position=p): row for (r, p), row in found.items()}


def changed(one, other):
    """Place -> the largest difference over the largest logit, where any bit differs."""
    assert one.keys() == other.keys()
    size = max(float(row.abs().max()) for row in other.values())
    return {
        place: float((row - other[place]).abs().max()) / size
        for place, row in one.items()
        if not torch.equal(row, other[place])
    }


def wrong(trials, mutation, host, strength=1.0, runs=RUNS):
    """Place -> change, of the logits of a host with a mutation, each run in a block of its own, which it survives."""
    engine, found = trials.engine(host, mutation.options), {}
    for run in runs:
        right = trials.right(host, mutation.options, run)
        rest(engine)
        with unharmed(engine), mutation.applied(engine, strength):
            logits = shown(engine, run)
        assert all(row.isfinite().all() for row in logits.values())
        found.update(changed(logits, right))
    return found


def check_active(trials, mutation, host, *, long=0):
    """It changes the logits where it says so, and no bit anywhere else."""
    found = wrong(trials, mutation, host)
    assert max(found.values(), default=0.0) > 1e-6
    outside = [place for place in found if not all(place.holds(axis, long=long) for axis in mutation.active)]
    assert not outside


def check_strengths(trials, mutation, host):
    """Each strength changes the logits, the weakest less than the report's own."""
    run = ("replay", 3 if "batch" in mutation.active else 1)
    sizes = [max(wrong(trials, mutation, host, strength, [run]).values()) for strength in mutation.strengths]
    assert min(sizes) > 1e-9
    assert sizes[-1] < sizes[0] or len(sizes) == 1


def check_undone(trials, mutation, host):
    """After an error in the block model, config and engine are as they were, bit for bit, and so are the logits."""
    engine, run = trials.engine(host, mutation.options), ("replay", 1)
    before = trials.right(host, mutation.options, run)
    rest(engine)
    with unharmed(engine), suppress(ZeroDivisionError), mutation.applied(engine):
        rest(engine)
        raise ZeroDivisionError
    assert not changed(shown(engine, run), before)


def check_precisions(trials, mutation, host, *, dtype):
    """In a lower precision it changes finite logits, goes away, and does the same to an upcast copy."""
    run = ("replay", 3 if mutation.active & {"batch", "padding"} else 1)
    engine = trials.engine(host, mutation.options, dtype)
    engines = [engine]
    with ExitStack() as stack:
        if dtype == "bfloat16":
            engines.append(stack.enter_context(engine.upcast()))
        for each in engines:
            rest(each)
            right = shown(each, run)
            rest(each)
            with unharmed(each), mutation.applied(each):
                logits = shown(each, run)
            assert all(row.isfinite().all() for row in logits.values())
            assert changed(logits, right)
            rest(each)
            assert not changed(shown(each, run), right)
