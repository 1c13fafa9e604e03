import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engines import decoding
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request

VOCABULARY = 23
PAD = 0


# --- a model made by hand --------------------------------------------------------------------------


def state_of(tokens):
    """A number that depends on every token and on their order; never 0, whose logits would all be equal."""
    state = 1
    for token in tokens:
        state = 1 + (31 * state + token) % 9973
    return state


def logits_after(tokens):
    """What the model by hand says after these tokens, float64 [V]: every prefix has logits of its own."""
    state = state_of(tokens)
    return torch.tensor([math.sin(state * (v + 1)) * 5 for v in range(VOCABULARY)], dtype=torch.float64)


class HandModel:
    """A step function that sees what a real one sees: ids, positions, mask and the cache, nothing else."""

    def __init__(self):
        self.calls = []

    def step(self, input_ids_BT, position_ids_BT, attention_mask_BS, cache, keep):
        past = [] if cache is None else cache
        past.append(input_ids_BT)
        seen_BS = torch.cat(past, dim=1)
        assert seen_BS.shape == attention_mask_BS.shape, "the mask covers the cache and what is new"
        assert seen_BS.dtype == attention_mask_BS.dtype == position_ids_BT.dtype == torch.int64
        width = input_ids_BT.shape[1]
        self.calls.append((tuple(input_ids_BT.shape), keep))
        first = seen_BS.shape[1] - width
        rows = []
        for ids_S, mask_S, position_T in zip(seen_BS, attention_mask_BS.bool(), position_ids_BT, strict=True):
            steps = []
            for column in range(first, seen_BS.shape[1]):
                known = ids_S[: column + 1][mask_S[: column + 1]].tolist()
                assert int(position_T[column - first]) == max(0, len(known) - 1), "a position counts real tokens"
                steps.append(logits_after(known))
            rows.append(torch.stack(steps[-keep:] if keep else steps))
        return torch.stack(rows)

    def decoder(self):
        return decoding.Decoder(step=self.step, new_cache=lambda _batch, _length: [], pad_id=PAD, device="cpu")


def counting_decoder(vocabulary=VOCABULARY):
    """A decoder whose next token is the last one plus one."""

    def step(input_ids_BT, position_ids_BT, attention_mask_BS, cache, keep):
        following = (input_ids_BT + 1) % vocabulary
        logits = torch.nn.functional.one_hot(following, vocabulary).float()
        return logits[:, -keep:] if keep else logits

    return decoding.Decoder(step=step, new_cache=lambda _batch, _length: [], pad_id=PAD, device="cpu")


def request(*ids, limit=5):
    """A request of these ids."""
    return Request(id="r", prompt_ids=ids, max_new_tokens=limit)


def greedy_by_hand(asked, stop_ids):
    """The continuation that the model by hand gives to one request alone."""
    tokens = []
    while len(tokens) < asked.max_new_tokens:
        tokens.append(int(logits_after([*asked.prompt_ids, *tokens]).argmax()))
        if tokens[-1] in stop_ids:
            return Generation(tokens=tuple(tokens), finish="eos")
    return Generation(tokens=tuple(tokens), finish="length")


def assert_rows(rows, requests, continuations, *, prompts_too):
    """The rows are those of the model by hand, each at its own place."""
    expected = []
    for index, (asked, tokens) in enumerate(zip(requests, continuations, strict=True)):
        sequence = [*asked.prompt_ids, *tokens]
        start = 1 if prompts_too else len(asked.prompt_ids)
        expected += [(index, p, p >= len(asked.prompt_ids), sequence) for p in range(start, len(sequence))]
    assert rows.request.tolist() == [index for index, _, _, _ in expected]
    assert rows.position.tolist() == [place for _, place, _, _ in expected]
    assert rows.generated.tolist() == [new for _, _, new, _ in expected]
    shown = [logits_after(sequence[:place]) for _, place, _, sequence in expected]
    logits_NV = torch.stack([*shown, torch.zeros(VOCABULARY)])[:-1].numpy()
    following = np.array([sequence[place] for _, place, _, sequence in expected], dtype=np.int64)
    assert (rows.argmax == logits_NV.argmax(axis=1)).all()
    logsumexp = np.log(np.exp(logits_NV).sum(axis=1))
    assert rows.logsumexp == pytest.approx(logsumexp, rel=1e-6)
    assert rows.logp == pytest.approx(logits_NV[np.arange(len(rows)), following] - logsumexp, rel=1e-6, abs=1e-6)
    assert (rows.top_ids[:, 0] == rows.argmax[rows.generated]).all()


