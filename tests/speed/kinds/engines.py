"""Engines for tests of measurements: one whose time is known."""

from harness.values import Generation


class Known:
    """Takes so many seconds of its own clock for the first and for each later forward of a batch of any size."""

    spec = "known"

    def __init__(self, first=2.0, step=0.5, *, lost=0):
        self.now, self.batches = 0.0, []
        self._first, self._step, self._lost = first, step, lost

    def time(self):
        """What its clock shows."""
        return self.now

    def generate(self, requests, *, batch_size, stop_ids):
        """Continue all at once, in as many steps as the longest takes."""
        assert not stop_ids
        assert batch_size == len(requests)
        self.batches.append([request.prompt_ids for request in requests])
        self.now += self._first + self._step * (max(one.max_new_tokens for one in requests) - 1)
        return [Generation(tokens=(1,) * (one.max_new_tokens - self._lost), finish="length") for one in requests]
