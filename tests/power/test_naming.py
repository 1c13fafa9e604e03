"""The bench of names: what is asked, one real host, what is read back, and the table."""

import json
from dataclasses import asdict, replace

import pytest

from harness.errors import UsageError
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.stopping import CORRECT
from harness.power import naming, naming_table
from harness.power.ledger import rule_version
from harness.power.naming import Naming
from harness.templates import making
from tests.commands import runner


def record(**more) -> Naming:
    """A bug that was named, but for what is said otherwise."""
    given = {
        "kind": "bug", "name": "wc-eps", "host": "llama-tiny", "precision": "bfloat16", "strength": 1.0, "group": 0,
        "version": rule_version(), "status": "deviates", "without": "drift", "signal": 0.5, "named": ("wc-eps",),
        "right": True, "nearest": "wc-eps", "nearest_right": True, "z": 9.0, "coefficient": 1.0, "limit": 5.5,
    }  # fmt: skip
    return Naming(**{**given, **more})


def test_what_is_asked():
    """Bugs that show in logits at each strength, pairs on hosts that have both, each once; no stopping bug."""
    asked = naming.planned_bugs()
    keys = [one.key for one in asked]
    assert len(set(keys)) == len(keys)
    shown = {one.id for one in CATALOGUE.values() if one.shows == "logits" and one.id not in CORRECT}
    assert {one.name for one in asked if one.kind in ("bug", "control")} == shown
    assert {one.name for one in asked if one.kind == "control"} == {name for name in shown if CATALOGUE[name].harmless}
    assert {one.name for one in asked if one.kind == "pair"} == {"+".join(pair) for pair in naming.PAIRS}
    for one in asked:
        assert all(one.host in CATALOGUE[name].hosts for name in one.ids)


def test_nulls_are_whole_groups():
    """As many nulls as asked or more: every family, model and precision on each group of prompts."""
    asked = naming.planned_nulls(3000)
    assert len(asked) >= 3000
    groups = {one.group for one in asked}
    assert len(asked) == len({(one.host, one.name, one.precision) for one in asked}) * len(groups)
    assert all(one.ids == () for one in asked)


def test_unknown_names_are_refused():
    """A typing error is one line that says what there is."""
    with pytest.raises(UsageError, match="no bug, pair or correct implementation 'wc-epz'"):
        naming.planned_bugs(names=["wc-epz"])
    with pytest.raises(UsageError, match="no host"):
        naming.planned_bugs(["gpt3"])


def test_a_record_survives_its_line():
    """What is written is read back, infinities and tuples included."""
    one = record(named=("a", "b"), signal=None)
    assert naming.parse_naming(json.loads(json.dumps(asdict(one)))) == one


@pytest.fixture(scope="module")
def bench(tmp_path_factory, goldens):
    """A few bugs on gpt2-tiny, on the quick prompts, with the templates of these bugs alone."""
    work = tmp_path_factory.mktemp("names")
    names = {"x-row-scaled", "x-rows-swapped", "x-bias-doubled", "wc-eps"}
    asked = naming.planned_bugs(["gpt2-tiny"], ["x-row-scaled", "x-rows-swapped+x-bias-doubled"], quick=True)
    everything = making.bugs_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "bugs_for", lambda kind: [one for one in everything(kind) if one[0].id in names])
        patch.setattr(naming, "PRECISIONS", ("float32", "bfloat16"))  # what is tried, no more
        naming.run_namings(asked, work, lambda *_: None, goldens=goldens)
    return asked, naming.read_namings(work), work


def test_every_blank_is_filled_once(bench):
    """Each of what was asked is there once."""
    asked, found, _ = bench
    assert sorted(one.key for one in found) == sorted(one.key for one in asked)


def test_a_bug_and_a_pair_are_named(bench):
    """In float32 the bug has its own name at a coefficient of 1, and of two bugs both are named."""
    _, found, _ = bench
    one = next(one for one in found if one.kind == "bug" and one.precision == "float32" and one.strength == 1.0)
    assert (one.named, one.right, one.without) == (("x-row-scaled",), True, "deviates")
    assert one.coefficient == pytest.approx(1, abs=0.01)
    pair = next(one for one in found if one.kind == "pair" and one.precision == "float32")
    assert pair.right
    assert set(pair.named) == {"x-rows-swapped", "x-bias-doubled"}


def test_signal_is_smaller_for_a_weaker_bug(bench):
    """S/N falls with the strength, and is that of the precision."""
    _, found, _ = bench
    signals = {(one.precision, one.strength): one.signal for one in found if one.kind == "bug"}
    assert signals["float32", 0.1] == pytest.approx(signals["float32", 1.0] / 10, rel=0.05)
    assert signals["bfloat16", 1.0] < 0.01 * signals["float32", 1.0]


def test_the_command_shows_what_is_there(bench, monkeypatch, capsys):
    """`harness power --names` runs nothing twice, and prints the table of all that was asked."""
    asked, found, work = bench
    monkeypatch.setattr(naming, "PRECISIONS", ("float32", "bfloat16"))
    chosen = ("--names", "--quick", "--host", "gpt2-tiny", "--only", "x-row-scaled,x-rows-swapped+x-bias-doubled")
    ended = runner(monkeypatch, capsys)("power", *chosen, "--work", work, "--json", work / "names.json")
    assert (ended.code, ended.out) == (0, naming_table.summary_to_text(naming_table.summarise(found)) + "\n")
    assert len(json.loads((work / "names.json").read_text())[0]["records"]) == len(asked)
    assert naming.read_namings(work) == found


# --- the table ---------------------------------------------------------------------------------


def test_the_table_counts():
    """Each target's figure from records that are counted by hand."""
    records = [
        record(precision="float32", without="deviates", signal=100.0),
        record(precision="float32", without="deviates", signal=90.0, host="gpt2-tiny", right=False, named=()),
        record(precision="float32", without="drift", signal=0.1, host="bloom-tiny"),
        record(),
        record(host="gpt2-tiny", signal=0.02),
        record(host="bloom-tiny", signal=2.0, right=False, named=("other",)),
        record(host="bloom-raw", signal=2.0, status="drift", named=(), right=False),
        record(kind="null", name="plain", named=(), z=2.0, right=False),
        record(kind="null", name="qkv", named=(), z=-3.0, right=False),
        record(kind="control", name="ok-key-bias", named=("wc-eps",), right=False),
    ]
    found = naming_table.summarise(records)
    assert found.function == (2, 1)
    assert found.below == (1, 1)
    assert found.middle == (2, 1)
    assert (found.nulls["all"].alarms, found.nulls["all"].count) == (0, 2)
    assert found.largest["bfloat16"] == (3.0, 5.5)
    assert (found.controls.alarms, found.controls.count) == (1, 1)
    assert [one.host for one in found.missed] == ["gpt2-tiny"]
    assert [one.host for one in found.wrong] == ["bloom-tiny"]
    text = naming_table.summary_to_text(found)
    assert "named first for 1 of 2 (50%)" in text
    assert "named, and not there: 1" in text


def test_former_records_and_skipped_ones_do_not_count():
    """Another rule's records, and what could not be run, are in no figure."""
    records = [record(version="old"), record(host="gpt2-tiny", status="skipped")]
    found = naming_table.summarise(records)
    assert found.below == (0, 0)
    assert not found.nulls


def test_an_alarm_is_a_name(bench):
    """A name on a correct implementation is counted as an alarm even where the verdict is ok."""
    found = naming_table.summarise([replace(record(kind="null", name="plain"), status="drift")])
    assert found.nulls["all"].alarms == 1
    assert found.alarms
