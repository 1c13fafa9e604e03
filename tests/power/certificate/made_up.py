"""A bug of which only what it needs is of interest, and runs that have it or not."""

from __future__ import annotations

from contextlib import contextmanager

from harness.mutations.mutation import Mutation
from harness.values import Run

SINGLE = Run(name="single", batch_size=1, views=("replay", "prefill"))
BATCH = Run(name="batch", batch_size=2, views=("replay", "prefill"))
FREE = Run(name="free", batch_size=1, views=("generate",))
ORDER = Run(name="order", batch_size=1, order="A-B-A", views=("replay",))
PREFILL = Run(name="prefill", batch_size=2, views=("prefill",))


@contextmanager
def _nothing(_engine, _strength):
    yield


def bug(*active, shows="logits", **more):
    """A bug that is active so and changes nothing."""
    given = {
        "id": "made-up", "group": "cache", "wrong": "nothing", "reference": "", "hosts": frozenset({"llama-tiny"}),
        "active": frozenset(active or ("fp32",)), "shows": shows, "change": _nothing,
    }  # fmt: skip
    return Mutation(**(given | more))
