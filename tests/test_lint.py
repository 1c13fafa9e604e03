"""lint: silent on sound goldens, and names each planted thing and nothing else."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import flow, scorer, store
from harness.errors import GoldenError
from harness.files import content_digest
from harness.lint import Anomaly, lint, numbers
from harness.values import Golden, Rows
from tests.support import read_json, write_model, write_suite

GOLDEN = Path("golden/small/small")
CANDIDATES = 'quick = ["hf:dtype=float32"]\nfull = []\n'


@pytest.fixture
def clean(home: Path) -> Golden:
    """A sound golden with its model, suite and candidates, under `golden/` of the working directory.

    Its floors are those of float32 and float16: bfloat16 leaves steps of a random model undecidable, which lint says.
    """
    golden = store.read_golden(GOLDEN)
    floors = {name: golden.floors[name] for name in ("float32", "float16")}
    Path("golden/small/candidates.toml").write_text(CANDIDATES)
    return put(replace(golden, floors=floors), GOLDEN)


def put(golden: Golden, directory: Path) -> Golden:
    """Write a golden, called after its directory."""
    golden = replace(golden, name=f"{directory.parent.name}/{directory.name}", directory=str(directory))
    store.write_golden(golden, directory)
    return golden


def with_rows(golden: Golden, **arrays: np.ndarray) -> Golden:
    """The golden with other numbers."""
    return replace(golden, rows=replace(golden.rows, **arrays))


def found(**named: Any) -> list[tuple[str, str, str]]:
    """(severity, kind, path) of everything that lint says about `golden/`."""
    return [(one.severity, one.kind, str(one.path)) for one in lint(Path("golden"), **named)]


def only() -> Anomaly:
    """The one thing that lint says about `golden/`."""
    (one,) = lint(Path("golden"))
    return one


def recorded(model: str, out: Path, change: Callable[[Rows], Rows] | None = None) -> Golden:
    """A golden with the floors of `clean`, of a reference whose numbers are changed while it is recorded."""
    sound = scorer.score

    def changed(*given: Any, **named: Any) -> scorer.Scored:
        scored = sound(*given, **named)
        return scored if change is None else replace(scored, rows=change(scored.rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "score", changed)
        return flow.record(model, "prompts/small.toml", out=out, precisions=("float32", "float16"))


# --- sound goldens ----------------------------------------------------------------------------------


def test_a_sound_golden_gives_nothing(clean: Golden) -> None:
    """Nothing is said about a golden that was recorded as it should be, also when its model is asked again."""
    assert found() == []
    assert found(live=True) == []


def test_shipped_goldens_have_no_errors(goldens: Path) -> None:
    """On the shipped goldens only undecidable prompts are mentioned."""
    seen = lint(goldens)
    assert {(one.severity, one.kind) for one in seen} == {("warning", "undecidable")}
    assert "bloom-raw" in {one.path.parent.name for one in seen}


def test_limits_of_rows_lie_far_beyond_the_shipped_goldens(goldens: Path) -> None:
    """The outlier limit is twice the farthest row of all shipped goldens; offsets reach a twentieth of their bound."""
    far, median, offsets = [0.0], [0.0], [0.0]
    for directory in store.list_goldens(goldens):
        golden = store.read_golden(directory)
        for field in ("sigma", "pair"):
            against, _ = numbers._distance(dict(golden.floors), field)
            far.append(float(np.abs(against).max()))
            for name, floor in golden.floors.items():
                alone, _ = numbers._distance({name: floor}, field)
                median.append(float(alone.max()))
        for floor in golden.floors.values():
            offsets += [float(share[room > 0].max()) for share, room in numbers.offset_shares(golden, floor).values()]
    print(f"farthest against 16 bits {max(far):.2f}, against the median {max(median):.2f}, offsets {max(offsets):.3f}")
    assert max(*far, *median) == pytest.approx(numbers.OUTLIER / 2, rel=0.01)
    assert max(offsets) < 0.06


def test_no_golden_at_all_is_an_error(tmp_path: Path) -> None:
    """A directory without any golden cannot be called clean."""
    with pytest.raises(GoldenError, match="no golden under"):
        lint(tmp_path)


# --- one of each ----------------------------------------------------------------------------------------


def test_one_planted_anomaly_of_each_kind_is_named_and_nothing_else(clean: Golden) -> None:
    """A directory with one thing of each kind beside sound goldens: all are named, and nothing else is."""
    root = Path("golden/small")
    put(clean, root / "small-broken")
    (root / "small-broken/golden.safetensors").write_bytes(b"PK\x03\x04")
    (root / "lost").mkdir()
    shutil.copy(GOLDEN / "golden.safetensors", root / "lost")
    other = write_suite(
        Path("prompts/other.toml"), Path("prompts/small.toml").read_text().replace("morning", "evening")
    )
    put(replace(clean, provenance={**clean.provenance, "suite_path": f"../../../{other}"}), root / "small-stale")
    put(clean, root / "small-tp8")
    flat = clean.floors["float16"]
    put(replace(clean, floors={**clean.floors, "float16": replace(flat, pair=flat.pair * 1000)}), root / "small-flat")
    projections = clean.rows.projections.copy()
    projections[clean.rows.request == 1] += np.float32(1e-2)
    put(with_rows(clean, projections=projections), root / "small-apart")
    write_model(Path("golden/other/model"), seed=2)
    Path("golden/other/candidates.toml").write_text(CANDIDATES)
    recorded("golden/other/model", Path("golden/other/small"), scored_wrongly)
    assert set(found()) == {
        ("error", "unreadable", "golden/small/small-broken"),
        ("error", "orphan", "golden/small/lost"),
        ("error", "stale", "golden/small/small-stale"),
        ("error", "name", "golden/small/small-tp8"),
        ("warning", "undecidable", "golden/small/small-flat"),
        ("error", "contradiction", "golden/small/small-apart"),
        ("error", "anomaly", "golden/other/small"),
    }


def scored_wrongly(rows: Rows) -> Rows:
    """One prompt position whose best token was scored in the place of the one that follows."""
    at = 25
    assert not rows.generated[at]
    logp = rows.logp.copy()
    logp[at] = np.float32(-0.75)
    return replace(rows, logp=logp)


# --- unreadable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b'{"format": 2}', b"null", b"\xff\xfe", b'{"format": 2, "digest": 1e999}'],
)
def test_a_golden_json_of_any_content_is_unreadable(clean: Golden, content: bytes) -> None:
    """Whatever stands in golden.json, it is called unreadable and nothing is raised."""
    (GOLDEN / "golden.json").write_bytes(content)
    assert found() == [("error", "unreadable", str(GOLDEN))]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [path, *(found for key, item in items for found in _paths(item, (*path, key)))]
        if path
        else [found for key, item in items for found in _paths(item, (key,))]
    )


_HOSTILE = st.sampled_from(
    [
        *(None, True, 0, -1, 2**31, 10**400, 1.5, [], {}, [[]], [{}], {"a": 1}),
        *("", "\0", "../../../..", "/", "x" * 5000, "\x1b[2J\n"),
    ]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_hostile_document_is_never_a_crash(clean: Golden, data: st.DataObject) -> None:
    """Any value in the place of any other, with a right digest, gives anomalies or none, and never an exception."""
    file = GOLDEN / "golden.json"
    before = file.read_bytes()
    document = json.loads(before)
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from([one for one in _paths(document) if one[0] != "digest"]))
        place = document
        for key in parents:
            place = place[key]
        place[last] = data.draw(_HOSTILE)
    document["digest"] = content_digest(document)
    try:
        file.write_text(json.dumps(document))
        lint(Path("golden"))
    finally:
        file.write_bytes(before)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_numbers_are_never_a_crash(clean: Golden, data: st.DataObject) -> None:
    """Arrays of any finite numbers give anomalies or none, and never an exception or a warning of numpy."""
    name = data.draw(st.sampled_from(["logp", "entropy", "logsumexp", "projections", "top_logits"]))
    value = np.float32(data.draw(st.sampled_from([0.0, -1.0, 1.0, 1e38, -1e38, 1e-45])))
    floor = data.draw(st.sampled_from(["sigma", "pair"]))
    other = with_rows(clean, **{name: np.full_like(getattr(clean.rows, name), value)})
    floors = {
        one: replace(each, **{floor: np.full_like(getattr(each, floor), value)}) for one, each in clean.floors.items()
    }
    put(replace(other, floors=floors), GOLDEN)
    put(clean, Path("golden/small/small-again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lint(Path("golden"))
    put(clean, GOLDEN)


def test_a_suite_a_model_and_a_list_that_cannot_be_read_are_named(clean: Golden) -> None:
    """The files beside a golden are named when they are not what they should be."""
    Path("prompts/small.toml").write_text("name = [")
    Path("golden/small/candidates.toml").write_text("quick = [")
    Path("golden/small/model/model.safetensors").write_bytes(b"\x01")
    assert sorted(found()) == [
        ("error", "unreadable", "golden/small/candidates.toml"),
        ("error", "unreadable", "golden/small/model"),
        ("error", "unreadable", "prompts/small.toml"),
    ]


def test_a_path_that_no_recording_writes_is_unreadable(clean: Golden) -> None:
    """A suite path that is no relative path is not followed."""
    for path in (7, "/etc/passwd", "a\0b"):
        put(replace(clean, provenance={**clean.provenance, "suite_path": path}), GOLDEN)
        assert only().kind == "unreadable"


# --- orphans and stale ones -------------------------------------------------------------------------------------


def test_a_golden_whose_suite_or_model_is_gone_is_an_orphan(clean: Golden) -> None:
    """What a golden was recorded from must be there."""
    Path("prompts/small.toml").unlink()
    assert "suite" in only().message
    write_suite(Path("prompts/small.toml"))
    shutil.rmtree("golden/small/model")
    one = only()
    assert (one.kind, one.path) == ("orphan", GOLDEN)
    assert "model" in one.message


def test_a_model_that_no_golden_is_of_is_an_orphan(clean: Golden) -> None:
    """A model under the directory is there for a golden; where one beside it cannot be read, it may be that one's."""
    shutil.copytree("golden/small/model", "golden/unused/model")
    assert found() == [("error", "orphan", "golden/unused/model")]
    put(clean, Path("golden/unused/small"))
    (GOLDEN.parent.parent / "unused/small/golden.json").write_text("{}")
    assert [one[1:] for one in found()] == [("unreadable", "golden/unused/small")]


