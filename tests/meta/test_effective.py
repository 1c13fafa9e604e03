"""A candidate is told what it really computes in, whatever it declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import harness
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.values import Status

#: Trained and small; its checkpoint is bfloat16, so that casting to it loses nothing.
HOST = "llama-tiny"


class SaysBfloat16(hf.HFEngine):
    """Computes in another precision than its settings say, as an engine does that widens or narrows on the way."""

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "dtype": "bfloat16"}


def _lying(directory, dtype: str) -> SaysBfloat16:
    options = hf.Options(model=str(directory / "model"), dtype=dtype)
    engine = SaysBfloat16(options, text=f"computes in {dtype}, says bfloat16")
    engine.declared = {**engine.declared, "dtype": "bfloat16"}
    return engine


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_finer_precision_than_declared_is_named(goldens, dtype):
    """What declares bfloat16 and computes in float32 or float16 passes, and is told so."""
    directory = goldens / HOST
    verdict = harness.check(directory / "translate", _lying(directory, dtype), upcast=False)
    assert verdict.ok
    assert verdict.answers[-1].effective == dtype
    assert f"its error is of the size of {dtype}'s round-off" in str(verdict)


def test_the_declared_precision_is_not_remarked(goldens):
    """What computes in bfloat16 and says so is told nothing."""
    verdict = harness.check(goldens / HOST / "translate", "hf:dtype=bfloat16")
    assert verdict.ok
    assert [answer.effective for answer in verdict.answers] == ["", ""]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rounded_weights_inside_bfloat16_are_named(goldens, scheme):
    """Weights that went through int8 or int4 before a bfloat16 run are named, also where bfloat16 hides their size."""
    directory = goldens / HOST
    with hf.build(parse_spec(f"hf:dtype=bfloat16,weights={scheme}"), model=str(directory / "model")) as engine:
        model = engine.model
    # int4 is plain to see on a few prompts; int8 lies below the round-off of bfloat16 and takes more of them.
    verdict = harness.check(directory / ("core" if scheme == "int8" else "translate"), model, quick=True)
    assert verdict.status is Status.DEVIATES
    named = {answer.question: answer.effective for answer in verdict.answers}
    assert named["function"] == f"float32 on {scheme} weights"
    assert named["precision"] == f"bfloat16 on {scheme} weights"


def test_a_coarser_precision_than_declared_fails(goldens):
    """What declares float32 and computes in bfloat16 deviates, and the precision is named."""
    directory = goldens / HOST

    class SaysFloat32(hf.HFEngine):
        """Narrows on the way."""

        @property
        def settings(self) -> Mapping[str, Any]:
            return {**super().settings, "dtype": "float32"}

    engine = SaysFloat32(hf.Options(model=str(directory / "model"), dtype="bfloat16"), text="narrows")
    engine.declared = {**engine.declared, "dtype": "float32"}
    verdict = harness.check(directory / "translate", engine)
    assert verdict.status is Status.DEVIATES
    assert verdict.answers[-1].effective == "bfloat16"


def test_declared_quantisers_are_ok(goldens):
    """The same rounded weights, declared, are judged about their own centre and pass."""
    for scheme in ("int8", "int4"):
        verdict = harness.check(goldens / HOST / "translate", f"hf:dtype=bfloat16,weights={scheme}", quick=True)
        assert verdict.ok, str(verdict)
