"""What would show the bugs that a certificate does not see."""

from __future__ import annotations

from harness.power.certificate import suggestions
from tests.report.certificates import BUGS, CERTIFICATE


def found():
    """The suggestions by (what, precisions)."""
    return {(one.what, one.precisions): one.ids for one in suggestions.suggestions(CERTIFICATE)}


def test_each_bug_is_counted_once():
    """The ways of being seen and not being seen add up to all."""
    assert suggestions.counts_of(BUGS, "bfloat16") == {"size": 2, "tried": 1, "name": 1, "not": 8, "of": 12}
    assert suggestions.counts_of(BUGS, "float32") == {"size": 5, "tried": 0, "name": 0, "not": 7, "of": 12}


def test_what_is_there_already_is_suggested_first():
    """--diagnose, and the precision in which a bug is seen, each with the bugs that it shows."""
    first, *others = suggestions.suggestions(CERTIFICATE)
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
    assert suggestions.unexplained(CERTIFICATE) == ["hopeless", "sharp"]


def test_what_is_suggested_is_not_seen():
    """Each suggestion is of bugs that are not red in the precisions that it names."""
    by_id = {one.id: one for one in BUGS}
    for one in suggestions.suggestions(CERTIFICATE):
        for name in one.ids:
            for precision in one.precisions or ("float32", "bfloat16"):
                assert by_id[name].sights[precision].seen in ("not", "name")
