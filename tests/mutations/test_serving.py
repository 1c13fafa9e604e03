"""Bugs of serving: other prompts, answers or padded rows; whatever they do not concern keeps every bit."""

import pytest
import torch

import harness
from conftest import ROOT
from harness.mutations.mutation import catalogue, patched
from harness.mutations.serving import MUTATIONS
from harness.suites import load_suite
from harness.values import Generation, Request
from tests.engines.recorder import recorded
from tests.mutations.applied import REQUESTS, Opened, same_bits, shown, unharmed
from tests.support import SUITE, write_suite

BUGS = catalogue(*MUTATIONS)
NONE = frozenset()
HOSTS = sorted(BUGS["bs-gather-dup"].hosts)
TRAINED = sorted(BUGS["bs-result-order"].hosts)
LONG = """
[[prompts]]
id = "too-long"
text = "Am Abend Felix geht zu die lange Brücke."
repeat_to_tokens = 520
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Engines of the hosts, opened once each."""
    with Opened(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Prompts as text, ids and messages, and one longer than half a context of 1,024."""
    messages = '[[prompts]]\nid = "chat"\nmessages = [{ role = "user", content = "What is my name?" }]\n'
    return load_suite(write_suite(tmp_path_factory.mktemp("suite") / "suite.toml", SUITE + messages + LONG))


def ends(host, names=("ends-list", "stops-facts", "goes-on-translation")):
    """Prompts of the edge suite whose texts end at once, soon and not within 8 tokens: the last one first."""
    by_id = {one.id: one for one in harness.load_golden(ROOT / "golden" / host / "edge").requests}
    return [Request(id=name, prompt_ids=by_id[name].prompt_ids, max_new_tokens=8) for name in reversed(names)]


# --- prompts -----------------------------------------------------------------------------------


def test_the_beginning_is_doubled(opened, suite):
    """Texts begin twice; prompts that are ids, and what the engine computes for given ids, are as before."""
    engine = opened.engine("llama-tiny")
    before, logits = engine.tokenize(suite), opened.plain("llama-tiny")
    with unharmed(engine), BUGS["bs-double-bos"].applied(engine):
        doubled = {one.id: one.prompt_ids for one in engine.tokenize(suite)}
        assert same_bits(shown(engine), logits)
    for one in before:
        twice = one.id not in ("ids", "chat")
        assert doubled[one.id] == ((1,) * twice) + one.prompt_ids, one.id
    assert doubled["short"][:2] == (1, 1)
    assert engine.tokenize(suite) == before


@pytest.mark.parametrize("host", ["bloom-tiny", "gpt2-tiny"])
def test_no_beginning_to_double(opened, host):
    """A tokenizer that adds none has no place for the bug, and says so."""
    with pytest.raises(LookupError, match="beginning"), BUGS["bs-double-bos"].applied(opened.engine(host)):
        pass


@pytest.mark.parametrize("host", HOSTS)
def test_long_prompts_lose_their_front(opened, suite, host):
    """A prompt of 520 tokens becomes its last 512, as reported and as computed; others are as before."""
    engine = opened.engine(host)
    before = engine.tokenize(suite)
    long = next(one for one in before if one.id == "too-long")
    cut = Request(id="cut", prompt_ids=long.prompt_ids[-512:], max_new_tokens=2)
    of_cut = {view: recorded(engine, view, [cut], [(7, 8)]) for view in ("replay", "prefill")}
    free = engine.generate([cut], batch_size=1, stop_ids=NONE)
    with unharmed(engine), BUGS["bs-truncate-head-or-tail"].applied(engine):
        prompts = [one.prompt_ids for one in engine.tokenize(suite)]
        found = {view: recorded(engine, view, [long], [(7, 8)]) for view in ("replay", "prefill")}
        short = Request(id="long", prompt_ids=long.prompt_ids, max_new_tokens=2)
        assert engine.generate([short], batch_size=1, stop_ids=NONE) == free
        assert same_bits(shown(engine), opened.plain(host))
    assert prompts == [one.prompt_ids[-512:] for one in before]
    assert [len(ids) for ids in prompts] != [len(one.prompt_ids) for one in before]
    for view, rows in found.items():
        assert same_bits(rows, {(0, position + 8): row for (_, position), row in of_cut[view].items()})
    assert engine.tokenize(suite) == before


def test_what_is_cut_off_changes_the_logits(opened, suite):
    """The first 8 of 520 tokens matter: where they were cut off the logits behind the prompt are others."""
    engine = opened.engine("llama-tiny")
    long = next(one for one in engine.tokenize(suite) if one.id == "too-long")
    whole = recorded(engine, "replay", [long], [(7, 8)])
    with BUGS["bs-truncate-head-or-tail"].applied(engine):
        assert recorded(engine, "replay", [long], [(7, 8)]).keys() == whole.keys()
        assert not same_bits(recorded(engine, "replay", [long], [(7, 8)]), whole)


@pytest.mark.parametrize(("strength", "window"), [(1.0, 512), (0.5, 768), (2 / 512, 1022)])
def test_windows_of_the_sweep(opened, strength, window):
    """Half the context, three quarters of it, and all but two tokens."""
    engine, fed = opened.engine("gpt2-tiny"), []
    request = Request(id="full", prompt_ids=tuple(range(3, 1003)) + tuple(range(3, 26)), max_new_tokens=1)

    def generate(requests, **_more):
        fed.extend(requests)
        return []

    with patched(engine, generate=generate), BUGS["bs-truncate-head-or-tail"].applied(engine, strength):
        engine.generate([request], batch_size=1, stop_ids=NONE)
    assert fed[0].prompt_ids == request.prompt_ids[-window:]


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", TRAINED)
def test_answers_come_in_the_order_of_their_completion(opened, host):
    """In a batch the shortest answer is first; one at a time, or all of one length, answers are as before."""
    engine, requests = opened.engine(host), ends(host)
    together = engine.generate(requests, batch_size=3, stop_ids=engine.stop_ids)
    alone = engine.generate(requests, batch_size=1, stop_ids=engine.stop_ids)
    with unharmed(engine), BUGS["bs-result-order"].applied(engine):
        mixed = engine.generate(requests, batch_size=3, stop_ids=engine.stop_ids)
        assert engine.generate(requests, batch_size=1, stop_ids=engine.stop_ids) == alone
        full = engine.generate(requests, batch_size=3, stop_ids=NONE)
        assert same_bits(shown(engine), opened.plain(host))
    assert mixed != together
    assert mixed == sorted(together, key=lambda one: len(one.tokens))
    assert engine.generate(requests, batch_size=3, stop_ids=NONE) == full
    assert engine.generate(requests, batch_size=3, stop_ids=engine.stop_ids) == together


@pytest.mark.parametrize("host", HOSTS)
def test_the_last_request_sets_all_limits(opened, host):
    """In a batch every answer is as long as the last request asks; one at a time each has its own length."""
    engine = opened.engine(host)
    limits = {"long": 2, "short": 4, "middle": 3}
    requests = [Request(id=one.id, prompt_ids=one.prompt_ids, max_new_tokens=limits[one.id]) for one in REQUESTS]
    together, alone = (engine.generate(requests, batch_size=size, stop_ids=NONE) for size in (3, 1))
    with unharmed(engine), BUGS["bs-params-last"].applied(engine):
        found = engine.generate(requests, batch_size=3, stop_ids=NONE)
        assert engine.generate(requests, batch_size=1, stop_ids=NONE) == alone
        assert same_bits(shown(engine), opened.plain(host))
    assert [len(one.tokens) for one in together] == [2, 4, 3]
    assert [len(one.tokens) for one in found] == [3, 3, 3]
    assert found[1].tokens == together[1].tokens[:3]
    assert engine.generate(requests, batch_size=3, stop_ids=NONE) == together


def test_a_limit_of_another_request_ends_at_the_context(opened):
    """A prompt of 1,020 tokens gets four more, not the eight that the last request asks for."""
    engine, fed = opened.engine("gpt2-tiny"), []

    def generate(requests, **_more):
        fed.extend(requests)
        return [Generation(tokens=(), finish="length")] * len(requests)

    full = Request(id="full", prompt_ids=(5,) * 1020, max_new_tokens=1)
    last = Request(id="last", prompt_ids=(5, 6), max_new_tokens=8)
    with patched(engine, generate=generate), BUGS["bs-params-last"].applied(engine):
        engine.generate([full, last], batch_size=2, stop_ids=NONE)
    assert [one.max_new_tokens for one in fed] == [4, 8]


@pytest.mark.parametrize("host", HOSTS)
def test_filled_batches_stay_filled(opened, host):
    """Four requests come back as six answers, the first two again, on three ranks; three requests as three."""
    engine = opened.engine(host)
    requests = [Request(id=str(i), prompt_ids=(7 + i, 9, 30 * i + 4), max_new_tokens=2) for i in range(4)]
    plain = engine.generate(requests, batch_size=None, stop_ids=NONE)
    alone = engine.generate(requests[:3], batch_size=1, stop_ids=NONE)
    with unharmed(engine), BUGS["bs-gather-dup"].applied(engine):
        assert engine.generate(requests, batch_size=None, stop_ids=NONE) == [*plain, *plain[:2]]
        assert engine.generate(requests[:3], batch_size=1, stop_ids=NONE) == alone
        assert len(engine.generate(requests, batch_size=4, stop_ids=NONE)) == 12
        assert same_bits(shown(engine), opened.plain(host))
    assert engine.generate(requests, batch_size=None, stop_ids=NONE) == plain


# --- padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "options"),
    [(host, {}) for host in HOSTS]
    + [("llama-tiny", {"attn": "eager"}), ("llama-tiny", {"chunk": 16}), ("gpt2-tiny", {"static_cache": True})],
    ids=str,
)
def test_padded_rows_become_nan(opened, host, options):
    """In 16 bits all logits of a padded row are NaN, on every way; rows without padding keep every bit."""
    engine = opened.engine(host, None, **options)
    before, alone = shown(engine), shown(engine, batch_size=1)
    with unharmed(engine), BUGS["bs-empty-row-nan"].applied(engine):
        inside = shown(engine)
        assert same_bits(shown(engine, batch_size=1), alone)
    for place, row in inside.items():
        _, request, _ = place
        assert torch.equal(row, before[place]) if request == 0 else row.isnan().all(), place
    assert same_bits(shown(engine), before)


@pytest.mark.parametrize("host", HOSTS)
def test_rows_that_attend_to_nothing_are_harmless_in_32_bits(opened, host):
    """In float32 no bit changes."""
    engine = opened.engine(host, "float32")
    with BUGS["bs-empty-row-nan"].applied(engine):
        assert same_bits(shown(engine), opened.plain(host, "float32"))


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", MUTATIONS, ids=lambda bug: bug.id)
def test_bugs_are_undone_after_an_error(opened, bug):
    """An error inside the block leaves nothing behind."""
    engine = opened.engine("llama-tiny")
    # The class of its cache and its tokenizer are an engine's own from its first request on, whichever test makes it.
    engine.generate(REQUESTS, batch_size=3, stop_ids=NONE)
    assert engine.tokenizer is not None

    def fail():
        with unharmed(engine), bug.applied(engine):
            engine.generate(REQUESTS, batch_size=3, stop_ids=NONE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("bug", MUTATIONS, ids=lambda bug: bug.id)
def test_bugs_fit_a_widened_copy(opened, bug):
    """A copy of a 16-bit engine in float32 takes each bug by itself, and is left as it was."""
    with opened.engine("llama-tiny", None).upcast() as wide:
        before = shown(wide, ["replay"])
        with unharmed(wide), bug.applied(wide):
            shown(wide, ["replay"])
        assert same_bits(shown(wide, ["replay"]), before)


def test_every_entry_says_what_and_where():
    """Each has one line on the wrong maths and the report's number."""
    for bug in MUTATIONS:
        assert bug.group == "serving"
        assert 0 < len(bug.wrong) < 120
        assert bug.reference.partition("#")[2].isdigit()
        assert bug.strengths[0] == 1.0
