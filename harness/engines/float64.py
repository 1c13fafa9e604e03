"""True float64 for models that cast to float32 inside, and the audit that proves it.

``model.double()`` is not a float64 reference: RoPE, RMSNorm, softmax and others are cast to float32
inside (measured 1.4e-5 off on a Llama, half of what fp32 itself is off). `Float64Lift` maps each
request for a narrower float to float64 while it is active; the `Audit` watches every operation that
is dispatched and names the first one that still made a narrower float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.engines.base import Engine
from harness.numerics.sketch import Sketcher
from harness.values import Request

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS: Mapping[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
}


class Float64Lift(TorchFunctionMode):
    """While active, whoever asks for float32, float16 or bfloat16 gets float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        func = _CASTS.get(func, func)
        return func(*map(_lift, args), **{key: _lift(value) for key, value in (kwargs or {}).items()})


def _lift(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class Audit(TorchDispatchMode):
    """Watches every dispatched operation; ``violations`` name those that made a float of the ``narrow`` dtypes.

    These are all below 64 bits by default.
    """

    def __init__(self, narrow: tuple[torch.dtype, ...] = _NARROW) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._narrow = narrow
        self.operations = 0
        self.violations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Nothing may be lifted here that a run without an audit leaves narrow: TorchScript comes this way only.
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in self._narrow and leaf.numel():
                self.violations.append(f"{func} makes {str(leaf.dtype).removeprefix('torch.')}")
        return result


def narrow_operation(engine: Engine) -> str:
    """The first operation of an open engine that makes a float below 32 bits, in words; empty where there is none."""
    with Audit((torch.float16, torch.bfloat16)) as audit:
        audited_steps(engine)
    return audit.violations[0] if audit.violations else ""


def audited_steps(engine: Engine) -> None:
    """A padded prefill and a decode step; from an engine without a decode loop the prefill alone."""
    ids = list(range(3, 11)) if engine.vocabulary > 11 else [0] * 8
    requests = [
        Request(id="audit-long", prompt_ids=tuple(ids), max_new_tokens=2),
        Request(id="audit-padded", prompt_ids=tuple(ids[:3]), max_new_tokens=2),
    ]
    if "tokens" in engine.capabilities:
        engine.generate(requests, batch_size=2, stop_ids=frozenset())
    else:
        engine.prefill(requests, [(ids[0],)] * 2, batch_size=2, sketcher=Sketcher(engine.vocabulary))
