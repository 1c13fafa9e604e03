"""An old golden against a new one: real recordings in another environment, and planted changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import flow, replicas, scorer, store
from harness.changes import compare_goldens, yardstick
from harness.changes.prompts import entropy_slope
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.numerics.constants import EFFECT, MAX_SMALLEST
from harness.numerics.sketch import select_rows
from harness.values import Changes, Floor, Golden, Kind
from tests.support import write_model, write_suite

# --- goldens to compare ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(small_home: Path) -> Golden:
    """A small golden with floors in three precisions."""
    return store.read_golden(small_home / "golden/small/small")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a suite, and a golden of them with a float32 floor alone."""
    home = tmp_path_factory.mktemp("place")
    write_model(home / "model")
    write_suite(home / "small.toml")
    record(home, "old")
    return home


def record(home: Path, name: str, model: str = "model") -> Golden:
    """A golden with a float32 floor, of one of the models there."""
    return flow.record(home / model, home / "small.toml", out=home / "m" / name, precisions=("float32",))


def opened_with(monkeypatch: pytest.MonkeyPatch, options: str) -> list[hf.HFEngine]:
    """Let every engine of a recording be opened with more options; the engines, as they come."""
    opened: list[hf.HFEngine] = []

    def open_reference(model: str, dtype: str | None, *, weights: str | None = None) -> hf.HFEngine:
        given = [f"{key}={value}" for key, value in (("dtype", dtype), ("weights", weights)) if value]
        opened.append(hf.build(parse_spec("hf:" + ",".join([*given, options])), model=model))
        return opened[-1]

    monkeypatch.setattr(scorer, "open_reference", open_reference)
    monkeypatch.setattr(replicas, "open_reference", open_reference)
    return opened


def with_rows(golden: Golden, **arrays: np.ndarray) -> Golden:
    """The golden with other numbers."""
    return replace(golden, rows=replace(golden.rows, **arrays))


def with_floor(golden: Golden, precision: str, change: Callable[[Floor], Floor]) -> Golden:
    """The golden with another floor of one precision."""
    return replace(golden, floors={**golden.floors, precision: change(golden.floors[precision])})


def with_noise(golden: Golden, times: float, seed: int = 0) -> Golden:
    """The golden with an error of that many times float32's round-off in every row's projections."""
    noise = np.random.default_rng(seed).standard_normal(golden.rows.projections.shape)
    sigma = golden.floors["float32"].sigma.astype(np.float64)[:, None] / math.sqrt(noise.shape[1])
    moved = golden.rows.projections + times * sigma * noise
    return with_rows(golden, projections=moved.astype(np.float32))


def with_flip(golden: Golden, prompt: int, step: int, margin: float, rank: int = 1) -> tuple[Golden, Golden]:
    """(the golden with that margin at a step, the same where the step's token is the best but ``rank``)."""
    at = sum(len(one.tokens) for one in golden.generations[:prompt]) + step
    top = golden.rows.top_logits.copy()
    top[at, 1:] = top[at, 0] - np.float32(margin) * np.arange(1, top.shape[1], dtype=np.float32)
    old = with_rows(golden, top_logits=top)
    tokens = list(golden.generations[prompt].tokens)
    tokens[step] = int(golden.rows.top_ids[at, rank])
    generations = list(golden.generations)
    generations[prompt] = replace(generations[prompt], tokens=tuple(tokens))
    return old, replace(old, generations=tuple(generations))


def permuted(golden: Golden, order: Sequence[int]) -> Golden:
    """The same golden with its prompts in another order."""
    rows = golden.rows
    place = np.concatenate([np.flatnonzero(rows.request == index) for index in order])
    step = (np.cumsum(rows.generated) - 1)[place][rows.generated[place]]
    number = np.empty(len(order), dtype=np.int32)
    number[list(order)] = np.arange(len(order))

    def floor_of(floor: Floor) -> Floor:
        moments = floor.moments
        by_prompt = {
            name: getattr(moments, name)[:, list(order)] for name in moments.__slots__ if name not in ("bias", "bucket")
        }
        return replace(floor, sigma=floor.sigma[place], pair=floor.pair[step], moments=replace(moments, **by_prompt))

    moved = select_rows(rows, place)
    return replace(
        golden,
        requests=tuple(golden.requests[index] for index in order),
        generations=tuple(golden.generations[index] for index in order),
        rows=replace(moved, request=number[moved.request]),
        floors={name: floor_of(floor) for name, floor in golden.floors.items()},
        directions={name: direction[place] for name, direction in golden.directions.items()},
    )


