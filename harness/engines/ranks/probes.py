"""What a model computes inside its blocks, at the places where ranks meet: on a rank, and on the whole model.

The places are the inputs of layers that are summed over shards (of most, each rank has its own columns), each rank's
partial product, the sums themselves, what enters a stage, and what leaves each block. One prefill of prompts of equal
length, in one batch.

Shape legend: B batch rows, T tokens, W columns, N = B * T rows, J projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from harness.engines import decoding, hooks
from harness.engines.ranks import evidence, plans
from harness.numerics.sketch import Sketcher, plain_signs
from harness.values import Golden, Request

if TYPE_CHECKING:
    import torch

    from harness.engines.hf import HFEngine
    from harness.engines.ranks.rank import RankEngine

#: Prompts of a probe, and tokens of each.
PROMPTS, TOKENS = 4, 24

#: A place is wrong from this multiple of the largest distance that benign variants of the reference show there.
FACTOR = 4.0
#: And from this share of what is computed there: at a place that no variant changes there is no distance to take.
LEAST = 1e-6

Side = Literal["input", "partial", "output"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One place on one rank: its module in the whole model, which side of it, and projections of it [N, J]."""

    module: str
    side: Side
    values: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """One place in the whole model, all columns of it [N, W].

    ``summed`` for an input of which a shard has its own columns, and for a partial product: then ``values`` are that
    layer's input, and ``projected_weight`` are projections [W, J] of its weight [W, outputs].
    """

    module: str
    side: Side
    summed: bool
    values: NDArray[np.float64]
    projected_weight: NDArray[np.float64] | None = None

    def of(self, shard: int, size: int, cut: Callable[[str, int], plans.Cut] | None = None) -> NDArray[np.float64]:
        """Projections of what a shard should hold of it, [N, J].

        Args:
            shard: its number.
            size: how many there are.
            cut: how a module's units are cut along a dimension; None is as transformers cuts.
        """
        import torch

        own = torch.from_numpy(self.values)
        if self.summed:
            own = self._cut(cut, 1).of(own, shard, size)
        if self.projected_weight is None:
            return projected(own)
        # Projections are linear: those of the product are the product with those of the weight.
        weight = self._cut(cut, 0).of(torch.from_numpy(self.projected_weight), shard, size)
        product: NDArray[np.float64] = (own @ weight).numpy()
        return product

    def _cut(self, cut: Callable[[str, int], plans.Cut] | None, dim: int) -> plans.Cut:
        return plans.Cut(dim=dim) if cut is None else cut(self.module, dim)


def asked(golden: Golden) -> tuple[list[Request], list[tuple[int, ...]]]:
    """The work of a probe: the beginnings of the golden's longest prompts, cut to one length."""
    longest = sorted(golden.requests, key=lambda one: -len(one.prompt_ids))[:PROMPTS]
    length = min(TOKENS, *(len(one.prompt_ids) for one in longest)) if longest else 0
    requests = [Request(id=one.id, prompt_ids=one.prompt_ids[:length], max_new_tokens=1) for one in longest]
    # A last token that nobody looks at: a teacher-forced pass leaves out what it has no successor for.
    return requests, [(0,)] * len(requests)


def projected(tensor_NW: torch.Tensor) -> NDArray[np.float64]:
    """Random projections [N, J] in float64."""
    wide: NDArray[np.float64] = tensor_NW.detach().double().cpu().numpy()
    return wide @ plain_signs(wide.shape[1]).T


def of_rank(engine: RankEngine, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[Shown]:
    """The places of a rank, in the order of its forward."""
    blocks = hooks.block_names(engine.model)
    summed = engine.summed_layers()
    names = {name: evidence.name_in_model(engine, name) for name in [*blocks, *summed]}
    with (
        _collected(engine.model, [*blocks[:1], *summed], [*summed, *blocks]) as found,
        engine.before_sums(lambda partial: _take_partial(found, summed, partial)),
    ):
        _prefill(engine, requests, continuations)
    return [
        Shown(module=names[name], side=side, values=projected(_rows(parts)))
        for (name, side), parts in found.items()
    ]  # fmt: skip


def of_whole(
    engine: HFEngine, requests: Sequence[Request], continuations: Sequence[Sequence[int]]
) -> dict[tuple[str, Side], Whole]:
    """The same places of a model in one process, by module and side."""
    blocks = hooks.block_names(engine.model)
    summed, split = plans.summed_layers(engine.model), plans.summed_layers(engine.model, plans.SPLIT)
    with _collected(engine.model, [*blocks, *summed], [*summed, *blocks]) as found:
        _prefill(engine, requests, continuations)
    places: dict[tuple[str, Side], Whole] = {}
    for (name, side), parts in found.items():
        values = _rows(parts).double().numpy()
        own = side == "input" and name in split
        places[name, side] = Whole(module=name, side=side, summed=own, values=values)
        if side == "input" and name in summed:
            weight = _projected_weight(engine.model, name)
            places[name, "partial"] = Whole(
                module=name, side="partial", summed=True, values=values, projected_weight=weight
            )
    return places


def _projected_weight(model: Any, name: str) -> NDArray[np.float64]:
    """Projections [inputs, J] of a layer's weight [inputs, outputs]: a Linear keeps it so turned round, a Conv1D so."""
    from torch import nn

    module = model.get_submodule(name)
    return projected(module.weight.T if isinstance(module, nn.Linear) else module.weight)


def _prefill(engine: HFEngine, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> None:
    decoding.teacher_forced(
        engine.decoder, requests, continuations, batch_size=len(requests), sketcher=Unheard(engine.vocabulary)
    )


class Unheard(Sketcher):
    """Takes the logits of a rank that is not asked for them; on most ranks there are none."""

    def add(self, *_arguments: Any, **_keywords: Any) -> None:
        """Nothing."""


def _rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Micro-batches one after another, as [N, W] on the CPU."""
    import torch

    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).detach().cpu()


def _take_partial(
    found: dict[tuple[str, Side], list[torch.Tensor]], summed: Sequence[str], partial: torch.Tensor
) -> None:
    """What is given to an all-reduce behind the input of a summed layer is this rank's partial product of it."""
    last = next(reversed(found), None)
    if last is not None and last[0] in summed and last[1] in ("input", "partial"):
        found.setdefault((last[0], "partial"), []).append(partial.clone())


@contextmanager
def _collected(
    model: Any, inputs: Sequence[str], outputs: Sequence[str]
) -> Iterator[dict[tuple[str, Side], list[torch.Tensor]]]:
    """Inputs and outputs of named modules while the block lasts, in the order in which they are first computed."""
    found: dict[tuple[str, Side], list[torch.Tensor]] = {}

    def take(name: str, side: Side, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        found.setdefault((name, side), []).append(tensor.clone())

    handles = []
    for name in inputs:
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, kwargs, name=name: take(name, "input", args or kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    for name in outputs:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, name=name: take(name, "output", output)
            )
        )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