def test_arrays_alone_and_leftovers_are_orphans(clean: Golden) -> None:
    """What an interrupted recording left behind is named, with a golden beside it as a warning."""
    staged = GOLDEN / "golden.safetensors.0123456789abcdef"
    staged.write_bytes(b"")
    assert found() == [("warning", "orphan", str(staged))]
    (GOLDEN / "golden.json").unlink()
    assert ("error", "orphan", str(GOLDEN)) in found()


def test_a_golden_that_nothing_is_checked_with_is_a_warning(clean: Golden) -> None:
    """Without candidates.toml `check --all` cannot look at a golden."""
    Path("golden/small/candidates.toml").unlink()
    assert found() == [("warning", "orphan", str(GOLDEN))]
    (GOLDEN / "candidates.toml").write_text(CANDIDATES)
    assert found() == []


def test_a_changed_suite_is_stale_and_its_prompts_are_named(clean: Golden) -> None:
    """The suite's digest is that of the golden, or the golden is stale; a changed description is no change."""
    text = Path("prompts/small.toml").read_text()
    write_suite(Path("prompts/small.toml"), text.replace("unequal", "different"))
    assert found() == []
    write_suite(Path("prompts/small.toml"), text.replace("morning", "evening"))
    one = only()
    assert (one.kind, one.path) == ("stale", GOLDEN)
    assert "prompts short" in one.message


