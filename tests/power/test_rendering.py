"""Text and JSON of detection tables."""

import json
import math
from dataclasses import replace

import pytest

from harness.power import detection, rendering
from harness.power.curves import Curve, Point
from harness.power.detection import Share
from harness.power.rendering import beside_tables, percent, point_words, tables_to_dict, tables_to_text
from tests.power.synthetic import criterion, mutation, named, null, rules, trial

CATALOGUE = named(mutation("bug-a"), mutation("bug-b", group="tensor parallel", subtlety="gross"))
RULES = rules(
    criterion("rule", sees="tokens", bfloat16=2.0),
    criterion("a-rule-with-a-name-that-is-long"),
    criterion("blind"),
)
SCORES = {"rule": 9.0, "a-rule-with-a-name-that-is-long": 1.0, "blind": 9.0}


def tables(missed=3):
    """Bugs found by ours on six hosts and missed on some more, with a blind rule and a good one."""
    trials = [
        trial("bug-a", "deviates" if n < 6 else "drift", host=f"host-{n}", signal=10 ** (1.5 - n / 4), error=1.0,
              levels={"tokens": "drift"}, scores=SCORES)
        for n in range(6 + missed)
    ]  # fmt: skip
    trials += [trial("bug-b", "deviates", signal=7.0, scores=SCORES), trial("bug-b", "drift", signal=0.0)]
    trials.append(trial("bug-b", "skipped", host="nowhere"))
    trials.append(null(scores={"rule": 0.5, "a-rule-with-a-name-that-is-long": 2.0, "blind": math.inf}))
    return detection.tables(trials, RULES, CATALOGUE)


def line_with(text, *words):
    """The one line that begins with the first word and holds the others."""
    (found,) = (line for line in text.splitlines() if line.startswith(words[0]) and all(w in line for w in words))
    return found


def test_no_line_is_wider_than_120_columns():
    """Survivors with many finders are wrapped."""
    assert max(map(len, tables_to_text(tables()).splitlines())) <= 120


def test_the_totals_of_a_judge():
    """Seven of ten, four of the five with S/N >= 3 in subtle and the one gross, no alarm on one null: at most 95 %."""
    line = line_with(tables_to_text(tables()), "golden-harness: all", "7/10")
    assert line.split()[2:] == ["7/10", "70%", "6/6", "1/1", "-", "6/9", "0/1", "95.00%"]


def test_judges_are_listed_by_detection():
    """The rule that finds all stands above ours."""
    lines = tables_to_text(tables()).splitlines()
    order = [line.split("  ")[0] for line in lines if "/10 " in line and "%" in line]
    assert order[0].startswith("rule")
    assert order.index("golden-harness: all") == 2


def test_a_rule_without_a_threshold_is_marked():
    """A null with the worst score makes it blind, and a line below says so."""
    text = tables_to_text(tables())
    assert line_with(text, "blind calibrated", "/").endswith("*")
    assert "* no threshold: a correct implementation has the worst score there is" in text


def test_groups_by_their_short_names():
    """Six of nine in the cache are 66 %, one of one under tensor parallelism 100 %."""
    text = tables_to_text(tables())
    head = line_with(text, "by group")
    row = next(line for line in text.splitlines() if line.startswith("golden-harness: all") and "66%" in line)
    assert row[head.index("cache") :].startswith("66%")
    assert row[head.index("tp ") :].startswith("100%")
    assert line_with(text, "bugs")[head.index("cache") :].startswith("9")


def test_survivors_say_why_and_who_found_them():
    """Each bug that ours misses stands with its host, reason and finders."""
    text = tables_to_text(tables())
    assert "missed: 3 below the floor, 1 equivalent" in text
    assert "found by rule calibrated, rule" in line_with(text, "  bug-a on host-7: below the floor: S/N 0.56")
    assert line_with(text, "  bug-b on host: equivalent")


def test_long_lists_of_survivors_are_cut_but_for_what_peers_find(monkeypatch):
    """Those that a peer finds are all shown; of the others as many as fit, and how many are left out."""
    monkeypatch.setattr(rendering, "_LISTED", 2)
    assert tables_to_text(tables(missed=6)).count("  bug-a on host-") == 6
    (table,) = tables(missed=6)
    (alone,) = (one for one in table.survivors if not one.finders)
    others = [replace(alone, trial=replace(alone.trial, name=name)) for name in "abc"]
    assert rendering._survivors(others)[-1] == "  and 1 more: equivalent"


