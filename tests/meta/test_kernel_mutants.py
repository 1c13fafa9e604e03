"""Bugs in the C++ of the optimized BLOOM itself: whatever is wrong in the compiled step, the verdict says so."""

import pytest

import harness
from harness.models.ports.ladder import kernels

if reason := kernels.why_not():
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

#: What stands in decode.cpp, and what a slip would have made of it.
WRONG = {
    "another GELU": ("0.044715f * x * x", "0.054715f * x * x"),
    "an unbiased variance": (
        "(variance + total(squares)) / static_cast<float>(width) + eps",
        "(variance + total(squares)) / static_cast<float>(width - 1) + eps",
    ),
    "scores 1 % too large": ("size) * scale + slope", "size) * scale * 1.01f + slope"),
    "padding that is attended to": ("real = mask[b * tokens + s] != 0;", "real = true;"),
    "a key in its neighbour's slot": (
        "store(keys + (tokens - 1) * size + c, key[c])",
        "store(keys + (tokens - 2) * size + c, key[c])",
    ),
    "slopes of ALiBi too small": ("slopes[head] * number[3]", "slopes[head] * number[3] * 0.99f"),
}
#: The same function, written otherwise.
RIGHT = {
    "positions from the first column": ("slope * place[s];", "slope * static_cast<float>(s);"),
    "a factor of one": ("(load(x + i) - mean) * scale *", "(load(x + i) - mean) * scale * 1.0f *"),
}


@pytest.fixture
def rewritten(tmp_path, monkeypatch):
    """Compile decode.cpp with one text replaced, for the length of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in kernels._FLAGS))

    def rewrite(before, after):
        text = kernels.SOURCE.read_text(encoding="utf-8")
        assert text.count(before) == 1, before
        (tmp_path / "decode.cpp").write_text(text.replace(before, after), encoding="utf-8")
        monkeypatch.setattr(kernels, "SOURCE", tmp_path / "decode.cpp")
        kernels.load.cache_clear()

    yield rewrite
    kernels.load.cache_clear()


def verdict_on(goldens):
    """Of the whole ladder in float32, on a padded batch."""
    return harness.check(goldens / "bloom-tiny" / "translate", "bloom:rungs=all,dtype=float32", quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_slip_in_the_compiled_step_is_found(goldens, rewritten, name):
    """One constant, one index, one condition: the candidate deviates, however few tokens change."""
    rewritten(*WRONG[name])
    verdict = verdict_on(goldens)
    assert verdict.status == "deviates", verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_the_same_function_written_otherwise_passes(goldens, rewritten, name):
    """What the softmax is blind to, and a factor of one, are no bugs."""
    rewritten(*RIGHT[name])
    verdict = verdict_on(goldens)
    assert verdict.ok, verdict
