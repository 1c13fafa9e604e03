"""Bugs of sharding in real ranks: what is asked, who is named, and one team for all."""

from __future__ import annotations

import pytest

from harness.engines.ranks import engine as parallel
from harness.engines.ranks import spawned
from harness.errors import UsageError
from harness.mutations.ranks import RANK_MUTATIONS
from harness.power import sharded
from harness.power.sharded import CORRECT, SPECS, Sharded, named_ranks, planned, ranks_in
from harness.values import Finding, Sharding, Status, Verdict

#: Ranks by stage: two stages of two, and two of one.
TWO_BY_TWO = {0: [0, 1], 1: [2, 3]}
PIPELINE = {0: [0], 1: [1]}


# --- what is asked -----------------------------------------------------------------------------


def test_every_bug_has_its_hosts_and_every_spec_a_correct_run():
    """Each once; without a bug no rank is wrong."""
    asked = planned()
    bugs = [(one.id, one.host, one.spec, one.where) for one in asked if not one.correct]
    assert sorted(bugs, key=str) == sorted(
        ((one.id, host, one.spec, one.where) for one in RANK_MUTATIONS for host in one.hosts), key=str
    )
    correct = [(one.host, one.spec) for one in asked if one.correct]
    assert correct == [(host, spec) for host in ("bloom-tiny", "gpt2-tiny", "llama-tiny") for spec in SPECS]
    assert all(one.where == () and not one.alone for one in asked if one.correct)
    assert {one.spec for one in RANK_MUTATIONS} == set(SPECS)
    assert len(set(SPECS)) == len(SPECS)


def test_some_can_be_chosen():
    """By id and by host; a bug that a host has no part for is not there."""
    chosen = planned(["gpt2-tiny", "llama-tiny"], ["pp-tied-head", "tp-no-reduce"])
    assert [(one.id, one.host) for one in chosen] == [
        ("tp-no-reduce", "gpt2-tiny"), ("pp-tied-head", "gpt2-tiny"), ("tp-no-reduce", "llama-tiny"),
    ]  # fmt: skip
    assert {one.id for one in planned(["gpt2-tiny"], [CORRECT])} == {CORRECT}
    assert planned(["llama-tiny"], ["pp-tied-head"]) == []


def test_unknown_names_are_refused():
    """One that is not there is told, and where those are that are."""
    with pytest.raises(UsageError, match="no bug of sharding 'wc-eps'"):
        planned(None, ["wc-eps"])
    with pytest.raises(UsageError, match="'bloom-raw'"):
        planned(["bloom-raw"])


@pytest.mark.parametrize(
    ("where", "named", "alone", "right"),
    [
        ((1,), (1,), True, True), ((1,), (0, 1), True, False), ((1,), (), True, False), ((1,), (0,), True, False),
        ((1, 2), (1, 2), False, True), ("all", (0, 1), False, False),
    ],
)  # fmt: skip
def test_named_right_is_exactly_the_wrong_ranks(where, named, alone, right):
    """One too many, none and another one are wrong."""
    one = Sharded(id="x", host="h", spec="tp:size=2", where=where, named=named)
    assert (one.alone, one.right) == (alone, right)


# --- lines about ranks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stages", "ranks"),
    [
        ("", TWO_BY_TWO, ()),
        ("rank 1: its part of the input of h.0.dense; the other ranks' parts are right", {0: [0, 1, 2]}, (1,)),
        ("ranks 1, 2: its partial product of h.0.dense; the other ranks' products are right", {0: [0, 1, 2]}, (1, 2)),
        ("rank 3 of stage 1: its part of the input of h.4.dense; the other ranks' parts are right", TWO_BY_TWO, (3,)),
        ("the output of h.4.dense of stage 1, on rank 3, though every rank's part of it is right", TWO_BY_TWO, (3,)),
        ("the output of h.0.dense, on ranks 0, 2, though every rank's part is right", {0: [0, 1, 2]}, (0, 2)),
        ("the output of h.0.dense, though every rank's part of it is right: the sum, or its bias", {0: [0, 1]}, ()),
        ("the input of h.0.dense, on every rank", {0: [0, 1]}, (0, 1)),
        ("the input of h.4.dense, on every rank of stage 1", TWO_BY_TWO, (2, 3)),
        ("the partial products of h.0.dense, on every rank, though their inputs are right", {0: [0, 1]}, (0, 1)),
        ("the output of h.4 of stage 1", PIPELINE, (1,)),
        ("the output of h.4", {0: [0, 1]}, ()),
        ("the input of the first block, h.0: the embedding", PIPELINE, ()),
        ("what stage 1 is sent (the input of h.3), though all of stage 0 is right", PIPELINE, (0,)),
        ("what stage 1 is sent (the input of h.3), though all of stage 0 is right", TWO_BY_TWO, (0, 1)),
        ("h.0.dense: rank 1 unlike the others", {0: [0, 1, 2]}, (1,)),
        ("h.0.dense: rank 1, 3 unlike the others", {0: [0, 1, 2, 3, 4]}, (1, 3)),
        ("h.0.dense: ranks 0, 1 unlike each other", {0: [0, 1]}, ()),
    ],
)  # fmt: skip
def test_a_line_names_ranks(text, stages, ranks):
    """Numbers of ranks, all of a stage, the stage that sent; a sum, or two that are unlike each other, is nobody's."""
    assert ranks_in(text, stages) == set(ranks)


