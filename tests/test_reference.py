"""What a golden is made of: the reference's score, and centre and floor of each precision that it can judge."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from harness import reference, scorer
from harness.errors import ModelError
from harness.numerics.constants import CENTRE_SHARE, FP32_REFERENCE_RATIO
from harness.replicas import measure_floor
from harness.values import Centre, Moments, Request, Rows, recentred
from tests.support import random_model

REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 42)), max_new_tokens=6),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=9),
)
PRECISIONS = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories: one that every precision holds, one in fp16, and one that overflows in fp16."""
    root = tmp_path_factory.mktemp("models")
    random_model("llama", dtype="bfloat16").save_pretrained(root / "brain")
    random_model("gpt2", dtype="float16").save_pretrained(root / "half")
    large = random_model("llama", dtype="bfloat16")
    with torch.no_grad():
        large.lm_head.weight *= 1e5
    large.save_pretrained(root / "large")
    return root


def observed(model, **more):
    """What the reference shows, with few replicas; what it told meanwhile is left out."""
    arguments = {"precisions": PRECISIONS, "replicas": 4, "stop_ids": frozenset(), "progress": lambda _text: None}
    return reference.observe(str(model), REQUESTS, **{**arguments, **more})


def same_floor(one, other):
    """Whether two floors agree in every bit."""
    pairs = [(getattr(one.moments, field.name), getattr(other.moments, field.name)) for field in fields(Moments)]
    pairs += [(one.sigma, other.sigma), (one.pair, other.pair)]
    return all(np.array_equal(a, b) for a, b in pairs) and one.families == other.families


def same_rows(one, other):
    """Whether two sets of rows agree in every bit."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Rows.__slots__)


@pytest.fixture(scope="module")
def brain(models):
    """What the bf16 model's reference shows."""
    return observed(models / "brain")


# --- a model that every precision can hold -----------------------------------------------------


def test_everything_a_golden_needs_is_there(models, brain):
    """Tokens and rows are the score's, directions the scorer's; no centre is needed, and nothing is left out."""
    scored = scorer.score(str(models / "brain"), REQUESTS, stop_ids=frozenset(), precision="float64")
    assert brain.generations == scored.generations
    assert same_rows(brain.rows, scored.rows)
    assert (brain.precision, brain.precision_reason) == ("float64", "")
    assert (brain.left_out, brain.centres) == ({}, {})
    directions = scorer.directions(str(models / "brain"), REQUESTS, scored, precision="float64")
    assert list(brain.directions) == list(directions) == ["int8", "int4"]
    assert all((brain.directions[name] == directions[name]).all() for name in directions)


@pytest.mark.parametrize("asked", [PRECISIONS, PRECISIONS[::-1], ("bfloat16", "float32")])
def test_the_finest_precision_comes_first(models, brain, asked):
    """Whatever the order asked for, float32 is measured first, and each precision is measured alike."""
    seen = observed(models / "brain", precisions=asked)
    assert list(seen.floors) == [name for name in PRECISIONS if name in asked]
    assert all(same_floor(seen.floors[name], brain.floors[name]) for name in seen.floors)


def test_floors_are_those_of_the_replicas(models, brain):
    """Each floor is what the replicas measure about the centre of that precision, with a part along each direction."""
    tokens = [given.tokens for given in brain.generations]
    for name in PRECISIONS:
        centre = recentred(brain.rows, brain.centres.get(name))
        expected = measure_floor(
            str(models / "brain"), REQUESTS, tokens, centre, name, directions=list(brain.directions.values()), count=4
        )
        assert same_floor(brain.floors[name], expected)
        assert brain.floors[name].moments.along.shape == (4, len(REQUESTS), 2, 2)


def test_stop_ids_end_the_continuations(models, brain):
    """The score stops where it is told to, and floors have the steps that are left."""
    stop = brain.generations[0].tokens[2]
    seen = observed(models / "brain", stop_ids=frozenset({stop}), precisions=("float32",), replicas=2)
    assert seen.generations[0].finish == "eos"
    assert len(seen.floors["float32"].pair) == sum(len(given.tokens) for given in seen.generations)


def test_progress_says_what_is_being_done(models):
    """Each step is told, and each replica of each precision counted."""
    told = []
    observed(models / "brain", precisions=("bfloat16", "float32"), replicas=2, parallel=(2,), progress=told.append)
    assert told[:3] == ["auditing float64", "reference in float64", "directions of weight quantisers"]
    assert told[3:] == [
        line
        for name in ("float32", "bfloat16")
        for line in (
            f"{name}: centre",
            f"{name}: replica 1 of 2",
            f"{name}: replica 2 of 2",
            f"{name}/tp2: replica 1 of 2",
            f"{name}/tp2: replica 2 of 2",
        )
    ]


# --- tensor parallelism ------------------------------------------------------------------------


def test_a_declared_parallelism_has_floors_of_its_own(models):
    """Beside each plain floor lies one for each declared size, measured with replicas that are cut so."""
    seen = observed(models / "brain", parallel=(2, 4), precisions=("float32", "bfloat16"), replicas=8)
    sizes = ("", "/tp2", "/tp4")
    assert list(seen.floors) == [f"{name}{size}" for name in ("float32", "bfloat16") for size in sizes]
    tokens = [given.tokens for given in seen.generations]
    along = list(seen.directions.values())
    for size, name in ((None, "bfloat16"), (2, "bfloat16/tp2"), (4, "bfloat16/tp4")):
        expected = measure_floor(
            str(models / "brain"), REQUESTS, tokens, seen.rows, "bfloat16", directions=along, count=8, parallel=size
        )
        assert same_floor(seen.floors[name], expected)
    assert not same_floor(seen.floors["bfloat16/tp4"], seen.floors["bfloat16"])
    assert not same_floor(seen.floors["bfloat16/tp2"], seen.floors["bfloat16/tp4"])