def kinds(changes: Changes) -> dict[str, Kind]:
    """Prompt -> how it changed."""
    return {one.prompt: one.kind for one in changes.prompts}


def notes(changes: Changes) -> dict[str, Kind]:
    """What is of no prompt -> how it changed."""
    return {one.prompt: one.kind for one in changes.general}


# --- recorded again ---------------------------------------------------------------------------------


def test_recorded_again_is_the_same(place: Path) -> None:
    """Recording twice gives the same golden to the last bit."""
    changes = compare_goldens(store.read_golden(place / "m/old"), record(place, "again"))
    assert changes.worst is Kind.SAME
    assert not changes.general


@pytest.mark.parametrize(("option", "value"), [("threads", 2), ("attn", "eager")])
def test_another_environment_is_drift(
    place: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str | int
) -> None:
    """Recording with another thread count or attention kernel moves nothing beyond round-off."""
    opened = opened_with(monkeypatch, f"{option}={value}")
    changes = compare_goldens(store.read_golden(place / "m/old"), record(place, option))
    assert {getattr(engine.options, option) for engine in opened} == {value}
    assert changes.worst in (Kind.SAME, Kind.DRIFT)
    for one in changes.prompts:
        assert one.deviation is None or one.deviation < 1


def test_other_draws_are_drift(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors measured with other replicas are drift, and no prompt has changed."""
    drawn = replicas.draw
    monkeypatch.setattr(replicas, "draw", lambda count, seed, *rest, **named: drawn(count, seed + 1, *rest, **named))
    changes = compare_goldens(store.read_golden(place / "m/old"), record(place, "draws"))
    assert set(kinds(changes).values()) == {Kind.SAME}
    assert notes(changes) == {"floor float32": Kind.DRIFT}


def test_changed_weights_are_bug_sized(place: Path) -> None:
    """One scaled row of one matrix is far beyond round-off in every prompt, and the weights are said to be others."""
    import torch
    from safetensors.torch import load_file, save_file

    write_model(place / "changed")
    path = place / "changed/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    with torch.no_grad():
        tensors[name][3] *= 1.25
    save_file(tensors, path, metadata={"format": "pt"})
    changes = compare_goldens(store.read_golden(place / "m/old"), record(place, "changed", "changed"))
    assert set(kinds(changes).values()) == {Kind.BUG_SIZED}
    assert notes(changes)["model"] is Kind.BUG_SIZED
    for one in changes.prompts:
        assert one.deviation is not None
        assert one.limit is not None
        assert one.deviation > 100 * one.limit


# --- what does not matter -----------------------------------------------------------------------------


def test_a_golden_is_the_same_as_itself(golden: Golden) -> None:
    """Against itself a golden has nothing but `same`."""
    changes = compare_goldens(golden, golden)
    assert set(kinds(changes).values()) == {Kind.SAME}
    assert not changes.general
    assert not changes.environment
    assert changes.worst is Kind.SAME


@given(order=st.permutations(range(3)), other=st.permutations(range(3)), seed=st.integers(0, 99))
def test_the_order_of_prompts_does_not_matter(golden: Golden, order: list[int], other: list[int], seed: int) -> None:
    """Prompts are matched by id: any order of either golden gives each prompt the same kind and deviation."""
    assert compare_goldens(permuted(golden, order), permuted(golden, other)).worst is Kind.SAME
    moved = with_noise(golden, 2.0, seed)
    straight = {one.prompt: one for one in compare_goldens(golden, moved).prompts}
    crossed = {one.prompt: one for one in compare_goldens(permuted(golden, order), permuted(moved, other)).prompts}
    assert straight.keys() == crossed.keys()
    for name, one in straight.items():
        assert crossed[name].kind is one.kind
        assert crossed[name].deviation == pytest.approx(one.deviation)


# --- numbers ---------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000))
def test_round_off_is_drift(golden: Golden, seed: int) -> None:
    """An error of the size of round-off is drift, whatever it is."""
    changes = compare_goldens(golden, with_noise(golden, 1.0, seed))
    assert set(kinds(changes).values()) == {Kind.DRIFT}


@given(seed=st.integers(0, 10_000))
def test_ten_times_round_off_is_bug_sized(golden: Golden, seed: int) -> None:
    """An error of ten times round-off is none."""
    changes = compare_goldens(golden, with_noise(golden, 10.0, seed))
    assert set(kinds(changes).values()) == {Kind.BUG_SIZED}


def test_one_prompt_is_judged_by_itself(golden: Golden) -> None:
    """An error in one prompt leaves the others as they are."""
    moved = with_noise(golden, 50.0).rows.projections
    only = np.where((golden.rows.request == 1)[:, None], moved, golden.rows.projections)
    changes = compare_goldens(golden, with_rows(golden, projections=only))
    assert kinds(changes) == {"short": Kind.SAME, "long": Kind.BUG_SIZED, "ids": Kind.SAME}


def test_nan_is_bug_sized(golden: Golden) -> None:
    """A number that is none exceeds every limit."""
    moved = golden.rows.projections.copy()
    moved[3] = np.nan
    assert compare_goldens(golden, with_rows(golden, projections=moved)).worst is Kind.BUG_SIZED


@pytest.mark.parametrize("name", ["logp", "entropy", "logsumexp"])
def test_a_jump_that_the_logits_do_not_show_is_bug_sized(golden: Golden, name: str) -> None:
    """A log p of another token, as at a chunk boundary, is found and placed though the projections are equal."""
    numbers = getattr(golden.rows, name).copy()
    numbers[20] -= np.float32(2.0)
    changes = compare_goldens(golden, with_rows(golden, **{name: numbers}))
    wrong = [one for one in changes.prompts if one.kind is Kind.BUG_SIZED]
    request = int(golden.rows.request[20])
    assert [one.prompt for one in wrong] == [golden.requests[request].id]
    assert f"position {golden.rows.position[20]}" in wrong[0].message


@pytest.mark.parametrize("name", ["logp", "entropy", "logsumexp", "top_logits"])
def test_the_last_bit_is_drift(golden: Golden, name: str) -> None:
    """A number that was rounded to the neighbour when it was stored is drift, and not `same`."""
    numbers = np.nextafter(getattr(golden.rows, name), np.float32(-np.inf))
    changes = compare_goldens(golden, with_rows(golden, **{name: numbers}))
    assert set(kinds(changes).values()) == {Kind.DRIFT}


def test_exchanged_ids_are_bug_sized(golden: Golden) -> None:
    """Top entries are compared by token: equal sorted values under exchanged ids are found."""
    ids = golden.rows.top_ids.copy()
    gap = np.diff(-golden.rows.top_logits.astype(np.float64), axis=1)[:, 1:]
    at, entry = np.unravel_index(np.argmax(gap), gap.shape)
    ids[at, [entry + 1, entry + 2]] = ids[at, [entry + 2, entry + 1]]
    assert compare_goldens(golden, with_rows(golden, top_ids=ids)).worst is Kind.BUG_SIZED


@given(
    logits=st.lists(st.floats(-30, 30), min_size=2, max_size=40),
    seed=st.integers(0, 10_000),
    size=st.floats(1e-3, 10),
)
def test_entropy_moves_no_further_than_its_slope(logits: list[float], seed: int, size: float) -> None:
    """The slope bounds every change of entropy, and sqrt(2) every change of log p."""
    before = np.array(logits)
    error = size * np.random.default_rng(seed).standard_normal(len(before))
    (h0, p0), (h1, p1) = (_entropy_logp(values) for values in (before, before + error))
    length = float(np.linalg.norm(error))
    assert abs(h1 - h0) <= entropy_slope(len(before)) * length + 1e-12
    assert np.abs(p1 - p0).max() <= math.sqrt(2) * length + 1e-12


def _entropy_logp(logits: np.ndarray) -> tuple[float, np.ndarray]:
    logp = logits - np.logaddexp.reduce(logits)
    return float(-(np.exp(logp) * logp).sum()), logp


# --- the yardstick ------------------------------------------------------------------------------------


def test_the_finest_floor_is_the_yardstick(golden: Golden) -> None:
    """Float32 before the 16-bit precisions; never a precision finer than one of the references."""

    def chosen(old: Golden, new: Golden) -> str | None:
        found = yardstick(old, new)
        return None if found is None else found.precision

    without = replace(golden, floors={name: one for name, one in golden.floors.items() if name != "float32"})
    assert chosen(golden, golden) == "float32"
    assert chosen(without, golden) == "float16"
    assert chosen(golden, replace(golden, precision="bfloat16")) == "bfloat16"
    assert chosen(replace(golden, precision="float16"), golden) == "float16"
    assert chosen(replace(golden, floors={}), golden) is None


def test_a_limit_is_at_least_the_effect_size_and_wider_on_fewer_rows(golden: Golden) -> None:
    """A prompt's limit starts at the effect size, grows where less of it is shared, and ends where nothing is seen."""
    yard = yardstick(golden, golden)
    assert yard is not None
    for prompt in range(len(golden.requests)):
        limits = [yard.limit(prompt, share) for share in (1.0, 0.3, 0.01)]
        typical = math.exp(float(yard.replicas[:, prompt].mean()))
        assert limits == sorted(limits)
        assert limits[0] >= EFFECT["float32"] * typical * 0.999
        assert limits[-1] <= MAX_SMALLEST


# --- tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "rank", "kind"),
    [(0.5, 1, Kind.TIE), (0.0, 1, Kind.TIE), (2.0, 1, Kind.BUG_SIZED), (0.4, 3, Kind.BUG_SIZED)],
)
def test_a_token_that_noise_can_turn_is_a_tie(golden: Golden, times: float, rank: int, kind: Kind) -> None:
    """A flip is excused as far as float32's noise there reaches, for the token that it went to."""
    yard = yardstick(golden, golden)
    assert yard is not None
    at = len(golden.generations[0].tokens) + 2
    margin = times * yard.tie * float(golden.floors["float32"].pair[at])
    old, new = with_flip(golden, 1, 2, margin, rank)
    changes = compare_goldens(old, new)
    one = {change.prompt: change for change in changes.prompts}["long"]
    assert one.kind is kind
    assert one.step == 2
    assert one.margin == pytest.approx(margin, rel=0.3, abs=1e-5)
    assert kinds(changes)["short"] is Kind.SAME


