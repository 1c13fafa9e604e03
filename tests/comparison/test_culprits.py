from __future__ import annotations

import numpy as np
import pytest

from harness.comparison.culprits import first_wrong
from harness.engines.ranks.layout import Layout
from harness.engines.ranks.probes import Shown, Whole, projected

#: Input of block 0, input and output of its summed layer, output of block 0: a model of one block and 6 columns.
_PLACES = [
    ("h.0", "input", False),
    ("h.0.dense", "input", True),
    ("h.0.dense", "output", False),
    ("h.0", "output", False),
]


def _model(seed: int = 0, noise: float = 0.0) -> dict:
    numbers, small = np.random.default_rng(0), np.random.default_rng(seed)
    return {
        (module, side): Whole(
            module=module, side=side, summed=summed,
            values=numbers.standard_normal((8, 6)) + noise * small.standard_normal((8, 6)),
        )
        for module, side, summed in _PLACES
    }  # fmt: skip


_VARIANTS = [_model(seed, 1e-6) for seed in (1, 2, 3)]


def _shown(shard: int, size: int, wrong: tuple[str, str] | None = None, by: float = 1e-3) -> list[Shown]:
    whole = _model(9 + shard, 1e-6)
    found = []
    for place, one in whole.items():
        values = one.of(shard, size)
        found.append(Shown(module=one.module, side=one.side, values=values + (by if place == wrong else 0.0)))
    return found


def test_right_ranks_are_not_named() -> None:
    """Round-off of the size of the variants' is no fault."""
    assert first_wrong([_shown(0, 2), _shown(1, 2)], _model(), _VARIANTS, Layout(tensor=2)) == ""


def test_the_one_wrong_rank_is_named() -> None:
    """A rank whose columns of a summed layer's input are wrong, while the other's are right."""
    shown = [_shown(0, 2), _shown(1, 2, ("h.0.dense", "input"))]
    said = first_wrong(shown, _model(), _VARIANTS, Layout(tensor=2))
    assert said == "rank 1: its part of the input of h.0.dense; the other ranks' parts are right"


def test_a_rank_whose_product_is_wrong_is_named() -> None:
    """Its part of the input is right and its product of it is not, as where one rank rounds before the sum."""
    weight = np.random.default_rng(5).standard_normal((6, 3))
    place = ("h.0.dense", "partial")
    models = [_model(), *({**one} for one in _VARIANTS)]
    for one in models:
        one[place] = Whole(
            module=place[0],
            side="partial",
            summed=True,
            values=one["h.0.dense", "input"].values,
            projected_weight=projected(_torch(weight)),
        )
    right = np.split(models[0][place].values, 2, axis=1)
    for shard in range(2):
        by_hand = right[shard] @ weight[3 * shard : 3 * shard + 3]
        assert np.allclose(models[0][place].of(shard, 2), projected(_torch(by_hand)))
    shown = [_shown(rank, 2) for rank in range(2)]
    for rank, by in ((0, 0.0), (1, 1e-2)):
        shown[rank].insert(2, Shown(module=place[0], side="partial", values=models[0][place].of(rank, 2) + by))
    said = first_wrong(shown, models[0], models[1:], Layout(tensor=2))
    assert said == "rank 1: its partial product of h.0.dense; the other ranks' products are right"


def test_a_wrong_sum_is_told_from_a_wrong_part() -> None:
    """Every rank's part is right, and what all of them get is not."""
    shown = [_shown(rank, 2, ("h.0.dense", "output")) for rank in range(2)]
    said = first_wrong(shown, _model(), _VARIANTS, Layout(tensor=2))
    assert said.startswith("the output of h.0.dense")
    assert "the sum, or its bias" in said


@pytest.mark.parametrize("place", [("h.0", "input"), ("h.0", "output")])
def test_the_stage_is_named(place: tuple[str, str]) -> None:
    """What is sent between stages, or what a stage computes."""
    before = [Shown(module="g.0", side="output", values=projected(_torch(np.ones((8, 6)))))]
    reference = {
        ("g.0", "output"): Whole(module="g.0", side="output", summed=False, values=np.ones((8, 6))),
        **_model(),
    }
    variants = [{**reference, **one} for one in _VARIANTS]
    said = first_wrong([before, _shown(0, 1, place)], reference, variants, Layout(stages=2))
    assert ("what stage 1 is sent" in said) == (place[1] == "input")
    assert ("the output of h.0 of stage 1" in said) == (place[1] == "output")


def test_nan_and_other_shapes_are_wrong() -> None:
    """A comparison that NaN passes would be none."""
    shown = _shown(0, 1, ("h.0", "output"), by=float("nan"))
    assert "the output of h.0" in first_wrong([shown], _model(), _VARIANTS, Layout())
    short = [Shown(module=one.module, side=one.side, values=one.values[:4]) for one in _shown(0, 1)]
    assert "the input of the first block" in first_wrong([short], _model(), _VARIANTS, Layout())


def _torch(array: np.ndarray):
    import torch

    return torch.from_numpy(array)
