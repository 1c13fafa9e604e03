from pathlib import Path

import pytest

from harness.models.ports.ladder import kernels
from harness.power import placing

PORT = "bloom:rungs=all"


@pytest.fixture(scope="module")
def told(goldens, tmp_path_factory):
    """What is said of a few bugs and of a control on the optimized port, by name and precision."""
    if reason := kernels.why_not():
        pytest.skip(reason)
    work = tmp_path_factory.mktemp("placing")
    names = ["x-row-scaled", "na-gelu", "at-chunk-future", "ok-gelu-factored"]
    placing.place(["bloom-tiny"], work, Path(goldens), lambda _text: None, names, PORT)
    placing.place(["bloom-tiny"], work, Path(goldens), lambda _text: None, names, PORT)  # everything is there already
    found = placing.kept(work)
    assert len(found) == 2 * len(names), "each once in each precision"
    return {(one.name, one.precision): one for one in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"), [("x-row-scaled", ("transformer.h.2.mlp",)), ("na-gelu", ("transformer.h.0.mlp",))]
)
def test_a_bug_in_the_port_is_named_where_it_is(told, name, where):
    """A weight and an activation that were changed in the optimized port are named as in transformers' model."""
    one = told[name, "float32"]
    assert one.found
    assert one.right
    assert (one.named,) == where


@pytest.mark.slow
def test_of_a_correct_port_nothing_is_named(told):
    """A control in the port is none of its modules' fault."""
    one = told["ok-gelu-factored", "float32"]
    assert not one.reason
    assert not one.found


@pytest.mark.slow
def test_a_bug_that_does_not_fit_has_its_reason(told):
    """The port has no static cache, which this bug needs."""
    assert "static_cache" in told["at-chunk-future", "float32"].reason
