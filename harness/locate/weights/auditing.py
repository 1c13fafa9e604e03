"""Every tensor of a live candidate against the checkpoint, without running it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.locate.clues import Clue
from harness.locate.naming import Names
from harness.locate.weights import origins
from harness.locate.weights.casting import Casts, input_dim
from harness.locate.weights.compensated import compensated
from harness.locate.weights.explaining import Difference, Sides, explain
from harness.locate.weights.fresh import fresh
from harness.locate.weights.layouts import layout_of
from harness.locate.weights.missing import absent
from harness.locate.weights.pairing import Pair, Pairing, pair
from harness.locate.weights.proposing import propose
from harness.locate.weights.stored import Stored, opened

if TYPE_CHECKING:
    import torch
    from torch import nn

_LAYER = re.compile(r"(?<![^.])([0-9]+)(?![^.])")


def audit(
    checkpoint: Path, model: nn.Module, names: Names | None = None, *, declared: str | None = None
) -> tuple[Clue, ...]:
    """Compare the parameters and persistent buffers of a live model with a checkpoint's safetensors.

    A tensor is right if it is the stored one, or exactly that after the declared cast and the cast to the dtype that
    it is held in. Nothing is run, and one tensor of the checkpoint is in memory at a time.

    Args:
        checkpoint: a model directory.
        model: the candidate as it is loaded, in any dtype.
        names: what the candidate's tensors are made of where their names are not the checkpoint's; what it leaves out
            goes by name, and what is left then by content (`propose`).
        declared: how the candidate says that it stores its weights: a dtype, or one of `quantise.SCHEMES`; None: in
            the dtype in which they are.

    Returns:
        Deviations and notes, in the checkpoint's order; what one cause explains in a whole block is one clue.

    Raises:
        ModelError: where the checkpoint cannot be read.
    """
    stored = opened(checkpoint)
    casts = Casts(declared=declared, config=stored.config)
    pairing = pair(stored, model, names)
    if pairing.missing and pairing.extra:
        pairing = pair(stored, model, {**(names or {}), **propose(stored, pairing, casts)})
    clues = [*_compared(stored, pairing, casts), *absent(stored, pairing, model, casts)]
    place = _places(stored)
    return tuple(
        sorted(_folded(stored, clues), key=lambda clue: place.get(clue.tensor or f"{clue.module}.", len(place)))
    )


def _places(stored: Stored) -> dict[str, int]:
    """By tensor, and by module with a dot behind it: the index of it, or of the first tensor below it."""
    places: dict[str, int] = {}
    for index, name in enumerate(stored.shapes):
        places[name] = index
        for end in (at for at, letter in enumerate(name) if letter == "."):
            places.setdefault(name[: end + 1], index)
    return places


# --- what is on both sides ---------------------------------------------------------------------


def _compared(stored: Stored, pairing: Pairing, casts: Casts) -> Iterator[Clue]:
    """What differs is looked at pair by pair, so that one of them is in memory at a time."""
    others: dict[str, Pair] = {}
    wanted: dict[str, origins.Asked] = {}
    for one in pairing.pairs:
        outcome = _different(stored, one, casts)
        if isinstance(outcome, Clue):
            yield outcome
        elif outcome is not None:
            key = f"{one.name} {one.candidate}"
            others[key], wanted[key] = one, origins.asked(one.name, outcome.held)
    elsewhere = origins.origins(stored, wanted, casts)
    differences = _explained(stored, others, elsewhere, casts)
    alone = _in_one_place(pairing)
    harmless = compensated(stored, {one.name: differences[key] for key, one in others.items() if one.name in alone})
    for key, one in others.items():
        clue = _clue(stored, one, differences[key], pairing)
        note = harmless.get(one.name)
        yield clue if note is None else replace(clue, wrong=False, size=0.0, text=note)


def _in_one_place(pairing: Pairing) -> set[str]:
    """Tensors of the checkpoint that the candidate has whole and once: what is said of the one holds for the other."""
    places: dict[str, set[tuple[int, bool]]] = defaultdict(set)
    for one in pairing.pairs:
        places[one.name].add((one.held.data_ptr(), one.made is None))
    return {name for name, each in places.items() if len(each) == 1 and next(iter(each))[1]}


def _different(stored: Stored, one: Pair, casts: Casts) -> Sides | Clue | None:
    """None where it is equal; a clue where there is nothing to explain element by element."""
    if one.held.device.type == "meta":
        return _plain(one, "has no memory: it was never loaded", wrong=True)
    right, held = one.stored(stored), one.held.cpu()
    if held.is_floating_point() != right.is_floating_point():
        return _plain(one, f"is {str(held.dtype).removeprefix('torch.')}, and was not compared", wrong=False)
    if right.shape != held.shape:
        return _misshapen(one, right, held, casts)
    sides = _sides(stored, one, casts)
    return None if bool((sides.right == sides.held).all()) else sides


def _sides(stored: Stored, one: Pair, casts: Casts) -> Sides:
    right, held = one.stored(stored), one.held.cpu()
    nearest = min(casts(one.name, right, held.dtype), key=lambda cast: int((cast != held).sum()))
    layout = layout_of(one.name, tuple(right.shape), stored.config)
    return Sides(stored=right, right=nearest, held=held, layout=layout, input_dim=input_dim(one.name, stored.config))


def _misshapen(one: Pair, right: torch.Tensor, held: torch.Tensor, casts: Casts) -> Clue:
    each = casts(one.name, right, held.dtype)
    shapes = f"{list(held.shape)} for {list(right.shape)}"
    if held.ndim == 2 and held.shape == right.T.shape and any(bool((held == cast.T).all()) for cast in each):
        return _plain(one, f"transposed, {shapes}", wrong=True, size=1.0)
    if held.ndim == right.ndim and held.shape[1:] == right.shape[1:]:
        common = min(len(held), len(right))
        if any(bool((held[:common] == cast[:common]).all()) for cast in each):
            if len(held) > len(right):
                zero = " of zeros" if not bool(held[common:].any()) else ""
                return _plain(one, f"{len(held) - common} rows{zero} behind the checkpoint's {common}", wrong=False)
            return _plain(one, f"the last {len(right) - common} of {len(right)} rows are cut off", wrong=True, size=1.0)
    return _plain(one, f"another shape, {shapes}", wrong=True, size=math.inf)


def _plain(one: Pair, text: str, *, wrong: bool, size: float = 0.0) -> Clue:
    return Clue(kind="weights", module=module_of(one.name), tensor=one.name, text=text, wrong=wrong, size=size)


def module_of(tensor: str) -> str:
    """The module that a tensor is of."""
    return tensor.rpartition(".")[0]


def _explained(
    stored: Stored, others: Mapping[str, Pair], elsewhere: Mapping[str, str], casts: Casts
) -> dict[str, Difference]:
    """Weights before biases, which may be in the order of their weights."""
    found: dict[str, Difference] = {}
    orders: dict[str, Difference] = {}
    for key, one in sorted(others.items(), key=lambda item: -item[1].held.ndim):
        sides = _sides(stored, one, casts)
        module = module_of(one.name)
        hint = orders[module].order if module in orders else None
        # An order of the rows that the weight is stored with is one of the bias; Conv1D keeps outputs in columns.
        outputs = hint is not None and hint[0] == 1 - sides.input_dim
        difference = explain(sides, hint if outputs else None)
        if sides.held.ndim == 2:
            orders[module] = difference
        if key in elsewhere and (not difference.exact or elsewhere[key].startswith("holds")):
            difference = replace(difference, text=elsewhere[key], exact=True)
        elif not difference.exact and math.isfinite(difference.size):
            words = fresh(sides.held, sides.right, stored.config)
            difference = replace(difference, text=words or difference.text)
        found[key] = difference
    return found


def _clue(stored: Stored, one: Pair, difference: Difference, pairing: Pairing) -> Clue:
    text = difference.text
    first = pairing.tied.get(one.candidate)
    if first is not None and text.startswith("holds "):
        text = f"tied to {text.removeprefix('holds ')}, but the checkpoint has its own"
        if stored.config.get("tie_word_embeddings"):
            text += " (transformers, which finds both, does not tie them, whatever config.json says)"
    elif text.startswith("holds ") and "embed" in text + one.name and "head" in one.name:
        text = f"equals {text.removeprefix('holds ')}, but the checkpoint has its own"
    return Clue(
        kind="weights",
        module=module_of(one.name),
        tensor=one.name,
        text=text,
        wrong=True,
        size=difference.size,
        evidence=difference.evidence,
    )


# --- one cause in a whole block ----------------------------------------------------------------


def _folded(stored: Stored, clues: list[Clue]) -> Iterator[Clue]:
    """Where each tensor of a block that is another holds that of one other block, one clue says so."""
    groups: dict[tuple[str, str], list[Clue]] = {}
    for clue in clues:
        blocks = _block_held(clue)
        if blocks is not None:
            groups.setdefault(blocks, []).append(clue)
    swapped = {blocks for blocks in groups if (blocks[1], blocks[0]) in groups}
    done: set[int] = set()
    for (here, there), each in groups.items():
        if len(each) > 1:
            done |= {id(clue) for clue in each}
            how = "swapped with" if (here, there) in swapped else "holds the weights of"
            total = sum(1 for name in stored.shapes if name.startswith(f"{here}."))
            every = "" if len(each) == total else f" in {len(each)} of {total} tensors"
            largest = max(each, key=lambda clue: clue.size)
            yield replace(largest, module=here, tensor="", text=f"{how} {there}{every}")
    yield from (clue for clue in clues if id(clue) not in done)


def _block_held(clue: Clue) -> tuple[str, str] | None:
    """(block, the one whose tensor of the same name it holds)."""
    if not clue.text.startswith("holds "):
        return None
    other = clue.text.removeprefix("holds ")
    mine, theirs = _LAYER.search(clue.tensor), _LAYER.search(other)
    if mine is None or theirs is None:
        return None
    same = clue.tensor[mine.end() :] == other[theirs.end() :] and clue.tensor[: mine.start()] == other[: theirs.start()]
    return (clue.tensor[: mine.end()], other[: theirs.end()]) if same else None
