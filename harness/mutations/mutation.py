"""A bug of the catalogue as data, and the ways in which one is put into a live engine and taken out again.

A mutation changes an open `hf` engine: the weights, modules or config of its model, or how the engine drives it.
Whatever happens inside its ``with`` block, afterwards everything is as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

Group = Literal[
    "conversion",
    "positions",
    "attention",
    "cache",
    "norms",
    "tensor parallel",
    "pipeline parallel",
    "quantisation",
    "stopping",
    "serving",
    "precision",
    "kernels",
]
Subtlety = Literal["gross", "moderate", "subtle"]

#: Where a bug does anything at all. "fp32": in every precision; "half": in 16 bits alone; "decode", "prefill": on that
#: path alone; "padding": rows with padding; "batch": more than one row; "single": one row; "long": long sequences;
#: "chunk": prompts in pieces; "second": a request after another in the same engine; "free": where tokens are its own.
Active = Literal["fp32", "half", "decode", "prefill", "padding", "batch", "single", "long", "chunk", "second", "free"]

#: What a bug changes. "logits": those of a forced pass; "tokens": free continuations, their length or their end;
#: "prompt": the ids that are fed; "bits": nothing but whether a repeat gives the same.
Shows = Literal["logits", "tokens", "prompt", "bits"]

Change = Callable[["HFEngine", float], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """One bug that shipped in a public project.

    Attributes:
        id: as shared/bugs.md names it, "wc-qkv-cat".
        group: what part of an implementation it is in.
        wrong: the wrong maths, in one line.
        reference: where it was reported, "owner/repo#number"; "" where no report is known.
        hosts: names of harness/mutations/hosts.py that have the part.
        subtlety: gross (first tokens wrong), moderate (wrong on most prompts), subtle (tokens on short prompts match).
        active: where it does anything; all that is named must hold.
        shows: what it changes.
        strengths: values of its knob, from the report's own (1.0) to weaker ones; (1.0,) where it has none.
        harmless: a negative control: it computes the same function, and must not be flagged.
        options: keys of the `hf` SPEC that it needs ("chunk", "static_cache", ...).
        change: puts it into an open engine, with a strength.
    """

    id: str
    group: Group
    wrong: str
    reference: str
    hosts: frozenset[str]
    subtlety: Subtlety = "moderate"
    active: frozenset[Active] = frozenset({"fp32"})
    shows: Shows = "logits"
    strengths: tuple[float, ...] = (1.0,)
    harmless: bool = False
    options: tuple[tuple[str, str], ...] = ()
    change: Change

    def applied(self, engine: HFEngine, strength: float = 1.0) -> AbstractContextManager[None]:
        """Put the bug into an open engine inside the ``with`` block.

        Raises:
            LookupError: on entry, where the model lacks the part.
        """
        return self.change(engine, strength)


def catalogue(*mutations: Mutation) -> Mapping[str, Mutation]:
    """Mutations by their ids.

    Raises:
        ValueError: for an id that is there twice.
    """
    found = {one.id: one for one in mutations}
    if len(found) != len(mutations):
        raise ValueError("an id of the catalogue is there twice")
    return found


# --- ways to change a live engine ------------------------------------------------------------------


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a module, config, engine or Python module; afterwards they are what they were, or gone.

    On an nn.Module, registered submodules, parameters and buffers are replaced through their own tables.
    """
    missing = object()
    # vars(), not getattr: an instance's own attribute may hide one of its class, and goes away again.
    before = {name: vars(owner).get(name, missing) for name in attributes}
    registered = {name: table for name in attributes for table in _tables(owner) if name in table}
    kept = {name: table[name] for name, table in registered.items()}
    try:
        for name, value in attributes.items():
            if name in registered:
                registered[name][name] = value
            else:
                _set(owner, name, value)
        yield
    finally:
        for name, table in registered.items():
            table[name] = kept[name]
        for name, value in before.items():
            if name in registered:
                continue
            if value is not missing:
                _set(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name) if isinstance(owner, type) else vars(owner).pop(name)


def _set(owner: Any, name: str, value: Any) -> None:
    # An nn.Module would register a module or a tensor; a class lets nobody write to its vars().
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        vars(owner)[name] = value


def _is_module(owner: Any) -> bool:
    from torch import nn

    return isinstance(owner, nn.Module)


def _tables(owner: Any) -> list[dict[str, Any]]:
    if not _is_module(owner):
        return []
    return [owner._modules, owner._parameters, owner._buffers]


@contextmanager
def rewritten(*tensors: torch.Tensor) -> Iterator[None]:
    """Weights and buffers that are changed in place inside the block, by the caller, and put back afterwards."""
    import torch

    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)


@contextmanager
def hooked(*hooks: tuple[nn.Module, Callable[..., Any], bool]) -> Iterator[None]:
    """Hooks (module, function, whether before its forward), with keyword arguments, for the length of the block."""
    with ExitStack() as stack:
        for module, function, before in hooks:
            if before:
                handle = module.register_forward_pre_hook(function, with_kwargs=True)
            else:
                handle = module.register_forward_hook(function, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def together(changes: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    """Several changes as one."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


# --- parts of the hosts ----------------------------------------------------------------------------


def blocks(model: PreTrainedModel) -> Any:
    """The transformer blocks, first to last."""
    return part(part(model, "transformer", "model"), "h", "layers")


def attention_of(block: nn.Module) -> Any:
    """The self-attention of a block."""
    return part(block, "self_attn", "self_attention", "attn")


def part(owner: Any, *names: str) -> Any:
    """The first attribute that is there.

    Raises:
        LookupError: where there is none of them.
    """
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise LookupError(f"{type(owner).__name__} has none of {', '.join(names)}")


def weight_rows(layer: nn.Module) -> torch.Tensor:
    """The weight [out, in] of a Linear, or a view of GPT-2's Conv1D, which keeps [in, out]."""
    from torch import nn

    weight: torch.Tensor = layer.get_parameter("weight")
    return weight if isinstance(layer, nn.Linear) else weight.T