# --- batches ---------------------------------------------------------------------------------------

_LENGTHS = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@given(lengths=_LENGTHS, batch_size=st.none() | st.integers(1, 12))
@settings(deadline=None)
def test_each_request_is_in_one_batch(lengths, batch_size):
    """Every request is planned once and no batch is empty or larger than asked."""
    batches = decoding.plan_batches(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= (batch_size or len(lengths)) for batch in batches)


@given(lengths=_LENGTHS)
@settings(deadline=None)
def test_padding_is_bounded(lengths):
    """Without a batch size no row is padded to more than twice its length, short prompts to at most 96 tokens."""
    for batch in decoding.plan_batches(lengths, None):
        longest = max(lengths[i] for i in batch)
        assert all(longest <= max(96, 2 * lengths[i]) for i in batch)


def test_a_batch_size_keeps_the_suites_order():
    """With a batch size requests are taken as they come, however unequal."""
    assert decoding.plan_batches([500, 1, 3, 700, 2], 2) == [[0, 1], [2, 3], [4]]


def test_similar_lengths_make_few_batches():
    """Without one, all short prompts go into one batch, and the plan does not depend on luck."""
    assert decoding.plan_batches([5, 96, 40, 300, 290, 5], None) == [[0, 5, 2, 1], [4, 3]]


