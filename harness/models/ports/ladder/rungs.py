"""The rungs of the ladder by name, in the order in which each is measured on top of those before it."""

from __future__ import annotations

from collections.abc import Mapping

#: What each does. The baseline is what all of them are missing from.
RUNGS: Mapping[str, str] = {
    "alibi": "ALiBi and mask are made and summed once a step, not in every layer",
    "layout": "no copies: views of the fused projection, a preallocated KV cache, weights in one block of huge pages",
    "gelu": "bias and GELU in one operation",
    "softmax": "scale, bias, mask, softmax and the product with the values in one operation (SDPA)",
    "matvec": "an own kernel for products of few rows, which are bound by how fast weights come from memory",
    "compiled": "the whole decode step in one compiled function",
}
BASELINE, ALL = "none", "all"
#: Those that are own kernels: for a CPU, in float32 and bfloat16.
OWN = frozenset({"matvec", "compiled"})


def parse(text: str) -> frozenset[str]:
    """The rungs that a SPEC names: "alibi+layout", "all" or "none".

    Raises:
        ValueError: for a rung that there is not.
    """
    if text in (BASELINE, ALL):
        return frozenset(RUNGS if text == ALL else ())
    found = frozenset(text.split("+"))
    if unknown := found - RUNGS.keys():
        raise ValueError(f"all, none, or some of {'+'.join(RUNGS)}; there is no {'+'.join(sorted(unknown))}")
    return found


def join(rungs: frozenset[str]) -> str:
    """As a SPEC says it, in the order of the ladder."""
    return "+".join(name for name in RUNGS if name in rungs) or BASELINE


def ladder() -> list[frozenset[str]]:
    """The baseline, and each rung on top of those before it."""
    names = list(RUNGS)
    return [frozenset(names[:count]) for count in range(len(names) + 1)]