def test_changed_weights_are_stale_for_each_golden_of_the_model(clean: Golden) -> None:
    """Other weights make every golden of the model stale, and the model is asked nothing then."""
    put(clean, Path("golden/small/small-again"))
    write_model(Path("golden/small/model"), seed=3)
    assert found(live=True) == [
        ("error", "stale", str(GOLDEN)),
        ("error", "stale", "golden/small/small-again"),
    ]
    assert "other weights" in lint(Path("golden"))[0].message


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "sound"),
    [
        ("small-bf16", {}, True),  # the weights
        ("small-fp16", {}, True),  # a floor
        ("small-fp64", {}, True),  # the reference
        ("small_fp8", {}, False),
        ("small-int8", {}, False),
        ("small-int8", {"weights": "int8-g64"}, True),
        ("small-tp8", {}, False),
        ("small-tp8", {"tensor_parallel": 8}, True),
        ("small-tp8", {"tensor_parallel": 1}, False),
        ("small-tp1", {}, True),
        ("small-pp2", {"tensor_parallel": 2}, False),
        ("small-pp2", {"pipeline_parallel": 2}, True),
        ("small-eager", {"attn": "sdpa"}, False),
        ("small-eager", {"attn": "eager"}, True),
        ("small-sdpa", {}, False),
        ("small-cuda", {}, False),
        ("small-cuda", {"device": "cuda:0"}, True),
        ("small-cpu", {}, True),
        ("small-top", {}, True),
    ],
)
def test_a_claim_in_a_name_must_be_backed(clean: Golden, name: str, settings: dict[str, Any], sound: bool) -> None:
    """A precision, sharding, kernel or device in a name that nothing in the golden backs is an error."""
    directory = GOLDEN.parent / name
    put(replace(clean, provenance={**clean.provenance, "settings": settings}), directory)
    assert found() == ([] if sound else [("error", "name", str(directory))])