def test_left_pad():
    """Tokens stand at the right end, padding and zeros of the mask at the left."""
    ids, mask = decoding.left_pad([[1, 2, 3], [4]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_positions_count_from_the_first_real_token():
    """Each row counts its own tokens from 0; padding is at 0 too."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]])
    assert decoding.positions(mask).tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]


# --- free runs -------------------------------------------------------------------------------------


def test_counts_up():
    """A model that says the next number gives the next numbers, in the order of the requests."""
    requests = [request(7), request(3, 2, 1, limit=2), request(20, limit=4)]
    found = decoding.greedy(counting_decoder(), requests, batch_size=None, stop_ids=frozenset())
    assert [each.tokens for each in found] == [(8, 9, 10, 11, 12), (2, 3), (21, 22, 0, 1)]
    assert {each.finish for each in found} == {"length"}


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_stops_at_a_stop_id(batch_size):
    """A row ends with the stop id that it holds, each row by itself, the others go on."""
    requests = [request(7), request(1, limit=9), request(8, limit=1), request(2, limit=3)]
    found = decoding.greedy(counting_decoder(), requests, batch_size=batch_size, stop_ids=frozenset({9, 4}))
    assert found == [
        Generation(tokens=(8, 9), finish="eos"),
        Generation(tokens=(2, 3, 4), finish="eos"),
        Generation(tokens=(9,), finish="eos"),
        Generation(tokens=(3, 4), finish="eos"),
    ]


def test_a_stop_id_at_the_limit_is_eos():
    """A row whose last allowed token is a stop id ended by it; one token earlier it ended by its length."""
    found = [
        decoding.greedy(counting_decoder(), [request(5, limit=limit)], batch_size=1, stop_ids=frozenset({8}))[0]
        for limit in (2, 3, 4)
    ]
    assert found == [
        Generation(tokens=(6, 7), finish="length"),
        Generation(tokens=(6, 7, 8), finish="eos"),
        Generation(tokens=(6, 7, 8), finish="eos"),
    ]


def test_no_step_is_done_after_the_last_row_has_ended():
    """The loop stops with its last row and not at the longest limit."""
    model = HandModel()
    asked = [request(5, limit=50), request(6, 7, limit=3)]
    first = greedy_by_hand(asked[0], frozenset()).tokens[1]
    found = decoding.greedy(model.decoder(), asked, batch_size=None, stop_ids=frozenset({first}))
    steps = max(len(each.tokens) for each in found)
    assert len(model.calls) == steps < 50
    assert model.calls[0] == ((2, 2), 1)
    assert set(model.calls[1:]) <= {((2, 1), 1)}


_PROMPT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6).map(tuple)
_REQUESTS = st.lists(
    st.builds(lambda ids, limit: request(*ids, limit=limit), _PROMPT, st.integers(1, 6)), min_size=1, max_size=5
)
_SIZES = st.none() | st.integers(1, 4)


@given(requests=_REQUESTS, batch_size=_SIZES, stop_ids=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6))
@settings(deadline=None, max_examples=40)
def test_a_batch_gives_what_each_request_gives_alone(requests, batch_size, stop_ids):
    """Prompts and limits of any lengths: padding and neighbours change no token and no end."""
    found = decoding.greedy(HandModel().decoder(), requests, batch_size=batch_size, stop_ids=stop_ids)
    assert found == [greedy_by_hand(each, stop_ids) for each in requests]


@given(requests=_REQUESTS, batch_size=_SIZES, chunk=st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_chunks_change_no_free_run(requests, batch_size, chunk):
    """Prompts fed in chunks of any size, padding among them, give the tokens of a whole prefill."""
    decoder = HandModel().decoder()
    found = decoding.greedy(decoder, requests, batch_size=batch_size, stop_ids=frozenset(), chunk=chunk)
    assert found == [greedy_by_hand(each, frozenset()) for each in requests]


@pytest.mark.parametrize(
    ("chunk", "widths"), [(None, [7]), (3, [3, 3, 1]), (6, [6, 1]), (7, [7]), (8, [7]), (1, [1] * 7)]
)
def test_the_decode_loop_feeds_the_chunks_asked_for(chunk, widths):
    """Free and forced runs feed the prompt in chunks, the last one the rest, and then one token a step."""
    model = HandModel()
    asked = [request(1, 2, 3, 4, 5, 6, 7, limit=3), request(1, limit=3)]
    decoding.greedy(model.decoder(), asked, batch_size=2, stop_ids=frozenset(), chunk=chunk)
    decoding.replay(model.decoder(), asked, [(5, 6, 7)] * 2, batch_size=2, sketcher=Sketcher(VOCABULARY), chunk=chunk)
    steps = [((2, width), 1) for width in [*widths, 1, 1]]
    assert model.calls == [*steps, *steps]


def test_nothing_is_fed_where_nothing_is_forced():
    """A batch of empty continuations costs no step, in chunks or whole."""
    model = HandModel()
    for chunk in (None, 2):
        rows = Sketcher(VOCABULARY)
        decoding.replay(model.decoder(), [request(1, 2, 3)], [()], batch_size=1, sketcher=rows, chunk=chunk)
        assert len(rows.rows()) == 0
    assert model.calls == []


# --- top entries -----------------------------------------------------------------------------------


@given(requests=_REQUESTS, batch_size=_SIZES, stop_ids=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6))
@settings(deadline=None, max_examples=40)
def test_top_entries_are_those_of_each_step(requests, batch_size, stop_ids):
    """Each token has the highest log-probabilities of its own step, best first; the tokens are what they were."""
    found = decoding.greedy(HandModel().decoder(), requests, batch_size=batch_size, stop_ids=stop_ids, top=4)
    assert [replace(each, top_ids=(), top_logits=()) for each in found] == [
        greedy_by_hand(each, stop_ids) for each in requests
    ]
    for asked, each in zip(requests, found, strict=True):
        assert len(each.top_ids) == len(each.top_logits) == len(each.tokens)
        for step, (ids, values) in enumerate(zip(each.top_ids, each.top_logits, strict=True)):
            logprobs = logits_after([*asked.prompt_ids, *each.tokens[:step]]).log_softmax(dim=-1)
            assert list(ids) == logprobs.argsort(descending=True)[:4].tolist()
            assert values == pytest.approx(logprobs[list(ids)].tolist(), rel=1e-5, abs=1e-6)
            assert ids[0] == each.tokens[step]


def constant_decoder(*logits):
    """A decoder that says the same logits at each step, in float64."""

    def step(input_ids_BT, position_ids_BT, attention_mask_BS, cache, keep):
        return torch.tensor(logits, dtype=torch.float64).expand(len(input_ids_BT), 1, -1)

    return decoding.Decoder(step=step, new_cache=lambda _batch, _length: [], pad_id=PAD, device="cpu")


def best_of(*logits, top):
    """One step of a decoder that says these logits, with its top entries."""
    decoder = constant_decoder(*logits)
    (found,) = decoding.greedy(decoder, [request(1, limit=1)], batch_size=1, stop_ids=frozenset(), top=top)
    return found


def test_the_token_taken_comes_first_among_ties():
    """Equal logits are put in the order of their ids, as argmax takes them."""
    found = best_of(1.0, 3.0, 2.0, 3.0, 2.0, 3.0, top=5)
    assert found.tokens == (1,)
    assert found.top_ids == ((1, 3, 5, 2, 4),)


def test_a_rounded_tie_does_not_hide_the_token_taken():
    """Float64 logits whose log-probabilities are equal in float32 keep the order of the logits."""
    found = best_of(0.0, 50.0, 50.0 + 1e-9, top=2)
    assert found.tokens == (2,)
    assert found.top_ids == ((2, 1),)
    assert found.top_logits[0][0] == found.top_logits[0][1]


def test_a_small_vocabulary_has_fewer_entries():
    """Where more entries are asked for than there are columns all are shown, a masked one at -inf."""
    found = best_of(1.0, -math.inf, 2.0, top=20)
    assert found.top_ids == ((2, 0, 1),)
    assert [math.isfinite(value) for value in found.top_logits[0]] == [True, True, False]


# --- forced runs -----------------------------------------------------------------------------------


@st.composite
def forced(draw):
    """Requests with a continuation each, of lengths that have nothing to do with each other."""
    requests = draw(_REQUESTS)
    tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=6).map(tuple)
    return requests, [draw(tokens) for _ in requests]


@given(case=forced(), batch_size=_SIZES, chunk=st.none() | st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_replay_shows_every_generated_position(case, batch_size, chunk):
    """Each forced token has one row at its own place, seen on its own prefix, whatever the model would have said."""
    requests, continuations = case
    sketcher = Sketcher(VOCABULARY)
    decoder = HandModel().decoder()
    decoding.replay(decoder, requests, continuations, batch_size=batch_size, sketcher=sketcher, chunk=chunk)
    assert_rows(sketcher.rows(), requests, continuations, prompts_too=False)


@given(case=forced(), batch_size=_SIZES, chunk=st.none() | st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_teacher_forced_shows_every_position(case, batch_size, chunk):
    """Prompt and continuation have a row for each token but the first, whole or in chunks through the cache."""
    requests, continuations = case
    sketcher = Sketcher(VOCABULARY)
    decoder = HandModel().decoder()
    decoding.teacher_forced(decoder, requests, continuations, batch_size=batch_size, sketcher=sketcher, chunk=chunk)
    assert_rows(sketcher.rows(), requests, continuations, prompts_too=True)


def test_replay_goes_through_the_decode_loop():
    """The prompt is fed once, then one token a step, through one cache: the path that a server runs."""
    model = HandModel()
    decoding.replay(model.decoder(), [request(1, 2, 3)], [(4, 5, 6)], batch_size=None, sketcher=Sketcher(VOCABULARY))
    assert model.calls == [((1, 3), 1), ((1, 1), 1), ((1, 1), 1)]


def test_teacher_forced_feeds_the_chunks_asked_for():
    """A chunk size is what the step function sees, the last one the rest; without one it is a single pass."""
    model = HandModel()
    arguments = [request(1, 2, 3, 4)], [(5, 6, 7, 8)]
    decoding.teacher_forced(model.decoder(), *arguments, batch_size=None, sketcher=Sketcher(VOCABULARY), chunk=3)
    assert model.calls == [((1, 3), 0), ((1, 3), 0), ((1, 1), 0)]
    model.calls.clear()
    decoding.teacher_forced(model.decoder(), *arguments, batch_size=None, sketcher=Sketcher(VOCABULARY))
    assert model.calls == [((1, 7), 0)]


def test_one_pass_needs_no_cache():
    """A model without a cache can be teacher-forced in one piece."""
    requests, continuations = [request(1, 2), request(3)], [(4,), (5, 6)]
    model, sketcher = HandModel(), Sketcher(VOCABULARY)

    def no_cache(_batch, _length):
        raise AssertionError("a cache was asked for")

    decoder = decoding.Decoder(step=model.step, new_cache=no_cache, pad_id=PAD, device="cpu")
    decoding.teacher_forced(decoder, requests, continuations, batch_size=None, sketcher=sketcher)
    assert_rows(sketcher.rows(), requests, continuations, prompts_too=True)


def test_a_sequence_of_one_token_has_nothing_to_predict():
    """A lone token gives no rows, and does not stop the others of its batch."""
    requests, continuations = [request(1), request(2, 3)], [(), (4,)]
    sketcher = Sketcher(VOCABULARY)
    decoding.teacher_forced(HandModel().decoder(), requests, continuations, batch_size=None, sketcher=sketcher)
    assert_rows(sketcher.rows(), requests, continuations, prompts_too=True)
    alone = Sketcher(VOCABULARY)
    decoding.teacher_forced(HandModel().decoder(), requests[:1], [()], batch_size=1, sketcher=alone)
    assert len(alone.rows()) == 0


def test_a_small_buffer_changes_no_row(monkeypatch):
    """Logits are condensed a buffer at a time: a buffer of one step gives the same rows."""
    requests, continuations = [request(1, 2), request(3), request(9)], [(4, 5, 6), (5, 6), (1, 2, 3, 4)]
    monkeypatch.setattr(decoding, "_BUFFER_BYTES", 1)
    sketcher = Sketcher(VOCABULARY)
    decoding.replay(HandModel().decoder(), requests, continuations, batch_size=None, sketcher=sketcher)
    assert_rows(sketcher.rows(), requests, continuations, prompts_too=False)


def test_the_cache_is_as_long_as_the_run():
    """The cache is made for exactly the tokens that will be in it: a static one must not be too short."""
    lengths = []

    def new_cache(batch, length):
        lengths.append((batch, length))
        return []

    model = HandModel()
    decoder = decoding.Decoder(step=model.step, new_cache=new_cache, pad_id=PAD, device="cpu")
    decoding.replay(decoder, [request(1, 2, 3), request(4)], [(5, 6), (7,)], batch_size=None, sketcher=Sketcher(23))
    decoding.greedy(decoder, [request(1, 2, limit=4)], batch_size=None, stop_ids=frozenset())
    assert lengths == [(2, 5), (1, 6)]


def test_hand_model_tells_prefixes_apart():
    """The model by hand is a good witness: no two different prefixes of the tests share their logits."""
    states = [state_of(range(n)) for n in range(1, 20)] + [state_of([5] * n) for n in range(1, 20)]
    assert all(a != b for a, b in pairwise(sorted(states)))