def test_rows_behind_a_flip_are_not_compared(golden: Golden) -> None:
    """What comes behind a differing token was predicted from other tokens, and says nothing."""
    old, new = with_flip(golden, 1, 2, 0.0)
    behind = (golden.rows.request == 1) & (golden.rows.position > len(golden.requests[1].prompt_ids) + 2)
    assert behind.sum() == 3
    moved = new.rows.projections.copy()
    moved[behind] += 1.0
    assert compare_goldens(old, with_rows(new, projections=moved)).worst is Kind.TIE
    at = np.flatnonzero(behind)[0] - 1
    moved[at] += 1.0
    assert compare_goldens(old, with_rows(new, projections=moved)).worst is Kind.BUG_SIZED


# --- structure ------------------------------------------------------------------------------------------


def without_prompt(golden: Golden, prompt: int) -> Golden:
    """The golden with one prompt less, its rows and all."""
    keep = golden.rows.request != prompt
    rows = select_rows(golden.rows, keep)
    others = [index for index in range(len(golden.requests)) if index != prompt]
    number = {index: place for place, index in enumerate(others)}
    steps = keep[golden.rows.generated]
    return replace(
        golden,
        requests=tuple(golden.requests[index] for index in others),
        generations=tuple(golden.generations[index] for index in others),
        rows=replace(rows, request=np.array([number[int(one)] for one in rows.request], dtype=np.int32)),
        floors={
            name: replace(
                floor,
                sigma=floor.sigma[keep],
                pair=floor.pair[steps],
                moments=replace(
                    floor.moments,
                    **{
                        field: getattr(floor.moments, field)[:, others]
                        for field in floor.moments.__slots__
                        if field not in ("bias", "bucket")
                    },
                ),
            )
            for name, floor in golden.floors.items()
        },
        directions={name: direction[keep] for name, direction in golden.directions.items()},
    )