def test_a_floor_of_a_tensor_parallelism_backs_its_name(clean: Golden) -> None:
    """A golden called tp2 may have its own floors for that."""
    floors = {**clean.floors, "float16/tp2": clean.floors["float16"]}
    put(replace(clean, floors=floors), GOLDEN.parent / "small-tp2")
    assert found() == []


def test_the_model_part_of_a_name_speaks_of_the_weights(clean: Golden) -> None:
    """`small-fp16/small` says that the model is in float16; that there is a floor for it is no excuse."""
    shutil.copytree("golden/small", "golden/small-fp16")
    put(clean, Path("golden/small-fp16/small"))
    assert [one[:2] for one in found()] == [("error", "name")]
    assert "bfloat16" in only().message


def test_a_directory_is_called_after_what_it_holds(clean: Golden) -> None:
    """A moved golden and one that is called after another suite are errors, another word alone is a warning."""
    shutil.copytree(GOLDEN, "golden/small/small-moved")
    assert "moved or copied" in only().message
    shutil.rmtree("golden/small/small-moved")
    put(clean, Path("golden/small/tiny"))
    assert found() == [("warning", "name", "golden/small/tiny")]
    shutil.rmtree("golden/small/tiny")
    suite = replace(clean.suite, name="edge")
    put(replace(clean, suite=suite, provenance={**clean.provenance, "suite_path": None}), Path("golden/small/small-x"))
    assert found() == [("error", "name", "golden/small/small-x")]


# --- contradictions --------------------------------------------------------------------------------------------


def shorter(golden: Golden, name: str) -> Golden:
    """A golden of the same prompts with fewer new tokens, recorded from the same model."""
    text = Path("prompts/small.toml").read_text().replace("max_new_tokens = 6", "max_new_tokens = 3")
    write_suite(Path("prompts/short.toml"), text)
    directory = GOLDEN.parent / name
    return flow.record("golden/small/model", "prompts/short.toml", out=directory, precisions=("float32", "float16"))


def test_suites_that_share_prompts_agree_on_what_they_share(clean: Golden) -> None:
    """Goldens of unequal lengths are compared as far as both go, and agree; a wrong row of one is found."""
    short = shorter(clean, "small-short")
    assert found() == []
    projections = short.rows.projections.copy()
    at = np.flatnonzero((short.rows.request == 2) & (short.rows.position == 4))[0]
    projections[at] *= np.float32(1.01)
    put(with_rows(short, projections=projections), GOLDEN.parent / "small-short")
    one = only()
    assert (one.kind, one.severity) == ("contradiction", "error")
    assert one.where == "prompt 'ids', position 4"
    assert str(GOLDEN) in one.message + str(one.path)
    assert "x the limit" in one.message


