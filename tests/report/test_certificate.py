"""The sensitivity certificate as text and JSON, and what a verdict says of the one beside its golden."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from harness.power.certificate import Bug, Certificate, Column, Sight
from harness.report import certificate as report
from harness.values import Answer, Diagnosis, Status
from tests.report.verdicts import POWER, verdict


def bug(name, group="norms", options=(), **sights):
    """A bug that is seen as given, float32 first."""
    return Bug(id=name, group=group, wrong="wrong", shows="logits", options=options, sights=sights)


def unseen(**more):
    """A sight of nothing."""
    return Sight(seen="not", **more)


SIZE, NAME, TRIED = Sight(seen="size", weakest=0.1), Sight(seen="name", weakest=1.0), Sight(seen="tried")
BUGS = (
    bug("clear", float32=SIZE, bfloat16=SIZE),
    bug("hidden", float32=SIZE, bfloat16=NAME),
    bug("faint", float32=SIZE, bfloat16=unseen(tokens=2.5)),
    bug("fainter", float32=SIZE, bfloat16=unseen(tokens=3.9)),
    bug("hopeless", float32=unseen(tokens=1e7), bfloat16=unseen(signal=math.inf)),
    bug("padded", "cache", float32=unseen(needs=("padding",)), bfloat16=unseen(needs=("padding",))),
    bug("rounding", "precision", float32=unseen(needs=("half",)), bfloat16=TRIED),
    bug("sharp", "precision", float32=unseen(needs=("half",)), bfloat16=unseen(why="the check says identical")),
    bug("clamp", "precision", float32=unseen(needs=("float16",)), bfloat16=unseen(needs=("float16",))),
    bug("pieces", "cache", ("chunk=16",), float32=SIZE, bfloat16=SIZE),
    bug("window", "cache", float32=unseen(needs=("long",)), bfloat16=unseen(needs=("long",))),
    bug("penalty", "stopping", float32=unseen(needs=("penalties",)), bfloat16=unseen(needs=("penalties",))),
)
CERTIFICATE = Certificate(
    golden="m/s",
    digest="abc",
    model="m",
    model_type="llama",
    suite="s",
    run="batched",
    views=("replay", "prefill"),
    prompts=4,
    rows=100,
    longest=60,
    landmarks={"sliding_window": 16, "context": 1024},
    columns=(
        Column(precision="float32", status=Status.IDENTICAL, smallest=4.0, limit=6.0),
        Column(precision="bfloat16", status=Status.DRIFT, smallest=1.9, limit=7.0),
    ),
    bugs=BUGS,
    absent={"gone": "cannot be put into this model"},
    seconds=12.3,
    size=4_500_000,
    trials=3,
    trial_seconds=7.0,
    versions={"torch": "2"},
)


def found():
    """The suggestions by (what, precisions)."""
    return {(one.what, one.precisions): one.ids for one in report.suggestions(CERTIFICATE)}


# --- counts and suggestions --------------------------------------------------------------------


def test_each_bug_is_counted_once():
    """The ways of being seen and not being seen add up to all."""
    assert report.counts_of(BUGS, "bfloat16") == {"size": 2, "tried": 1, "name": 1, "not": 8, "of": 12}
    assert report.counts_of(BUGS, "float32") == {"size": 5, "tried": 0, "name": 0, "not": 7, "of": 12}


def test_what_is_there_already_is_suggested_first():
    """--diagnose, and the precision in which a bug is seen, each with the bugs that it shows."""
    first, *others = report.suggestions(CERTIFICATE)
    assert (first.what, first.precisions, first.ids) == ("check with --diagnose", ("bfloat16",), ("hidden",))
    assert "widened to float32" in others[1].what
    assert (others[1].precisions, others[1].ids) == (("bfloat16",), ("faint", "fainter"))
    assert others[0].what == "judge a candidate in bfloat16 as shipped too"
    assert (others[0].precisions, others[0].ids) == (("float32",), ("rounding",))


def test_what_the_suite_lacks_is_suggested_with_its_lengths():
    """A need is told once for all precisions, and a long prompt with the lengths that the config names."""
    of_all = {what: ids for (what, precisions), ids in found().items() if not precisions}
    (padding,) = [what for what, ids in of_all.items() if ids == ("padded",)]
    assert "unequal length" in padding
    (long,) = [what for what, ids in of_all.items() if ids == ("window",)]
    assert "60 tokens, sliding window 16, context 1024" in long
    (clamp,) = [what for what, ids in of_all.items() if ids == ("clamp",)]
    assert "a floor for float16" in clamp


def test_more_tokens_are_rounded_up_to_powers_of_two():
    """2.5 and 3.9 times the 100 positions are 4 times, 400; ten million times are suggested to nobody."""
    more = {what: ids for (what, _), ids in found().items() if "x the tokens" in what}
    assert more == {"4 x the tokens (about 400 positions), with --diagnose": ("faint", "fainter")}


def test_no_suggestion_is_made_up():
    """What nothing is known to show, and what no suite can ask for, is told apart and suggested nowhere."""
    suggested = {name for ids in found().values() for name in ids}
    assert not suggested & {"hopeless", "sharp", "penalty", "clear", "pieces"}
    assert report.unexplained(CERTIFICATE) == ["hopeless", "sharp"]


def test_what_is_suggested_is_not_seen():
    """Each suggestion is of bugs that are not red in the precisions that it names."""
    by_id = {one.id: one for one in BUGS}
    for one in report.suggestions(CERTIFICATE):
        for name in one.ids:
            for precision in one.precisions or ("float32", "bfloat16"):
                assert by_id[name].sights[precision].seen in ("not", "name")


@pytest.mark.parametrize(
    ("value", "words"), [(1.857, "1.9"), (9.96, "10"), (50.4, "50"), (273.0, "270"), (1_438_000.0, "1,400,000")]
)
def test_numbers_have_two_digits_and_no_exponent(value, words):
    """People read 270, not 2.7e+02."""
    assert report.count_words(value) == words


# --- text --------------------------------------------------------------------------------------


def test_the_table_counts_by_group():
    """Groups are rows and precisions columns: size, tried, name, not, of."""
    rows = {line[:20].strip(): line[20:].split() for line in report.certificate_to_text(CERTIFICATE).splitlines()}
    assert rows["norms"] == ["4", "0", "0", "1", "5", "1", "0", "1", "3", "5"]
    assert rows["cache"] == ["1", "0", "0", "2", "3", "1", "0", "0", "2", "3"]
    assert rows["all"] == ["5", "0", "0", "7", "12", "2", "1", "1", "8", "12"]


def test_the_text_says_what_is_not_seen_and_why():
    """Each bug that is not seen has its reason; aside stand conditions, what is out of reach, and the cost."""
    text = " ".join(report.certificate_to_text(CERTIFICATE).split())
    assert "not seen in float32 (7): hopeless (10,000,000 x the tokens), padded (needs padding)" in text
    assert "faint (2.5 x the tokens)" in text
    assert "sharp (the check says identical)" in text
    assert "the weakest strength still seen in float32, of 1 as reported: clear 0.1, hidden 0.1" in text
    assert "as hf:chunk=16 does: pieces" in text
    assert "out of reach (greedy goldens ask for no penalties and no stop strings): penalty" in text
    assert "no such part: gone" in text
    assert "templates 12 s and 4.5 MB" in text
    assert max(map(len, report.certificate_to_text(CERTIFICATE).splitlines())) <= 120


def test_a_gate_that_alarms_on_the_right_model_says_so():
    """Where the reference itself is red, what bugs do says nothing."""
    red = replace(CERTIFICATE, columns=(replace(CERTIFICATE.columns[0], status=Status.DEVIATES),))
    assert "the gate is of no use in float32" in report.certificate_to_text(red)
    assert "the gate is of no use in float32" in report.certificate_summary(red)
    assert "of no use" not in report.certificate_to_text(CERTIFICATE)


def test_the_summary_is_a_line_for_each_precision():
    """What turns a check red by itself, what --diagnose adds, what is left."""
    first, second = report.certificate_summary(CERTIFICATE).splitlines()
    assert first == (
        "  float32: 5 of 12 bugs of the catalogue turn a check red, 0 more with --diagnose, 7 are not seen"
    )
    assert second.startswith("  bfloat16: 3 of 12 bugs")


def test_json_is_plain():
    """Nothing that JSON cannot hold; counts stand beside each precision."""
    data = report.certificate_to_dict(CERTIFICATE)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["precisions"][1] == {
        "precision": "bfloat16", "status": "drift", "smallest": 1.9, "limit": 7.0,
        "size": 2, "tried": 1, "name": 1, "not": 8, "of": 12,
    }  # fmt: skip
    hopeless = next(one for one in data["bugs"] if one["id"] == "hopeless")
    assert hopeless["sights"]["float32"]["tokens"] == 1e7
    assert hopeless["sights"]["bfloat16"]["signal"] is None


# --- beside a golden ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """A directory with a certificate and the golden that it is of."""
    data = report.certificate_to_dict(CERTIFICATE)
    (tmp_path / report.NAME).write_text(json.dumps(data))
    (tmp_path / "golden.json").write_text(json.dumps({"digest": "abc"}))
    return tmp_path


def change(place, **more):
    """Rewrite the certificate with other values."""
    data = json.loads((place / report.NAME).read_text())
    (place / report.NAME).write_text(json.dumps(data | more))


def test_a_verdict_says_what_it_could_not_see(place):
    """Named bugs are seen with --diagnose alone; a candidate that shows less than logits sees less."""
    (line,) = report.unseen_lines(place, verdict())
    assert line == (
        f"not seen: 9 of 12 bugs of the catalogue in bfloat16 (8 with --diagnose); see {place / report.NAME}"
    )
    answer = Answer(question="precision", status=Status.DRIFT, power=POWER, diagnosis=Diagnosis(limit=6.0))
    (line,) = report.unseen_lines(place, verdict(answers=(answer,)))
    assert line.startswith("not seen: 8 of 12 bugs of the catalogue in bfloat16; see ")
    fewer = replace(answer, power=replace(POWER, level="tokens"))
    (line,) = report.unseen_lines(place, verdict(answers=(fewer,)))
    assert "at least 8 of 12" in line


def test_both_questions_are_told(place):
    """The function and the precision each have a count."""
    function = Answer(question="function", status=Status.DRIFT, power=replace(POWER, precision="float32"))
    own = Answer(question="precision", status=Status.DRIFT, power=POWER)
    (line,) = report.unseen_lines(place, verdict(answers=(function, own)))
    assert "7 of 12 bugs of the catalogue in float32, 9 of 12" in line


def test_nothing_is_said_without_a_certificate_or_a_comparison(place):
    """No file, no comparison, another precision: no line."""
    assert report.unseen_lines(place, verdict(Status.ERROR)) == []
    other = Answer(question="precision", status=Status.DRIFT, power=replace(POWER, precision="float16"))
    assert report.unseen_lines(place, verdict(answers=(other,))) == []
    (place / report.NAME).unlink()
    assert report.unseen_lines(place, verdict()) == []


def test_a_certificate_of_another_golden_is_out_of_date(place):
    """Its numbers are not shown, and what to do is."""
    (place / "golden.json").write_text(json.dumps({"digest": "other"}))
    (line,) = report.unseen_lines(place, verdict())
    assert "out of date" in line
    assert "--update --certificate" in line
    assert "of 12" not in line
    (place / "golden.json").unlink()
    assert "out of date" in report.unseen_lines(place, verdict())[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": 1, "digest": "abc"}',
        b'{"version": 2, "digest": "abc", "precisions": []}',
        b'{"version": 1, "digest": "abc", "precisions": [{"precision": "bfloat16", "size": "many"}]}',
        b'{"version": 1, "digest": "abc", "precisions": [{"precision": 3}]}',
        b'{"version": 1, "digest": "abc", "precisions": [7]}',
        b"1" * 5000,
        b" " * (5 * 2**20),
    ],
)
def test_a_file_that_is_no_certificate_is_told(place, content):
    """Whatever lies there, a check ends with one line about it."""
    (place / report.NAME).write_bytes(content)
    (line,) = report.unseen_lines(place, verdict())
    assert "cannot be read" in line
    assert "\n" not in line


def test_counts_below_zero_and_booleans_are_no_counts(place):
    """A count is a whole number from 0 on."""
    data = json.loads((place / report.NAME).read_text())
    for wrong in (-1, True, 1.5, None):
        row = {**data["precisions"][1], "not": wrong}
        change(place, precisions=[row])
        assert "cannot be read" in report.unseen_lines(place, verdict())[0]


def test_nothing_of_the_file_is_shown_but_numbers(place):
    """Names that another wrote into it reach no terminal."""
    row = {**json.loads((place / report.NAME).read_text())["precisions"][1], "precision": "\x1b[31mbfloat16"}
    change(place, precisions=[row], golden="\x1b[2J", suite="\x1b[2J")
    assert report.unseen_lines(place, verdict()) == []