@pytest.mark.parametrize(
    ("checksums", "ranks"),
    [([1, 2, 1], (1,)), ([1, 2, 3, 1, 1], (1, 2)), ([1, 2], ()), ([1, 2, 3], ()), ([1, 1], ())],
)
def test_the_engines_own_words_are_understood(checksums, ranks):
    """What the engine says of ranks that differ: those that stand alone are named."""
    said = parallel.difference([[("h.0", one)] for one in checksums], range(len(checksums)))
    assert ranks_in(said, {0: list(range(len(checksums)))}) == set(ranks)


# --- verdicts ----------------------------------------------------------------------------------


def verdict(*checks, first_wrong="", differing=(), blocks=((0, 3), (3, 5)), unlike=((), ())):
    """A verdict on two ranks: failed checks, and what the ranks show."""
    ranks = [
        {"rank": number, "stage": number, "shard": 0, "blocks": list(own), "unlike_checkpoint": list(names)}
        for number, (own, names) in enumerate(zip(blocks, unlike, strict=True))
    ]
    findings = tuple(Finding(status=Status.STRUCTURAL, check=one, message=one, fix="") for one in checks)
    return Verdict(
        golden="g", candidate="c", status=Status.STRUCTURAL if checks else Status.DEVIATES, findings=findings,
        sharding=Sharding(first_wrong=first_wrong),
        settings={"ranks": ranks, "blocks": 5, "differing": list(differing)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        (verdict(), ()),
        (verdict("ranks' weights", unlike=((), ("h.3.weight",))), (1,)),
        (verdict("settings", unlike=((), ("h.3.weight",))), ()),
        (verdict("stages", blocks=((0, 3), (3, 4))), (1,)),
        (verdict("stages", blocks=((0, 2), (3, 5))), (1,)),
        (verdict("stages", blocks=((1, 3), (3, 5))), (0,)),
        (verdict("ranks agree", differing=("h.0: rank 0 unlike the others", "h.1: rank 1 unlike the others")), (0,)),
        (verdict("ranks agree", differing=("h.0: ranks 0, 1 unlike each other",)), ()),
        (verdict(first_wrong="what stage 1 is sent (the input of h.3), though all of stage 0 is right"), (0,)),
        (verdict("ranks' weights", unlike=(("a",), ("b",)), first_wrong="the output of h.3 of stage 1"), (0, 1)),
    ],
)
def test_a_verdict_names_what_its_findings_tell(given, ranks):
    """Weights, blocks and checksums count where a finding tells of them, and the first wrong place does."""
    assert named_ranks(given) == ranks


def test_an_engine_without_ranks_names_none():
    """A verdict that came to no comparison has no settings."""
    assert named_ranks(Verdict(golden="g", candidate="c", status=Status.ERROR, findings=())) == ()


# --- one real run ------------------------------------------------------------------------------


def test_bugs_share_one_team(goldens, monkeypatch):
    """Two bugs are found and named in processes that are started once; none is left."""
    started, seen = [], []

    class Counted(spawned.SpawnedTeam):
        def __init__(self, size, **options):
            super().__init__(size, **options)
            started.append(self)

    monkeypatch.setattr(spawned, "SpawnedTeam", Counted)
    asked = planned(["gpt2-tiny"], ["pp-layers-dropped-last", "pp-batch-mix"])
    found = sharded.run(asked, lambda done, total, text: seen.append((done, total, text)), goldens=goldens)
    dropped, mixed = found
    assert (dropped.status, dropped.named) == ("structural", (1,)), dropped
    assert dropped.finding.startswith("the stages hold 4 blocks of 5; the last is rank 1")
    assert dropped.first_wrong == ""
    assert (mixed.status, mixed.named) == ("deviates", (0,)), mixed
    assert mixed.first_wrong.startswith("what stage 1 is sent")
    assert [(one.id, one.where) for one in found] == [(one.id, one.where) for one in asked]
    assert min(dropped.seconds, mixed.seconds) > 0
    assert {total for _, total, _ in seen} == {2}
    assert {done for done, _, _ in seen} == {0, 1}
    assert [team.size for team in started] == [2]
    assert not started[0].alive


def test_the_largest_team_comes_first(monkeypatch):
    """A team that is started for two ranks could not serve the three of the next bug."""
    sizes = []

    class Team:
        alive = True

        def __init__(self, size, **_options):
            sizes.append(size)

        def close(self):
            """Nothing."""

    monkeypatch.setattr(spawned, "SpawnedTeam", Team)
    monkeypatch.setattr(sharded, "_checked", lambda blank, _golden, _report: blank)
    asked = planned(["gpt2-tiny"], ["tp-no-reduce", "tp-shard-0", "tp-shard-0-stage"])
    assert sharded.run(asked, lambda *_: None) == asked
    assert sizes == [4]


def test_a_finding_does_not_repeat_the_candidate(monkeypatch):
    """What differs between bugs is said first, and not a SPEC of a hundred letters; the first that failed is told."""

    def check(_golden, candidate, *, quick, progress):
        assert quick
        assert candidate == "tp:size=3,dtype=float32,prepare=harness.mutations.ranks:whole_on_every_rank"
        messages = [(Status.DRIFT, "harmless"), (Status.STRUCTURAL, f"{candidate} says 3"), (Status.DEVIATES, "more")]
        findings = tuple(Finding(status=status, check="settings", message=said, fix="") for status, said in messages)
        return Verdict(golden="g", candidate=candidate, status=Status.STRUCTURAL, findings=findings, seconds=1.23456)

    monkeypatch.setattr(sharded.flow, "check", check)
    (blank,) = planned(["gpt2-tiny"], ["tp-size-1"])
    found = sharded._checked(blank, "golden", lambda _text: None)
    assert (found.finding, found.status, found.named, found.seconds) == ("the SPEC says 3", "structural", (), 1.235)