def test_a_foreign_golden_is_judged_by_the_one_with_floors(clean: Golden) -> None:
    """Of two goldens the one with floors is the judge, whichever comes first; two without can only be suspected."""
    foreign = replace(clean, floors={}, centres={}, directions={}, provenance={**clean.provenance, "engine": "py:a:b"})
    near = clean.rows.projections + np.float32(1e-7)
    put(with_rows(foreign, projections=near), GOLDEN.parent / "a-small")
    assert found() == []
    far = clean.rows.projections + np.float32(1.0)
    put(with_rows(foreign, projections=far), GOLDEN.parent / "a-small")
    assert [one[:2] for one in found()] == [("error", "contradiction")]
    assert "and in 2 more prompts" in only().message
    put(foreign, GOLDEN)
    assert [one[:2] for one in found()] == [("warning", "contradiction")]


def test_a_foreign_golden_in_bfloat16_is_judged_in_bfloat16(home: Path) -> None:
    """A reference that was computed in 16 bits may differ by the round-off of 16 bits, and by no more."""
    golden = store.read_golden(GOLDEN)
    sigma = golden.floors["bfloat16"].sigma[:, None] / math.sqrt(golden.rows.projections.shape[1])
    noise = np.random.default_rng(0).standard_normal(golden.rows.projections.shape) * sigma
    foreign = replace(golden, floors={}, centres={}, directions={}, precision="bfloat16")
    for times, kinds in ((1, set()), (20, {"contradiction"})):
        projections = (golden.rows.projections + times * noise).astype(np.float32)
        put(with_rows(foreign, projections=projections), GOLDEN.parent / "small-foreign")
        assert {one[1] for one in found() if one[0] == "error"} == kinds


def test_other_models_do_not_contradict_each_other(clean: Golden) -> None:
    """The same prompts on another model are no contradiction; other weights under the same name are."""
    model = replace(clean.model, digest="1" * 64, signature="2" * 64, path=None, name="small-2")
    far = with_rows(clean, projections=clean.rows.projections + np.float32(1.0))
    (GOLDEN.parent.parent / "small-2").mkdir()
    Path("golden/small-2/candidates.toml").write_text(CANDIDATES)
    put(replace(far, model=model), Path("golden/small-2/small"))
    assert found() == []
    put(replace(far, model=replace(model, signature=clean.model.signature, name="small")), Path("golden/small-2/small"))
    assert [one[:2] for one in found()] == [("error", "contradiction")]


# --- anomalies: recorded for real from a reference that is wrong ------------------------------------------------


def test_a_token_scored_wrongly_is_found(clean: Golden) -> None:
    """A golden that was recorded with log p of another token at one prompt position is found by its own replicas."""
    put(recorded("golden/small/model", GOLDEN.parent / "small-odd", scored_wrongly), GOLDEN.parent / "small-odd")
    shutil.rmtree(GOLDEN)
    seen = lint(Path("golden"))
    assert {(one.kind, one.severity) for one in seen} == {("anomaly", "error")}
    assert any("all replicas" in one.message and "prompt 'long', prompt rows" in one.where for one in seen)


def test_a_row_that_the_reference_got_wrong_is_found(clean: Golden) -> None:
    """A golden that was recorded with one row of logits of another position is found, and the position is named."""

    def exchanged(rows: Rows) -> Rows:
        projections = rows.projections.copy()
        projections[20] += np.float32(1e-2) * projections[21]
        return replace(rows, projections=projections)

    golden = recorded("golden/small/model", GOLDEN.parent / "small-odd", exchanged)
    shutil.rmtree(GOLDEN)
    one = only()
    name = golden.requests[int(golden.rows.request[20])].id
    assert one.where == f"prompt {name!r}, position {golden.rows.position[20]}"
    assert "disagrees with all of its replicas" in one.message


# --- anomalies: planted in the numbers ------------------------------------------------------------------------------