def test_prompts_that_come_and_go_are_structural(golden: Golden) -> None:
    """A prompt that only one golden has is named; the others are the same."""
    less = without_prompt(golden, 1)
    gone, come = compare_goldens(golden, less), compare_goldens(less, golden)
    assert kinds(gone) == kinds(come) == {"short": Kind.SAME, "long": Kind.STRUCTURAL, "ids": Kind.SAME}
    messages = [{one.prompt: one.message for one in changes.prompts}["long"] for changes in (gone, come)]
    assert messages == ["removed", "added"]
    assert not [one for one in gone.general if one.kind.needs_reason]


def test_other_ids_limits_and_ends_are_structural(golden: Golden) -> None:
    """Another prompt, another limit and another end are no matter of round-off."""
    first = golden.requests[0]
    other = replace(first, prompt_ids=(*first.prompt_ids[:-1], first.prompt_ids[-1] + 1))
    ids = compare_goldens(golden, replace(golden, requests=(other, *golden.requests[1:])))
    limit = compare_goldens(golden, replace(golden, requests=(replace(first, max_new_tokens=9), *golden.requests[1:])))
    ended = replace(golden.generations[0], finish="eos")
    end = compare_goldens(golden, replace(golden, generations=(ended, *golden.generations[1:])))
    for changes, word in (
        (ids, f"position {len(first.prompt_ids) - 1}"),
        (limit, "9 new tokens"),
        (end, "ends by eos"),
    ):
        assert kinds(changes) == {"short": Kind.STRUCTURAL, "long": Kind.SAME, "ids": Kind.SAME}
        assert word in changes.prompts[0].message


