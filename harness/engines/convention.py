"""How a port is called: which of four arguments it takes, by their names or by their positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError

#: What a port may take, in the order of its positions.
ARGUMENTS = ("input_ids", "position_ids", "attention_mask", "cache")

_POSITIONAL_ONLY, _POSITIONAL = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """Which of ARGUMENTS a port takes, and whether by their names or by their positions."""

    names: tuple[str, ...]
    by_name: bool

    def call(self, port: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Call the port with what it takes of ``given``."""
        if self.by_name:
            return port(**{name: given[name] for name in self.names})
        return port(*(given[name] for name in self.names))


def convention_of(port: Any) -> Convention:
    """How a port is called: by name where its signature has ``input_ids``, else by position.

    By position it gets as many arguments as it asks for, and those with a default that are called as in ARGUMENTS.

    Raises:
        UsageError: for a port that takes nothing, or that asks for something else.
    """
    parameters = parameters_of(port)
    if parameters is None or any(one.kind is one.VAR_POSITIONAL for one in parameters.values()):
        return Convention(names=ARGUMENTS, by_name=False)
    named = tuple(name for name in ARGUMENTS if name in parameters)
    by_name = "input_ids" in named and all(parameters[name].kind is not _POSITIONAL_ONLY for name in named)
    taken = named if by_name else tuple(list(parameters)[: _count(list(parameters.values()))])
    names = named if by_name else ARGUMENTS[: len(taken)]
    more = [name for name, one in parameters.items() if name not in taken and _is_required(one)]
    if more or not names:
        wrong = f"asks for {more[0]!r}" if more else "takes no argument"
        fix = f"It may take {', '.join(ARGUMENTS)}: by these names, or by position in this order"
        raise UsageError(f"the port {name_of(port)} {wrong}", fix=fix)
    return Convention(names=names, by_name=by_name)


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters that a call takes, None where they cannot be seen (a compiled extension)."""
    from torch import nn

    function = getattr(function, "_orig_mod", function)  # torch.compile hides the signature of what it wraps
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):
        return None


def _count(parameters: Sequence[inspect.Parameter]) -> int:
    """How many arguments are given by position."""
    places = [one for one in parameters if one.kind in (_POSITIONAL_ONLY, _POSITIONAL)][: len(ARGUMENTS)]
    pairs = enumerate(zip(places, ARGUMENTS, strict=False), start=1)
    return max((place for place, (one, name) in pairs if _is_required(one) or one.name == name), default=0)


def _is_required(parameter: inspect.Parameter) -> bool:
    optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not optional


def model_name(port: Any) -> str:
    """The name of a function or a class, or the class of any other object."""
    named = inspect.isroutine(port) or isinstance(port, type)
    return str(getattr(port, "__name__", "")) if named else type(port).__name__


def name_of(port: Any) -> str:
    """What reports call an object."""
    kind = "function" if inspect.isroutine(port) else "class" if isinstance(port, type) else "object"
    return f"{model_name(port)} {kind}"
