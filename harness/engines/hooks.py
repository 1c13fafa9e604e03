"""Watch the outputs of named modules of a live model, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    import torch

Observe = Callable[[str, "torch.Tensor"], None]


@contextmanager
def watched(model: torch.nn.Module, names: Sequence[str], observe: Observe) -> Iterator[None]:
    """Call ``observe(name, output)`` after each forward of the named modules; the first tensor of a tuple.

    Raises:
        UsageError: for a name that the model does not have.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        fix = "Names are those of model.named_modules(), e.g. transformer.h.2"
        raise UsageError(f"the model has no module {unknown[0]!r}", fix=fix)
    handles = [modules[name].register_forward_hook(_hook(name, observe)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, observe: Observe) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        observe(name, output[0] if isinstance(output, tuple) else output)

    return hook


def block_names(model: torch.nn.Module) -> list[str]:
    """Names of the transformer blocks: the entries of the longest ModuleList."""
    from torch import nn

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return []
    longest = max(lists, key=lambda name: len(lists[name]))
    return [f"{longest}.{index}" for index in range(len(lists[longest]))]