def _at(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


PLANTED: dict[str, Callable[[Rows], dict[str, np.ndarray]]] = {
    "log p is above 0": lambda rows: {"logp": _at(rows.logp, 3, 1e-3)},
    "outside 0 to log V": lambda rows: {"entropy": _at(rows.entropy, 3, 6.0)},
    "smaller than that of the next token alone": lambda rows: {
        "entropy": _at(rows.entropy, (at := int(np.argmin(np.abs(rows.logp + 0.7)))), 0.0),
        "logp": _at(rows.logp, at, math.log(0.5)),
    },
    "larger than the next token's probability leaves": lambda rows: {"logp": _at(rows.logp, 3, -1e-6)},
    "not in order": lambda rows: {"top_logits": _at(rows.top_logits, (2, [4, 9]), rows.top_logits[2, [9, 4]])},
    "name a token twice": lambda rows: {"top_ids": _at(rows.top_ids, (2, 5), rows.top_ids[2, 4])},
    "not its logit less the logsumexp": lambda rows: {
        "logsumexp": _at(rows.logsumexp, np.flatnonzero(rows.generated)[3], 50.0)
    },
    "more than the whole probability": lambda rows: {
        "logsumexp": (changed := _at(rows.logsumexp, (at := np.flatnonzero(rows.generated)[3]), 0.0)),
        "top_logits": _at(rows.top_logits, 3, -np.linspace(0.1, 1, rows.top_logits.shape[1])),
        "logp": _at(rows.logp, at, -0.1 - changed[at]),
    },
    "smaller than that of the top entries alone": lambda rows: {
        "entropy": _at(
            rows.entropy, np.flatnonzero(rows.generated)[(step := _sure(rows))], _shown(rows, step)[0] * 0.99
        )
    },
    "larger than the top entries leave": lambda rows: {
        "entropy": _at(
            rows.entropy, np.flatnonzero(rows.generated)[(step := _sure(rows))], 1.01 * _shown(rows, step)[1]
        )
    },
    "more than half of the probability": lambda rows: {
        "logp": _at(rows.logp, (at := _other_prompt_row(rows)), math.log(0.7)),
        "entropy": _at(rows.entropy, at, 1.0),
    },
    "less than any best token": lambda rows: {"logp": _at(rows.logp, _best_prompt_row(rows), -40.0)},
    "best token is not the first": lambda rows: {
        "argmax": _at(rows.argmax, np.flatnonzero(rows.generated)[4], rows.top_ids[4, 3])
    },
    "generated token is not the reference's best": lambda rows: {
        "top_ids": _at(rows.top_ids, (4, [0, 1]), rows.top_ids[4, [1, 0]]),
        "argmax": _at(rows.argmax, np.flatnonzero(rows.generated)[4], rows.top_ids[4, 1]),
    },
}


def _sure(rows: Rows) -> int:
    """The generated step of the least entropy."""
    return int(np.argmin(rows.entropy[rows.generated]))


def _shown(rows: Rows, step: int) -> tuple[float, float]:
    """(the entropy that the top entries of a step have alone, what they leave of entropy at most)."""
    shown = rows.top_logits[step].astype(np.float64) - float(rows.logsumexp[rows.generated][step])
    p = np.exp(shown)
    rest = 1 - p.sum()
    alone = float(-(p * shown).sum())
    return alone, alone - rest * math.log(rest) + rest * math.log(301 - len(p))


def _other_prompt_row(rows: Rows) -> int:
    """A prompt row of the short prompt; the token that follows it is hardly ever the best of a random model."""
    return 5


def _best_prompt_row(rows: Rows) -> int:
    """Any row whose next token is the best: the first generated one."""
    return int(np.flatnonzero(rows.generated)[0])


@pytest.mark.parametrize("words", PLANTED)
def test_numbers_that_no_softmax_has_are_named(clean: Golden, words: str) -> None:
    """Each relation that must hold of any softmax and of greedy decoding is broken by hand, and named."""
    put(with_rows(clean, **PLANTED[words](clean.rows)), GOLDEN)
    seen = lint(Path("golden"))
    assert {(one.kind, one.severity) for one in seen} == {("anomaly", "error")}
    assert any(words in one.message for one in seen)


def test_a_wrong_centre_is_named(clean: Golden, goldens: Path) -> None:
    """The centre of a precision must be a softmax as well."""
    golden = store.read_golden(goldens / "bloom-tiny/headline")
    centre = golden.centres["bfloat16"]
    wrong = replace(centre, logp=_at(centre.logp, 5, 0.5))
    seen = list(numbers.look(Path("x"), replace(golden, centres={"bfloat16": wrong})))
    assert any("the centre of bfloat16: log p is above 0" in one.message for one in seen)


def test_a_near_tie_of_a_coarse_reference_is_no_anomaly(clean: Golden) -> None:
    """Decode and prefill of a reference in float32 may turn a near tie; without a floor that is a warning."""
    rows = clean.rows
    swapped = PLANTED["generated token is not the reference's best"](rows)
    noise = float(clean.floors["float32"].pair[4])
    top = rows.top_logits.astype(np.float64)
    # Lift the second entry to just below the first, and let the sum and its entropy be as they are nearly.
    gap = top[4, 0] - top[4, 1]
    near = _at(rows.top_logits, (4, 1), np.float32(top[4, 0] - min(gap, noise)))
    # The generated token's log p is that of its logit: how large the noise is depends on the processor.
    row = np.flatnonzero(rows.generated)[4]
    logp = _at(rows.logp, row, rows.logp[row] - min(gap, noise))
    messages = {}
    for name, golden in {
        "judged": replace(clean, precision="float32"),
        "unknown": replace(clean, precision="float32", floors={}, directions={}),
        "strict": clean,
    }.items():
        seen = numbers.look(Path("x"), with_rows(golden, **swapped, top_logits=near, logp=logp))
        messages[name] = [one.severity for one in seen if "generated token is not" in one.message]
    assert messages == {"judged": [], "unknown": ["warning"], "strict": ["error"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda floor: replace(floor, sigma=-floor.sigma), "negative"),
        (lambda floor: replace(floor, effective=99.0), "independent"),
        (lambda floor: replace(floor, sigma=_at(floor.sigma, 7, 1.0)), "disagrees with all of its replicas"),
        (lambda floor: replace(floor, pair=_at(floor.pair, 7, 1.0)), "noise of the top entries"),
    ],
)
def test_floors_that_no_measurement_gives_are_named(clean: Golden, change: Callable, words: str) -> None:
    """Negative round-off, too many replicas, and a row at which float32 is as coarse as 16 bits."""
    floors = {**clean.floors, "float32": change(clean.floors["float32"])}
    put(replace(clean, floors=floors), GOLDEN)
    assert any(words in one.message for one in lint(Path("golden")))


