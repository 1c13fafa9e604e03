"""The figure of detection: what is drawn, the same bytes twice, and errors that say what to do."""

import builtins
import importlib.util
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.power import detection, plot
from harness.power.plot import spread, write_plot
from tests.power.synthetic import criterion, mutation, named, null, rules, trial

NAMES = [f"rule-{number}" for number in range(10)]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib, of the extra `report`, is not installed"
)


def table(rules_known=NAMES):
    """Bugs of falling S/N; rule n finds those above 2 n, rule-9 has no threshold left."""
    signals = [10 ** (2 - n / 10) for n in range(40)]
    trials = [
        trial(f"bug-{n}", "deviates" if signal > 1 else "drift", signal=signal,
              levels={"tokens": "deviates" if signal > 9 else "drift"},
              scores=dict.fromkeys(rules_known, signal))
        for n, signal in enumerate(signals)
    ]  # fmt: skip
    worst = {name: 2.0 * n if n < 9 else float("inf") for n, name in enumerate(rules_known)}
    (found,) = detection.tables(
        [*trials, null(scores=worst)],
        rules(*(criterion(name) for name in rules_known)),
        named(*(mutation(f"bug-{n}") for n in range(40))),
    )
    return found


@needs_matplotlib
def test_the_same_table_gives_the_same_bytes(tmp_path):
    """Neither a date nor a random id is in a file."""
    for suffix in (".svg", ".png"):
        one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
        write_plot(table(), one)
        write_plot(table(), other)
        assert one.read_bytes() == other.read_bytes()
        assert b"<dc:date>" not in one.read_bytes()


@needs_matplotlib
def test_the_suffix_says_the_format(tmp_path):
    """An SVG is XML, a PNG is 900 pixels wide."""
    write_plot(table(), tmp_path / "a.svg")
    write_plot(table(), tmp_path / "a.png")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    header = (tmp_path / "a.png").read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert int.from_bytes(header[16:20], "big") == 900


def test_ours_and_the_best_peers_are_drawn():
    """Ours on everything and on tokens, then seven calibrated rules, the most sensitive first; no blind one."""
    names = [line.name for line in plot._lines(table())]
    assert names == ["golden-harness: all", "golden-harness: tokens", *NAMES[:7]]
    few = [line.name for line in plot._lines(table(NAMES[:2]))]
    assert few == ["golden-harness: all", "golden-harness: tokens", "rule-0", "rule-1"]


def test_lines_can_be_told_apart():
    """No two have the same colour and style, and no two peers the same marker."""
    lines = plot._lines(table())
    assert len({(line.colour, line.style) for line in lines}) == len(lines)
    assert len({line.marker for line in lines}) == len(lines) - 1


@needs_matplotlib
@pytest.mark.parametrize("name", ["plot.pdf", "plot", "plot.jpg"])
def test_other_suffixes_are_refused(tmp_path, name):
    """The error names the two that can be written."""
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        write_plot(table(), tmp_path / name)


@needs_matplotlib
def test_a_table_without_a_signal_cannot_be_drawn(tmp_path):
    """The error names the precision."""
    (empty,) = detection.tables([null()], {}, {})
    with pytest.raises(UsageError, match="bfloat16"):
        write_plot(empty, tmp_path / "a.svg")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    """The error is the command that installs it."""
    original = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'golden-harness\[report\]'"):
        write_plot(table(), tmp_path / "a.svg")


def test_labels_that_are_apart_stay():
    """Only what would overlap moves, down, and up again from the bottom."""
    assert spread([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1]
    assert spread([1.0, 1.0, 0.5], 0.25) == [1.0, 0.75, 0.5]
    assert spread([0.0, 0.0], 0.25) == [0.25, 0.0]


@given(st.lists(st.floats(0, 1), max_size=10).map(lambda heights: sorted(heights, reverse=True)))
def test_no_two_labels_overlap(heights):
    """They keep their order and a distance, at or above the bottom."""
    placed = spread(heights)
    assert all(one - other >= plot._LABEL - 1e-12 for one, other in itertools.pairwise(placed))
    assert all(height >= 0 for height in placed)
