"""Bugs of penalties and stopping: other tokens than the same requests served rightly, and nothing else changes."""

import math

import pytest
import torch

import harness
from conftest import ROOT
from harness.mutations.answering import History, choosing, occurring, processed
from harness.mutations.mutation import catalogue
from harness.mutations.stopping import CORRECT, MUTATIONS, _penalised
from harness.values import Request
from tests.engines.recorder import recorded
from tests.mutations.applied import Opened, cases, same_bits, shown, unharmed

BUGS = catalogue(*MUTATIONS)
STEPS = 8
#: Texts that end at once, soon and not at all, close choices, and code, whose lines begin with spaces.
PROMPTS = {
    "edge": ("ends-list", "stops-facts"),
    "core": ("table-far", "code-subtract", "open-en", "translate-begun"),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Engines of the hosts, opened once each."""
    with Opened(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(scope="module")
def continued(opened):
    """What an engine answers to the prompts, with and without the bug's right counterpart, computed once each."""
    kept = {}

    def of(host, id=None, batch_size=None):
        key = (host, id, batch_size)
        if key not in kept:
            engine = opened.engine(host)
            if id is None:
                kept[key] = answers(engine, host, batch_size)
            else:
                with CORRECT[id](engine, 1.0):
                    kept[key] = answers(engine, host, batch_size)
        return kept[key]

    return of


def requests_of(host):
    """The prompts of a host's goldens, short continuations."""
    found = []
    for suite, names in PROMPTS.items():
        by_id = {one.id: one for one in harness.load_golden(ROOT / "golden" / host / suite).requests}
        found += [Request(id=name, prompt_ids=by_id[name].prompt_ids, max_new_tokens=STEPS) for name in names]
    return found


def answers(engine, host, batch_size=None, stop_ids=None):
    """Free continuations that end at the model's own end of sequence."""
    stop_ids = engine.stop_ids if stop_ids is None else stop_ids
    return engine.generate(requests_of(host), batch_size=batch_size, stop_ids=stop_ids)


def right_id(id):
    """The bug's own name where its right counterpart is not the engine as it is."""
    return id if id in CORRECT else None


# --- the bugs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bug", "host"), **cases(MUTATIONS))
def test_bugs_change_the_tokens_alone_and_are_undone(opened, continued, bug, host):
    """Some continuation of a batch is another than rightly served; forced passes keep every bit."""
    engine, before = opened.engine(host), continued(host)
    right = continued(host, right_id(bug.id))
    with unharmed(engine):
        with bug.applied(engine):
            assert answers(engine, host) != right
            assert same_bits(shown(engine), opened.plain(host))
        assert answers(engine, host) == before


@pytest.mark.parametrize("bug", MUTATIONS, ids=lambda bug: bug.id)
def test_bugs_are_undone_after_an_error(opened, bug):
    """An error inside the block leaves nothing behind."""
    host = min(bug.hosts)
    engine = opened.engine(host)
    request = Request(id="short", prompt_ids=(17, 200, 4), max_new_tokens=2)

    def fail():
        with unharmed(engine), bug.applied(engine):
            engine.generate([request], batch_size=None, stop_ids=frozenset())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("id", ["sg-pen-pad", "sg-pen-batch-order"])
def test_bugs_of_batches_do_nothing_to_one_row(opened, continued, id):
    """One request at a time, without padding, is served as it should be."""
    host = "llama-tiny"
    engine = opened.engine(host)
    with BUGS[id].applied(engine):
        assert answers(engine, host, 1) == continued(host, id, 1)


def test_a_penalty_of_every_second_row_leaves_single_requests_alone(continued):
    """Who is alone in a batch is its first row, and asked for nothing."""
    assert continued("llama-tiny", "sg-pen-batch-order", 1) == continued("llama-tiny", None, 1)
    assert continued("llama-tiny", "sg-pen-batch-order") != continued("llama-tiny")


@pytest.mark.parametrize("options", [{"chunk": 16}, {"static_cache": True}, {"show": "top"}, {"batch": 3}], ids=str)
def test_bugs_see_the_same_history_on_every_way(opened, continued, options):
    """Prompts in pieces, a static cache, a server that shows its top entries, a batch size of its own: same answers."""
    host, id = "llama-tiny", "sg-reppen-neg"
    engine = opened.engine(host, **options)
    with BUGS[id].applied(opened.engine(host)):
        wanted = answers(opened.engine(host), host)
    with BUGS[id].applied(engine):
        found = answers(engine, host)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert all(bool(one.top_ids) == ("show" in options) for one in found)
    for one in found:
        assert tuple(entries[0] for entries in one.top_ids) in ((), one.tokens)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_bugs_run_in_other_precisions(opened, dtype):
    """In the checkpoint's own precision and in float32 each bug differs from requests served rightly, too."""
    host = "llama-tiny"
    engine = opened.engine(host, dtype)
    plain = answers(engine, host)
    for bug in MUTATIONS:
        right = plain
        if bug.id in CORRECT:
            with CORRECT[bug.id](engine, 1.0):
                right = answers(engine, host)
        with bug.applied(engine):
            assert answers(engine, host) != right, bug.id


# --- what each does ----------------------------------------------------------------------------


def test_no_text_ends_with_its_first_token(opened, continued):
    """A text that ended at once goes on with the second-best token; where no token stops a text nothing changes."""
    engine, host = opened.engine("bloom-tiny"), "bloom-tiny"
    (end,) = engine.stop_ids
    at_once = [i for i, one in enumerate(continued(host)) if one.tokens == (end,)]
    assert at_once
    free = answers(engine, host, stop_ids=frozenset())
    with BUGS["sg-min-tokens"].applied(engine):
        found = answers(engine, host)
        assert answers(engine, host, stop_ids=frozenset()) == free
    request = requests_of(host)[at_once[0]]
    second = first_logits(engine, request).topk(2).indices[1]
    assert found[at_once[0]].tokens[0] == second
    changed = [i for i, (one, other) in enumerate(zip(found, continued(host), strict=True)) if one != other]
    assert changed == at_once


def first_logits(engine, request):
    """The logits [V] behind a prompt."""
    return recorded(engine, "replay", [request], [(5,)])[0, len(request.prompt_ids)]


def test_a_stop_string_within_a_token_is_missed(opened, continued):
    """Rightly served, every text stops at its first line break; the bug goes on where spaces follow in its token."""
    host = "gpt2-tiny"
    engine = opened.engine(host)
    with BUGS["sg-stop-boundary"].applied(engine):
        found = answers(engine, host)
    missed = 0
    for right, wrong in zip(continued(host, "sg-stop-boundary"), found, strict=True):
        text, longer = engine.tokenizer.decode(right.tokens), engine.tokenizer.decode(wrong.tokens)
        assert "\n" not in engine.tokenizer.decode(right.tokens[:-1])
        if right != wrong:
            missed += 1
            assert longer.startswith(text)
            assert not text.endswith("\n")
            assert right.finish == "eos"
    assert missed


def test_a_penalty_lowers_what_was_there():
    """At 2, logits of tokens that were there are halved above zero and doubled below; others stay."""
    logits = torch.tensor([[4.0, -4.0, 3.0, -3.0]])
    hit = torch.tensor([[True, True, False, False]])
    assert torch.equal(_penalised(logits, hit, 2.0), torch.tensor([[2.0, -8.0, 3.0, -3.0]]))


def test_negative_scores_are_divided(opened):
    """Of two tokens that were there the bug raises the log-probability, the right penalty lowers it."""
    engine = opened.engine("gpt2-tiny")
    history = History(2, frozenset())
    history.take(torch.tensor([[1, 3]]), torch.tensor([[1, 1]]))
    logits, seen = torch.tensor([[1.0, 5.0, 0.0, 2.0]]), []
    for change in (BUGS["sg-reppen-neg"].change, CORRECT["sg-reppen-neg"]):
        scores = processor_of(change, engine)(logits, history)
        seen.append(scores - logits.log_softmax(-1))
    assert torch.equal(seen[0].sign(), torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert torch.equal(seen[1].sign(), torch.tensor([[0.0, -1.0, 0.0, -1.0]]))


def test_padding_counts_as_the_end_of_sequence(opened):
    """In a padded row the end of sequence is penalised, in a whole one it is not; rightly in neither."""
    engine = opened.engine("gpt2-tiny")
    history = History(2, frozenset())
    history.take(torch.tensor([[0, 3], [1, 3]]), torch.tensor([[0, 1], [1, 1]]))
    logits = torch.full((2, 5), 6.0)
    wrong = processor_of(BUGS["sg-pen-pad"].change, engine)(logits, history)
    right = processor_of(CORRECT["sg-pen-pad"], engine)(logits, history)
    assert torch.allclose(wrong, torch.tensor([[6.0, 6.0, 5.0, 5.0, 6.0], [6.0, 5.0, 6.0, 5.0, 6.0]]))
    assert torch.allclose(right, torch.tensor([[6.0, 6.0, 6.0, 5.0, 6.0], [6.0, 5.0, 6.0, 5.0, 6.0]]))


def test_histories_stand_one_row_too_high(opened):
    """Of four rows the second and fourth ask: the second is given the third's history, the fourth none."""
    engine = opened.engine("gpt2-tiny")
    history = History(1, frozenset())
    history.take(torch.tensor([[0], [1], [2], [3]]), torch.ones(4, 1, dtype=torch.int64))
    logits = torch.full((4, 5), 6.0)
    wrong = processor_of(BUGS["sg-pen-batch-order"].change, engine)(logits, history)
    right = processor_of(CORRECT["sg-pen-batch-order"], engine)(logits, history)
    assert [row.nonzero().flatten().tolist() for row in wrong < 6] == [[], [2], [], []]
    assert [row.nonzero().flatten().tolist() for row in right < 6] == [[], [1], [], [3]]


def processor_of(change, engine):
    """The logits processor that a change puts into an engine."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.mutations.stopping.processed", lambda engine, processor: keeping(found, processor))
        with change(engine, 1.0):
            return found[0]


class keeping:  # noqa: N801  # stands where a function does
    """A block that keeps a processor and does nothing with it."""

    def __init__(self, found, processor):
        found.append(processor)

    def __enter__(self):
        return None

    def __exit__(self, *_error):
        return None


# --- between the logits and the token ----------------------------------------------------------


def test_a_processor_sees_all_that_was_fed(opened):
    """It is asked once a step, with the padded prompts and what was chosen behind them; nothing done is no change."""
    engine, host, seen = opened.engine("bloom-tiny"), "bloom-tiny", []
    requests = requests_of(host)[:3]
    plain = engine.generate(requests, batch_size=3, stop_ids=frozenset())

    def watch(logits, history):
        seen.append((history.generated, history.ids_BS.clone(), history.mask_BS.clone()))
        return logits

    with processed(engine, watch):
        assert engine.generate(requests, batch_size=3, stop_ids=frozenset()) == plain
    assert [generated for generated, _, _ in seen] == list(range(STEPS))
    _, ids, mask = seen[-1]
    for row, request in enumerate(requests):
        assert tuple(ids[row][mask[row] > 0].tolist()) == request.prompt_ids + plain[row].tokens[:-1]


def test_occurring_leaves_padding_out():
    """A token counts where the mask is 1, even where the same id is padding elsewhere in the row."""
    ids, mask = torch.tensor([[0, 0, 2], [0, 1, 0]]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert occurring(ids, mask, 4).tolist() == [[False, False, True, False], [True, True, False, False]]


def test_choosing_exchanges_the_best():
    """The chosen entry takes the highest logit and gives its own; a choice of the best changes nothing."""
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    assert choosing(logits, torch.tensor([2, 1])).tolist() == [[1.0, 3.0, 5.0], [1.0, 5.0, 3.0]]


def test_every_entry_says_what_and_where():
    """Each has one line on the wrong maths and the report's number; those that need a penalty have a counterpart."""
    for id, bug in BUGS.items():
        assert (bug.group, bug.shows) == ("stopping", "tokens")
        assert 0 < len(bug.wrong) < 120
        assert bug.reference.partition("#")[2].isdigit()
        assert math.isclose(bug.strengths[0], 1)
        assert id in CORRECT or id == "sg-min-tokens"
