"""Limits: which of bytes and operations binds, the share that is reached, and when neither is known."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines import build_engine, hf, port
from harness.errors import EngineError
from harness.numerics.ratios import Interval
from harness.speed import costs, judging, machine, roofline
from harness.speed.costs import Cost
from harness.speed.judging import Measure, Outcome
from harness.speed.machine import Machine
from harness.speed.roofline import Limit, Roofline, roofline_of
from harness.speed.shapes import Shape
from harness.speed.sides import Side
from tests.engines.ports import cached
from tests.support import random_model

MACHINE = Machine(bandwidth=100.0, rate=1000.0, dtype="float32", device="cpu", threads=1)
SHAPES = [(1, 8, 4), (3, 8, 4)]


@pytest.fixture
def known_machine(monkeypatch):
    """A machine that need not be measured."""
    monkeypatch.setattr(machine, "measure", lambda dtype, device: replace(MACHINE, dtype=dtype, device=device))


def test_the_slower_of_the_two_binds():
    """Ten seconds of moving hide two of computing, and the other way round."""
    assert roofline.limit(Cost(bytes=1000, operations=2000), MACHINE) == Limit(
        seconds=10, binds="bytes", bytes=1000, operations=2000
    )
    assert roofline.limit(Cost(bytes=10, operations=2000), MACHINE).binds == "operations"


@given(st.floats(1, 1e9), st.floats(1, 1e9), st.floats(1e-3, 1e6))
def test_the_share_is_of_the_limit(moved, done, seconds):
    """Whoever takes the limit's time reaches all of it, and twice the time a half; neither part is shorter."""
    found = roofline.limit(Cost(bytes=moved, operations=done), MACHINE)
    assert found.share(found.seconds) == 1
    assert found.share(2 * seconds) == pytest.approx(found.share(seconds) / 2)
    assert found.seconds >= max(moved / MACHINE.bandwidth, done / MACHINE.rate) * (1 - 1e-12)


@pytest.mark.usefixtures("known_machine")
def test_an_open_model_has_the_limits_of_its_config():
    """Each part of each shape, in the dtype and on the device in force."""
    with hf.from_model(random_model("bloom", dtype="bfloat16")) as engine:
        found = roofline_of(roofline.observe(engine, None, SHAPES))
        counts = costs.count(engine.model.config)
    assert found.machine == replace(MACHINE, dtype="bfloat16")
    for batch, prompt, new in SHAPES:
        first = costs.prefill(counts, batch=batch, prompt=prompt, dtype="bfloat16")
        later = costs.decode(counts, batch=batch, prompt=prompt, new=new, dtype="bfloat16")
        assert found.limit("prefill", batch, prompt) == roofline.limit(first, found.machine)
        assert found.limit("decode", batch, prompt) == roofline.limit(later, found.machine)
    assert found.limit("decode", 2, 8) is None


@pytest.mark.usefixtures("known_machine")
def test_a_port_has_the_limits_of_the_directory_beside_it(small_home):
    """And none without one, in words."""
    engine = port.from_object(cached(random_model("llama")))
    with engine:
        alone = roofline_of(roofline.observe(engine, None, SHAPES))
        beside = roofline_of(roofline.observe(engine, str(small_home / "golden/small/model"), SHAPES))
    assert "shows no config" in alone.reason
    assert alone.limit("decode", 1, 8) is None
    assert beside.limit("decode", 1, 8).seconds > 0


class Odd:
    """An engine whose settings are what they are told to be."""

    spec = "odd"

    def __init__(self, settings):
        self.settings = settings


@pytest.mark.usefixtures("known_machine")
def test_what_is_not_known_is_said_and_never_raised(small_home, tmp_path):
    """Ranks, dtypes without a width, a directory that is none, a config that breaks."""
    model = str(small_home / "golden/small/model")
    ranks = build_engine("tp:size=2", model=model)
    assert "several ranks" in roofline.observe(ranks, model, SHAPES)["reason"]
    assert "bfloat16+float32" in roofline.observe(Odd({"dtype": "bfloat16+float32"}), model, SHAPES)["reason"]
    assert "no config.json" in roofline.observe(Odd({"dtype": "float32"}), str(tmp_path), SHAPES)["reason"]

    class Broken(Odd):
        @property
        def settings(self):
            raise ZeroDivisionError("no settings")

        @settings.setter
        def settings(self, _given):
            pass

    assert roofline.observe(Broken({}), model, SHAPES) == {"reason": "ZeroDivisionError: no settings"}


def test_a_side_of_another_version_has_no_limits(monkeypatch):
    """Its process does not know the request and fails; the samples count all the same."""
    side = Side("hf", model=None, checkout=None, timeout=1.0, progress=lambda _text: None)

    def fail(*_arguments, **_named):
        raise EngineError("rank 0 of hf: KeyError: 'roofline'", fix="x")

    monkeypatch.setattr(side, "_ask", fail)
    assert side.roofline([Shape(batch=1, prompt=8, new=4)]) == Roofline(reason="rank 0 of hf: KeyError: 'roofline'")


def test_measures_get_the_limits_of_their_own_shape():
    """Base and candidate each of its own process."""
    limit = Limit(seconds=1.0, binds="bytes", bytes=1.0, operations=1.0)
    other = replace(limit, seconds=2.0)
    measure = Measure(
        part="decode", batch=8, prompt=128, base=4.0, candidate=5.0, ratio=Interval(low=1, middle=1, high=1),
        limit=None, outcome=Outcome.SHOWN, rounds=8, base_memory=0, candidate_memory=0,
    )  # fmt: skip
    sides = [Roofline(limits={("decode", 8, 128): limit}), Roofline(limits={("decode", 8, 128): other})]
    found, missing = judging.limited([measure, replace(measure, batch=1)], *sides)
    assert (found.base_limit, found.candidate_limit) == (limit, other)
    assert (missing.base_limit, missing.candidate_limit) == (None, None)