def test_another_model_vocabulary_or_stop_rule_is_structural(golden: Golden) -> None:
    """What candidates are run by is compared before any number."""
    model = replace(golden, model=replace(golden.model, signature="0" * 64))
    stop = replace(golden, suite=replace(golden.suite, stop="eos"))
    ids = replace(golden, stop_ids=(5,))
    vocabulary = replace(golden, vocabulary=golden.vocabulary + 1)
    for other, name in ((model, "model"), (stop, "suite"), (ids, "stop ids"), (vocabulary, "vocabulary")):
        assert notes(compare_goldens(golden, other)) == {name: Kind.STRUCTURAL}


def test_another_tokenizer_with_the_same_ids_is_drift(golden: Golden) -> None:
    """A tokenizer is judged by its ids; a suite by what it asks for."""
    changes = compare_goldens(golden, replace(golden, tokenizer_digest="0" * 64))
    assert notes(changes) == {"tokenizer": Kind.DRIFT}
    other = replace(golden, suite=replace(golden.suite, digest="0" * 64, runs=golden.suite.runs[:1]))
    assert notes(compare_goldens(golden, other)) == {"suite": Kind.DRIFT}


def test_a_coarser_reference_is_bug_sized(golden: Golden) -> None:
    """A reference in float32 where it was float64 needs a reason; the other way round it does not."""
    coarse = replace(golden, precision="float32")
    assert notes(compare_goldens(golden, coarse)) == {"reference": Kind.BUG_SIZED}
    assert notes(compare_goldens(coarse, golden)) == {"reference": Kind.DRIFT}