def test_a_golden_with_one_floor_is_held_against_its_median(clean: Golden) -> None:
    """Without a second precision a row stands out against the others of its golden, if it is gross."""
    floor = clean.floors["float32"]
    sound = replace(clean, floors={"float32": floor})
    assert not list(numbers.look(Path("x"), sound))
    wrong = replace(sound, floors={"float32": replace(floor, sigma=_at(floor.sigma, 7, 1.0))})
    (one,) = numbers.look(Path("x"), wrong)
    assert "median row" in one.message


def test_the_model_is_asked_again(clean: Golden) -> None:
    """Live, a golden whose logits are not those of its model is found, and the position named."""
    at = 20
    projections = _at(clean.rows.projections, at, clean.rows.projections[at] * np.float32(1.1))
    put(with_rows(clean, projections=projections), GOLDEN)
    assert found() == []
    (one,) = lint(Path("golden"), live=True)
    name = clean.requests[int(clean.rows.request[at])].id
    assert one.where == f"prompt {name!r}, position {clean.rows.position[at]}"
    assert "asked again" in one.message
    assert read_json(GOLDEN / "golden.json")["name"] == "small/small"


def test_a_streamed_golden_is_asked_by_streaming(clean: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not fit into memory is not loaded to be asked again, and a row that its model does not say is found."""
    streamed = replace(clean, provenance={**clean.provenance, "engine": "stream"})
    put(streamed, GOLDEN)
    monkeypatch.setattr(scorer, "open_reference", lambda *_args, **_how: pytest.fail("it is loaded"))
    assert found(live=True) == []
    at = int(np.flatnonzero(clean.rows.generated)[0])
    projections = _at(clean.rows.projections, at, clean.rows.projections[at] * np.float32(1.1))
    put(with_rows(streamed, projections=projections), GOLDEN)
    (one,) = lint(Path("golden"), live=True)
    assert "asked again" in one.message
