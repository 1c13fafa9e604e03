"""Keep whole logits in float64, for tests that compare closer than a sketch's float32 can show."""

import torch

from harness.numerics.sketch import Sketcher


class Recorder(Sketcher):
    """Takes the place of a Sketcher and keeps every logit by (request, position)."""

    def __init__(self):
        super().__init__(0)
        self.kept = {}

    def add(self, logits_NV, next_ids_N, *, request, position, generated):
        for key, row_V in zip(zip(request.tolist(), position.tolist(), strict=True), logits_NV, strict=True):
            assert key not in self.kept, f"position {key} is shown twice"
            self.kept[key] = row_V.double().clone()


def recorded(engine, view, requests, continuations, *, batch_size=None, **more):
    """(request, position) -> logits [V] of one view, float64."""
    recorder = Recorder()
    show = getattr(engine, view)
    show(requests, continuations, batch_size=batch_size, sketcher=recorder, **more)
    return recorder.kept


def largest_difference(one, other):
    """The largest difference of two logits at the positions that both show, of which there must be some."""
    shared = sorted(one.keys() & other.keys())
    assert shared
    return float((torch.stack([one[key] for key in shared]) - torch.stack([other[key] for key in shared])).abs().max())
