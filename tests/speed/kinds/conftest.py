"""The engine whose clock is the one that is read."""

import time

import pytest

from tests.speed.kinds.engines import Known


@pytest.fixture
def known(monkeypatch):
    """A function that makes such an engine."""

    def make(*arguments, **named):
        engine = Known(*arguments, **named)
        monkeypatch.setattr(time, "perf_counter", engine.time)
        return engine

    return make