# --- floors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "words"), [("sigma", "round-off is 4"), ("pair", "logit difference is 4")])
def test_grown_round_off_is_bug_sized(golden: Golden, field: str, words: str) -> None:
    """A floor that grew by more than the effect size would widen every limit; one that shrank would narrow them."""

    def grown(floor: Floor) -> Floor:
        return replace(floor, **{field: getattr(floor, field) * np.float32(4)})

    other = with_floor(golden, "bfloat16", grown)
    changes = compare_goldens(golden, other)
    assert notes(changes) == {"floor bfloat16": Kind.BUG_SIZED}
    assert words in changes.general[0].message
    assert set(kinds(changes).values()) == {Kind.SAME}
    assert notes(compare_goldens(other, golden)) == {"floor bfloat16": Kind.BUG_SIZED}


def test_slightly_other_round_off_is_drift(golden: Golden) -> None:
    """A floor measured again within the effect size is drift."""
    other = with_floor(golden, "bfloat16", lambda floor: replace(floor, sigma=floor.sigma * np.float32(1.2)))
    assert notes(compare_goldens(golden, other)) == {"floor bfloat16": Kind.DRIFT}


def test_fewer_replicas_are_bug_sized(golden: Golden) -> None:
    """Three replicas where there were 24 widen every limit, though round-off is the same."""

    def fewer(floor: Floor) -> Floor:
        moments = replace(floor.moments, **{name: getattr(floor.moments, name)[:3] for name in floor.moments.__slots__})
        return replace(floor, moments=moments, families=floor.families[:3], effective=2.5)

    changes = compare_goldens(golden, with_floor(golden, "float32", fewer))
    assert Kind.BUG_SIZED in [one.kind for one in changes.general]
    assert any("limits would widen" in one.message for one in changes.general)


def test_a_lost_floor_is_structural_and_a_new_one_is_not(golden: Golden) -> None:
    """A precision that can no longer be judged needs a reason."""
    less = replace(golden, floors={name: one for name, one in golden.floors.items() if name != "bfloat16"})
    assert notes(compare_goldens(golden, less)) == {"floor bfloat16": Kind.STRUCTURAL}
    assert notes(compare_goldens(less, golden)) == {"floor bfloat16": Kind.DRIFT}


def test_without_floors_only_the_same_is_harmless(golden: Golden) -> None:
    """A foreign reference has no floor: what is not equal to the bit needs a reason."""
    foreign = replace(golden, floors={}, directions={}, centres={})
    assert compare_goldens(foreign, foreign).worst is Kind.SAME
    moved = compare_goldens(foreign, with_noise(golden, 1e-3))
    changed = [one for one in moved.prompts if one.kind is not Kind.SAME]
    assert changed
    for one in changed:
        assert one.kind is Kind.BUG_SIZED
        assert "no floor" in one.message
        assert one.deviation is None


def test_a_moved_centre_or_direction_is_named(goldens: Path) -> None:
    """What the cast of the weights gives is compared where the golden keeps it apart, and so is each direction."""
    golden = store.read_golden(goldens / "bloom-tiny/translate")
    centre = golden.centres["bfloat16"]
    far = replace(golden, centres={"bfloat16": replace(centre, projections=centre.projections + np.float32(10))})
    assert notes(compare_goldens(golden, far)) == {"centre bfloat16": Kind.BUG_SIZED}
    name = next(iter(golden.directions))
    step = np.nextafter(golden.directions[name], np.float16(np.inf))
    near = replace(golden, directions={**golden.directions, name: step})
    assert notes(compare_goldens(golden, near)) == {f"direction {name}": Kind.DRIFT}
    other = replace(golden, directions={**golden.directions, name: golden.directions[name] * np.float16(2)})
    assert notes(compare_goldens(golden, other)) == {f"direction {name}": Kind.BUG_SIZED}


def test_the_environment_is_listed(golden: Golden) -> None:
    """Versions, machine and settings that differ are named, whatever the numbers say."""
    provenance = dict(golden.provenance)
    provenance["versions"] = {**provenance["versions"], "torch": "0.1"}
    provenance["settings"] = {**provenance.get("settings", {}), "attn": "other"}
    changes = compare_goldens(golden, replace(golden, provenance=provenance))
    assert [one.name for one in changes.environment] == ["torch", "attn"]
    assert changes.worst is Kind.SAME