def test_a_bug_that_hosts_miss_alike_has_one_line():
    """Hosts are listed in order, with the smallest and the largest S/N; a hole is never put together."""
    alone = tables()[0].survivors[-1]
    small = replace(alone, reason="below the floor", explanation="below the floor: S/N 0.1")
    several = [replace(small, trial=replace(alone.trial, name="x", host=host, signal=signal))
               for host, signal in (("b", 0.3), ("a", 0.1))]  # fmt: skip
    assert rendering._survivors(several)[1:] == ["  x on a, b: below the floor, S/N 0.1 to 0.3"]
    holes = [replace(one, reason="HOLE", explanation="HOLE: S/N 9") for one in several]
    assert rendering._survivors(holes)[1:] == ["  x on b: HOLE: S/N 9", "  x on a: HOLE: S/N 9"]


def test_what_is_not_counted_is_said():
    """The bug without a signal and the one that was skipped have a line each."""
    text = tables_to_text(tables())
    assert "not counted, 1 x no signal in float64: golden-harness: all finds 0" in text
    assert "not judged, 1 x skipped" in text


def test_targets_are_reached_or_missed():
    """Seven of ten are more than 60 %; the peer above by three of ten is inside so few trials' interval."""
    text = tables_to_text(tables())
    assert line_with(text, "reached  60% of all bugs found: 7 of 10")
    assert line_with(text, "MISSED   tokens alone")


def test_nothing_to_show():
    """No table is said in words."""
    assert tables_to_text(()) == "nothing was judged"


@pytest.mark.parametrize(
    ("found", "total", "text"), [(999, 1000, "99%"), (1000, 1000, "100%"), (0, 0, "-"), (1, 3, "33%")]
)
def test_percent_is_rounded_down(found, total, text):
    """100 % is all of them."""
    assert percent(Share(found=found, total=total)) == text


@pytest.mark.parametrize(("point", "text"), [
    ((1.234, 0.98, 1.5), "1.2 (0.98 to 1.5)"), ((0.0, 0.0, 0.0), "< 0.1"), ((math.inf, math.inf, math.inf), "> 50"),
    ((2.0, 0.0, math.inf), "2 (< 0.1 to > 50)"),
])  # fmt: skip
def test_points_in_words(point, text):
    """What lies outside the S/N that were tried is called by the nearer end."""
    value = Point(value=point[0], low=point[1], high=point[2])
    line = Curve(intercept=0, slope=1, smallest=0.1, largest=50, even=value, nearly=value, bins=())
    assert point_words(value, line) == text


def test_json_is_plain_and_complete():
    """Strict JSON, inf as null with a note, all judges, comparisons and survivors."""
    found = tables()
    plain = json.loads(json.dumps(tables_to_dict(found), allow_nan=False))
    table = plain["precisions"]["bfloat16"]
    assert "null" in plain["note"]
    by_name = {one["judge"]: one for one in table["judges"]}
    assert by_name["blind calibrated"]["threshold"] is None
    assert by_name["rule published"]["threshold"] == 2.0
    assert by_name["golden-harness: all"]["total"] == {"found": 7, "total": 10}
    assert by_name["golden-harness: all"]["false"]["bound"] == pytest.approx(0.95)
    assert len(table["comparisons"]) == len(found[0].comparisons)
    assert [one["reason"] for one in table["survivors"]] == ["below the floor"] * 3 + ["equivalent"]
    assert table["not judged"] == {"skipped": 1}


def test_a_bug_of_a_precision_without_a_table_is_told():
    """Where no correct implementation was run in a precision, its bugs have a line each, found of all."""
    trials = [trial(kind="bug", name="pr-fp16-clamp", host=host, precision="float16", status=status)
              for host, status in (("a", "deviates"), ("b", "drift"), ("c", "skipped"))]  # fmt: skip
    assert beside_tables(trials, []) == ["float16 alone: pr-fp16-clamp: 1 of 2 found"]
    assert beside_tables([trial(kind="benign", precision="float16")], []) == []
