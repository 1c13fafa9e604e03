"""Results as JSON lines: each done once, resumption, parts, the time limit, infinities, lines that are no result."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.power import ledger
from harness.power.ledger import WHOLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A record of one number."""

    name: str
    version: str = "v"
    value: float | None = None
    more: dict[str, float] = field(default_factory=dict)
    rest: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Name and version."""
        return (self.name, self.version)


def parse(data):
    """A note of its line."""
    numbers = {name: float(number) for name, number in data["more"].items()}
    value = None if data["value"] is None else float(data["value"])
    return Note(**{**data, "value": value, "more": numbers, "rest": tuple(map(float, data["rest"]))})


class Bench:
    """Fills in notes, and keeps what it was asked for."""

    def __init__(self, work, number=6):
        self.work, self.asked, self.seen, self.closed = work, [Note(name=f"n{i}") for i in range(number)], [], False
        self.done = []

    def perform(self, missing, report, late):
        """Each note is worth 1."""
        try:
            for blank in missing:
                report(f"doing {blank.name}")
                self.done.append(blank.name)
                yield Note(name=blank.name, value=1.0)
        finally:
            self.closed = True

    def run(self, *, shard=WHOLE, minutes=None, asked=None):
        """All notes, or this part of them."""
        index, number = shard
        mine = (self.asked if asked is None else asked)[index::number]
        progress = lambda done, total, text: self.seen.append((done, total, text))  # noqa: E731  # three words
        ledger.run(mine, self.work, "notes", parse, self.perform, progress, shard, minutes)

    def names(self):
        """What is in the files."""
        return [note.name for note in ledger.read(self.work, "notes", parse)]


# --- running -----------------------------------------------------------------------------------


def test_what_is_asked_is_done_once_and_in_order(tmp_path):
    """Six notes give six lines; asked again, none is done."""
    bench = Bench(tmp_path / "work")
    bench.run()
    assert bench.names() == bench.done == ["n0", "n1", "n2", "n3", "n4", "n5"]
    assert len((tmp_path / "work" / "notes.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    bench.run()
    assert len(bench.done) == 6


def test_progress_is_of_this_part(tmp_path):
    """Before each note and with it: how many are there, how many there will be, and which; the version is not told."""
    bench = Bench(tmp_path)
    bench.run(asked=bench.asked[:2])
    bench.seen.clear()
    bench.run(asked=bench.asked[:4])
    assert bench.seen == [(2, 4, "doing n2"), (3, 4, "n2"), (3, 4, "doing n3"), (4, 4, "n3")]


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_was_cut_is_done_again(tmp_path, left):
    """What a killed run left of its last line is passed over, cut off, and written anew; the rest stays as it is."""
    bench, file = Bench(tmp_path), tmp_path / "notes.jsonl"
    bench.run()
    whole = file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    file.write_bytes(whole[: -len(last)] + last[:left])
    assert bench.names() == ["n0", "n1", "n2", "n3", "n4"]
    bench.done.clear()
    bench.run()
    assert bench.done == ["n5"]
    assert file.read_bytes() == whole


def test_a_result_is_on_disk_before_the_next_is_begun(tmp_path):
    """A run that is killed loses the one result that it was at."""
    bench = Bench(tmp_path)
    found = []

    def perform(missing, report, late):
        for blank in missing:
            found.append(bench.names())
            yield blank

    ledger.run(bench.asked, tmp_path, "notes", parse, perform, lambda *_: None, WHOLE, None)
    assert found == [[f"n{i}" for i in range(done)] for done in range(6)]


def test_an_error_keeps_what_is_done(tmp_path):
    """The results before it are there, the error is passed on, and what was being done is closed."""
    bench = Bench(tmp_path)

    def perform(missing, report, late):
        yield from itertools.islice(bench.perform(missing, report, late), 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ledger.run(bench.asked, tmp_path, "notes", parse, perform, lambda *_: None, WHOLE, None)
    assert bench.names() == ["n0", "n1"]
    assert bench.closed


def test_it_is_done_on_one_thread(tmp_path):
    """Whatever the machine has; afterwards it is as it was."""
    seen, before = [], torch.get_num_threads()

    def perform(missing, report, late):
        seen.append(torch.get_num_threads())
        yield from missing

    torch.set_num_threads(2)
    try:
        ledger.run(Bench(tmp_path).asked, tmp_path, "notes", parse, perform, lambda *_: None, WHOLE, None)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


# --- parts -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(number=st.integers(1, 5), count=st.integers(0, 12), data=st.data())
def test_no_two_parts_do_the_same(tmp_path_factory, number, count, data):
    """However many parts in whatever order: each note is done once, each part has a file, the whole sees them all."""
    bench = Bench(tmp_path_factory.mktemp("parts"), count)
    for index in data.draw(st.permutations(range(number))):
        bench.run(shard=(index, number))
    assert sorted(bench.done) == sorted(bench.names()) == sorted(note.name for note in bench.asked)
    names = ["notes.jsonl"] if number == 1 else [f"notes-{index}.jsonl" for index in range(number)]
    assert sorted(path.name for path in bench.work.glob("*.jsonl")) == sorted(names)
    bench.run()
    assert len(bench.done) == count


def test_a_part_sees_what_another_number_of_parts_did(tmp_path):
    """Two of three parts, then both of two parts: nothing is done twice."""
    bench = Bench(tmp_path)
    for shard in ((0, 3), (1, 3), (0, 2), (1, 2)):
        bench.run(shard=shard)
    assert sorted(bench.done) == sorted(set(bench.done)) == ["n0", "n1", "n2", "n3", "n4", "n5"]


def test_a_result_of_two_files_counts_once(tmp_path):
    """The same key in two files is one result."""
    line = json.dumps({"name": "n0", "version": "v", "value": 1.0, "more": {}, "rest": []}) + "\n"
    for name in ("notes.jsonl", "notes-1.jsonl"):
        (tmp_path / name).write_text(line, encoding="utf-8")
    assert ledger.read(tmp_path, "notes", parse) == [Note(name="n0", value=1.0)]


def test_files_of_other_names_are_not_read(tmp_path):
    """A bench sees its own files, not those whose name begins like its own."""
    (tmp_path / "notesother.jsonl").write_text("no result\n", encoding="utf-8")
    (tmp_path / "other-notes.jsonl").write_text("no result\n", encoding="utf-8")
    assert ledger.read(tmp_path, "notes", parse) == []
    assert ledger.read(tmp_path / "nowhere", "notes", parse) == []


# --- time --------------------------------------------------------------------------------------


def test_after_the_limit_none_is_begun(tmp_path, monkeypatch):
    """Half a minute at ten seconds a look: some are done, their lines are whole, and the next run does the others."""
    clock = itertools.count(step=10)
    monkeypatch.setattr(ledger.time, "monotonic", lambda: next(clock))
    bench = Bench(tmp_path)
    bench.run(minutes=0.5)
    # The clock shows 0 for the deadline of 30, then 10, 20, 30 and 40 after the first four.
    assert bench.names() == ["n0", "n1", "n2", "n3"]
    assert bench.closed
    bench.run()
    assert bench.done == ["n0", "n1", "n2", "n3", "n4", "n5"]


def test_who_performs_is_told_that_it_is_late(tmp_path, monkeypatch):
    """Something that takes long before the first result can look at the time itself."""
    clock = itertools.chain([0.0, 59.0], itertools.repeat(61.0))
    monkeypatch.setattr(ledger.time, "monotonic", lambda: next(clock))
    seen = []

    def perform(_missing, _report, late):
        seen.extend([late(), late()])
        return
        yield

    ledger.run(Bench(tmp_path).asked, tmp_path, "notes", parse, perform, lambda *_: None, WHOLE, 1.0)
    assert seen == [False, True]


# --- lines -------------------------------------------------------------------------------------


def stored(work, note):
    """What is read of a note that was written, and its line."""
    with ledger.appending(work, "notes", WHOLE) as append:
        append(note)
    line = (work / "notes.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return ledger.read(work, "notes", parse)[-1], line


def test_infinities_are_words(tmp_path):
    """JSON has none of them: they are written as what float() reads, wherever they stand."""
    note = Note(name="n0", value=math.inf, more={"a": -math.inf, "b": 2.5}, rest=(1.0, math.inf))
    found, line = stored(tmp_path, note)
    assert found == note
    assert json.loads(line, parse_constant=pytest.fail) == {
        "name": "n0", "version": "v", "value": "inf", "more": {"a": "-inf", "b": 2.5}, "rest": [1.0, "inf"],
    }  # fmt: skip


def test_what_is_no_number_is_a_word(tmp_path):
    """NaN comes back as NaN, and None as None."""
    found, line = stored(tmp_path, Note(name="n0", value=None, more={"a": math.nan}))
    assert math.isnan(found.more["a"])
    assert found.value is None
    assert json.loads(line, parse_constant=pytest.fail)["more"] == {"a": "nan"}


@settings(max_examples=60, deadline=None)
@given(value=st.floats(allow_nan=False), name=st.text(max_size=8), rest=st.lists(st.floats(allow_nan=False)))
def test_every_record_survives(tmp_path_factory, value, name, rest):
    """Any finite or infinite number to the last bit, and any name, line breaks and quotes too."""
    note = Note(name=name, value=value, rest=tuple(rest))
    assert stored(tmp_path_factory.mktemp("lines"), note)[0] == note


@pytest.mark.parametrize("line", ["no JSON", "{}", "[]", "3", "null", "", '{"more": 3}', '{"more": {}, "value": "x"}'])
def test_a_line_that_is_no_result_is_refused(tmp_path, line):
    """What nobody can have written is named with its file and line; it is not passed over."""
    bench = Bench(tmp_path)
    bench.run()
    file = tmp_path / "notes-1.jsonl"
    good = (tmp_path / "notes.jsonl").read_text(encoding="utf-8").splitlines()[0]
    file.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"^line 2 of .*/notes-1\.jsonl is no result\. Remove it, or the whole file$"):
        bench.names()


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"\x00\x00\n"])
def test_what_is_no_text_is_refused(tmp_path, content):
    """A damaged file is no result either."""
    (tmp_path / "notes.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="line 1 of"):
        ledger.read(tmp_path, "notes", parse)


# --- the rule ----------------------------------------------------------------------------------


def test_the_version_is_of_the_constants(tmp_path, monkeypatch):
    """Another byte in constants.py is another rule; records of it alone are of this rule."""
    source = Path(ledger.constants.__file__)
    fresh = ledger.rule_version.__wrapped__
    before = fresh()
    assert before == fresh() == ledger.rule_version()
    copy = tmp_path / "constants.py"
    monkeypatch.setattr(ledger.constants, "__file__", str(copy))
    copy.write_bytes(source.read_bytes())
    assert fresh() == before
    copy.write_bytes(source.read_bytes() + b"#")
    assert fresh() != before
    note = partial(Note, name="n0")
    assert ledger.of_this_rule([note(version=before), note(version="former")]) == [note(version=before)]
