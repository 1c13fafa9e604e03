"""What bugs need of a suite and of a precision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.mutations.catalogue import CATALOGUE
from harness.power import drawn
from harness.power.certificate import needs
from harness.power.certificate.suggestions import BEYOND, NEEDS
from tests.power.certificate.made_up import BATCH, FREE, ORDER, PREFILL, SINGLE, bug
from tests.templates import tiny


@pytest.mark.parametrize(
    ("one", "runs", "lengths", "expected"),
    [
        (bug("fp32"), [SINGLE], [3, 4], ()),
        (bug("batch"), [SINGLE], [3, 4], ("batch",)),
        (bug("batch"), [BATCH], [3, 3], ()),
        (bug("batch"), [BATCH], [3], ("batch",)),
        (bug("padding"), [BATCH], [3, 3], ("padding",)),
        (bug("padding"), [BATCH], [3, 4], ()),
        (bug("padding"), [BATCH], [3, 3, 4], ("padding",)),  # the third prompt is a batch of its own
        (bug("batch", "padding"), [SINGLE], [3, 4], ("padding",)),
        (bug("single"), [BATCH], [3, 4], ("single",)),
        (bug("single"), [BATCH], [3, 4, 5], ()),
        (bug("single"), [BATCH, ORDER], [3, 4], ()),
        (bug("decode"), [PREFILL], [3, 4], ("decode",)),
        (bug("decode"), [FREE], [3, 4], ()),
        (bug("decode", "batch"), [PREFILL, FREE], [3, 4], ("batch",)),  # the batch does not decode
        (bug("prefill"), [FREE], [3, 4], ("prefill",)),
        (bug("free", shows="tokens"), [BATCH], [3, 4], ("free",)),
        (bug("free", "batch", shows="tokens"), [BATCH, FREE], [3, 4], ("batch",)),
        (bug("free", "batch", shows="tokens"), [SINGLE], [3, 4], ("free", "batch")),
        (bug("fp32", shows="prompt"), [SINGLE], [3], ()),
        (CATALOGUE["sg-pen-pad"], [BATCH, FREE], [3, 4], ("penalties",)),
    ],
)
def test_what_a_suite_lacks(one, runs, lengths, expected):
    """What a bug needs is told where no run that shows it has it, and only there."""
    assert needs.lacking(one, runs, lengths, text=True) == expected


def test_prompts_that_are_ids_show_no_tokenizer():
    """A bug of prompts needs a prompt that is text."""
    assert needs.lacking(bug(shows="prompt"), [SINGLE], [3], text=False) == ("text",)


def test_the_precision_that_a_bug_needs():
    """A bug of 16 bits needs these, one that brings a dtype that one; others need nothing."""
    assert needs.of_precision(bug("half"), "float32") == ("half",)
    assert needs.of_precision(bug("half"), "bfloat16") == ()
    own = bug("half", options=(("dtype", "float16"),))
    assert [needs.of_precision(own, name) for name in ("float32", "bfloat16", "float16")] == [
        ("float16",),
        ("float16",),
        (),
    ]
    assert needs.of_precision(bug("fp32"), "float32") == ()


def test_every_need_has_words():
    """Each need that any bug of the catalogue can have is in NEEDS or BEYOND."""
    found = set()
    for one in CATALOGUE.values():
        for runs in ([SINGLE], [PREFILL], [FREE], [ORDER]):
            found |= set(needs.lacking(one, runs, [3, 3], text=False))
        for precision in drawn.PRECISIONS:
            found |= set(needs.of_precision(one, precision))
        found |= set(needs.explained(one, tiny.golden()))
    assert found <= {*NEEDS, *BEYOND}
    assert {"padding", "half", "second", "eos", "long", "penalties", "float16"} <= found


def test_why_a_bug_did_nothing():
    """Only what is lacking is told: a piece as long as the longest prompt, an A-B-A run, an end, long prompts."""
    golden = tiny.golden()
    longest = max(len(one.prompt_ids) for one in golden.requests)
    assert needs.explained(bug("chunk", options=(("chunk", str(longest)),)), golden) == ("chunk",)
    assert needs.explained(bug("chunk", options=(("chunk", str(longest - 1)),)), golden) == ()
    assert needs.explained(bug("second", "long"), golden) == ("long", "second")
    served = bug(shows="tokens", group="serving")
    assert needs.explained(served, golden) == ("eos",)
    assert needs.explained(bug(shows="tokens"), golden) == ()
    more = replace(golden, suite=replace(golden.suite, stop="eos", runs=(*golden.suite.runs, ORDER)))
    assert needs.explained(bug("second"), more) == ()
    assert needs.explained(served, more) == ("eos",)  # no text ends before the others
    first, *others = more.generations
    ended = replace(first, tokens=first.tokens[:2], finish="eos")
    assert needs.explained(served, replace(more, generations=(ended, *others))) == ()