def test_a_parallel_floor_is_about_the_same_centre(models):
    """Where the precision has a centre of its own, the parallel replicas are held against it too."""
    seen = observed(models / "half", parallel=(2,), precisions=("bfloat16",))
    tokens = [given.tokens for given in seen.generations]
    expected = measure_floor(
        str(models / "half"),
        REQUESTS,
        tokens,
        recentred(seen.rows, seen.centres["bfloat16"]),
        "bfloat16",
        directions=list(seen.directions.values()),
        count=4,
        parallel=2,
    )
    assert same_floor(seen.floors["bfloat16/tp2"], expected)


# --- centres -----------------------------------------------------------------------------------


def test_a_cast_that_moves_the_logits_has_a_centre(models):
    """fp16 weights: float32 and float16 hold them and need no centre, bfloat16 does and its floor is about it."""
    seen = observed(models / "half")
    assert list(seen.centres) == ["bfloat16"]
    tokens = [given.tokens for given in seen.generations]
    about, native = (
        measure_floor(
            str(models / "half"),
            REQUESTS,
            tokens,
            rows,
            "bfloat16",
            directions=list(seen.directions.values()),
            count=4,
        )
        for rows in (recentred(seen.rows, seen.centres["bfloat16"]), seen.rows)
    )
    assert same_floor(seen.floors["bfloat16"], about)
    assert np.median(native.sigma / about.sigma) > 1.1


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_centre_that_round_off_hides_is_dropped(models, brain, monkeypatch, share):
    """A shift below a tenth of what float32 resolves is not worth a centre; one above it is."""
    finest = float(np.sqrt(np.mean(brain.floors["float32"].sigma.astype(np.float64) ** 2)))

    def shifted(_model, _requests, scored, dtype, *, precision):
        assert precision == "float64"
        return centre_of(scored.rows, share * CENTRE_SHARE * finest) if dtype == "bfloat16" else None

    monkeypatch.setattr(scorer, "cast_centre", shifted)
    seen = observed(models / "brain", precisions=("bfloat16", "float32"))
    assert set(seen.centres) == ({"bfloat16"} if share > 1 else set())
    assert same_floor(seen.floors["bfloat16"], brain.floors["bfloat16"]) == (share < 1)


def centre_of(rows, shift):
    """A centre that lies a little beside the rows, and says how far."""
    return Centre(
        logsumexp=rows.logsumexp,
        logp=rows.logp,
        entropy=rows.entropy,
        projections=rows.projections * np.float32(1.01),
        top_ids=rows.top_ids,
        top_logits=rows.top_logits,
        shift=shift,
        inexact_tensors=1,
    )


# --- what cannot be judged ---------------------------------------------------------------------


def test_a_precision_that_overflows_is_left_out(models):
    """A precision in which the reference is not finite has no floor, no centre, and a reason; the others stay."""
    seen = observed(models / "large", parallel=(2,), replicas=2)
    assert list(seen.floors) == ["float32", "float32/tp2", "bfloat16", "bfloat16/tp2"]
    assert list(seen.left_out) == ["float16"]
    assert "not finite" in seen.left_out["float16"]
    assert "float16" not in seen.centres


def test_a_reference_that_is_not_finite_is_refused(tmp_path):
    """Nothing is measured about a NaN."""
    model = random_model("llama", dtype="bfloat16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not finite at \d+ positions"):
        observed(tmp_path)


@pytest.fixture
def float32_reference(monkeypatch):
    """A reference that cannot be run in float64."""
    monkeypatch.setattr(scorer, "reference_precision", lambda _model: ("float32", "too many parameters"))


def test_a_float32_reference_judges_what_is_coarser(models, brain, float32_reference):
    """In float32 the reference has round-off itself: float32 is left out, 16 bits are far enough from it."""
    seen = observed(models / "brain")
    assert (seen.precision, seen.precision_reason) == ("float32", "too many parameters")
    assert list(seen.floors) == ["bfloat16", "float16"]
    assert list(seen.left_out) == ["float32"]
    assert "too coarse" in seen.left_out["float32"]
    assert np.median(seen.floors["bfloat16"].sigma / brain.floors["bfloat16"].sigma) == pytest.approx(1, abs=0.01)


def test_a_float32_reference_is_held_to_its_ratio(models, float32_reference, monkeypatch):
    """A precision within the ratio of float32's own round-off is left out, parallel floors with it."""
    measure = reference.measure_floor

    def close(*arguments, **more):
        floor = measure(*arguments, **more)
        if arguments[4] == "float16":
            single = measure(*arguments[:4], "float32", **more)
            floor = replace(floor, sigma=single.sigma * FP32_REFERENCE_RATIO * 0.9)
        return floor

    monkeypatch.setattr(reference, "measure_floor", close)
    seen = observed(models / "brain", parallel=(2,), replicas=2)
    assert list(seen.floors) == ["bfloat16", "bfloat16/tp2"]
    assert set(seen.left_out) == {"float32", "float16"}
