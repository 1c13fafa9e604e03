"""What one side alone has: tensors that were never loaded, heads that are tied or are not, modules left out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from harness.locate.clues import Clue
from harness.locate.weights.casting import Casts
from harness.locate.weights.explaining import Sides, explain
from harness.locate.weights.fresh import fresh
from harness.locate.weights.pairing import Pairing, tensors
from harness.locate.weights.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Tables that old checkpoints store and every model derives.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)")


def absent(stored: Stored, pairing: Pairing, model: nn.Module, casts: Casts) -> Iterator[Clue]:
    """Clues of all that is in the checkpoint alone, or in the candidate alone."""
    yield from _missing(stored, pairing, model)
    embedding = _embedding(stored, pairing, model)
    heads = _head_names(model)
    for name in heads & set(pairing.tied):
        if embedding and name not in {one.candidate for one in pairing.pairs}:
            text = f"tied to {embedding} here, and not in the checkpoint: the same values"
            yield Clue(kind="weights", module=name.rpartition(".")[0], tensor=name, text=text, wrong=False)
    for name, tensor in pairing.extra.items():
        if name in heads and embedding and tuple(tensor.shape) == stored.shapes[embedding]:
            yield _untied(stored, name, tensor, embedding, casts)
        else:
            yield _extra(stored, name, tensor)


# --- in the checkpoint alone ---------------------------------------------------------------------


def _missing(stored: Stored, pairing: Pairing, model: nn.Module) -> Iterator[Clue]:
    """The highest module that has nothing in the candidate stands for all below it."""
    missing, there = _below(pairing.missing), _below(stored.shapes)
    ignored = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    said: set[str] = set()
    for name in pairing.missing:
        derived = _DERIVED.fullmatch(name) or any(one.search(name) for one in ignored)
        if derived:
            yield _clue(name, "in the checkpoint, and derived by the candidate", wrong=False)
            continue
        module = _highest(name, missing, there)
        if not module:
            yield _clue(name, "in the checkpoint, and not in the candidate", wrong=True)
        elif module not in said:
            said.add(module)
            count = missing[module]
            text = f"not in the candidate: none of its {count} tensors" if count > 1 else "not in the candidate"
            yield Clue(kind="weights", module=module, text=text, wrong=True, size=math.inf, evidence={"tensors": count})


def _below(names: Iterable[str]) -> Counter[str]:
    """By module, how many of these tensors it has below it."""
    return Counter(module for name in names for module in _modules(name))


def _modules(tensor: str) -> Iterator[str]:
    """The modules that a tensor is below, the highest first."""
    pieces = tensor.split(".")
    return (".".join(pieces[:end]) for end in range(1, len(pieces)))


def _highest(name: str, missing: Counter[str], there: Counter[str]) -> str:
    return next((module for module in _modules(name) if missing[module] == there[module]), "")


def _clue(tensor: str, text: str, *, wrong: bool, size: float = math.inf) -> Clue:
    return Clue(
        kind="weights",
        module=tensor.rpartition(".")[0],
        tensor=tensor,
        text=text,
        wrong=wrong,
        size=size if wrong else 0.0,
    )


# --- in the candidate alone ----------------------------------------------------------------------


def _head_names(model: nn.Module) -> set[str]:
    """Names under which the weight of the head is known."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    weight = getattr(head, "weight", None)
    names = {name for name, module in model.named_modules() if module is head and weight is not None}
    found = {f"{name}.weight" for name in names}
    return found | {
        name for name, _ in tensors(model) if re.search(r"(^|\.)(lm_head|head|embed_out|output)\.weight$", name)
    }


def _embedding(stored: Stored, pairing: Pairing, model: nn.Module) -> str:
    """The embedding's name in the checkpoint, "" where it is not known."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        weight = find().weight if callable(find) else None
    except (NotImplementedError, AttributeError):
        weight = None
    for one in pairing.pairs:
        if weight is not None and one.held.data_ptr() == weight.data_ptr() and "head" not in one.name:
            return one.name
    pattern = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in|tok_embeddings)\.weight$")
    return next((name for name in stored.shapes if pattern.search(name)), "")


def _untied(stored: Stored, name: str, tensor: torch.Tensor, embedding: str, casts: Casts) -> Clue:
    right, held = stored.read(embedding), tensor.cpu()
    several = casts(embedding, right, held.dtype)
    cast = min(several, key=lambda one: int((one != held).sum()))
    if bool((cast == held).all()):
        return _clue(name, f"a copy of {embedding}, and not in the checkpoint: the same values", wrong=False)
    difference = explain(Sides(stored=right, right=cast, held=held))
    words = (fresh(held, cast, stored.config) if not difference.exact else "") or difference.text
    return _clue(name, f"should be tied to {embedding}, and is not: {words}", wrong=True, size=difference.size)


def _extra(stored: Stored, name: str, tensor: torch.Tensor) -> Clue:
    held = tensor.cpu()
    if name.endswith("bias") and not bool(held.any()):
        return _clue(name, "not in the checkpoint, and zero: it adds nothing", wrong=False)
    if "norm" in name and held.ndim == 1 and bool((held == 1).all()):
        return _clue(name, "not in the checkpoint, and one: it changes nothing", wrong=False)
    words = fresh(held, None, stored.config)
    return _clue(name, f"not in the checkpoint{': ' if words else ''}{words}", wrong=True)
