from dataclasses import replace

import pytest
import torch

from harness.engines.base import CAPABILITIES, Engine
from harness.engines.runner import planned, run_suite, views_of
from harness.errors import EngineError
from harness.suites import suite_from_dict
from harness.values import Generation, Request, Run

VOCABULARY = 13
REQUESTS = (
    Request(id="first", prompt_ids=(1, 2, 3, 4, 5, 6, 7, 8), max_new_tokens=2),
    Request(id="short", prompt_ids=(1,), max_new_tokens=2),
    Request(id="longest", prompt_ids=(5, 6, 7, 8, 9), max_new_tokens=2),
    Request(id="middle", prompt_ids=(5, 6, 7), max_new_tokens=2),
)
CONTINUATIONS = ((1, 2), (3, 4), (5, 6), (7, 8))


def suite_of(*runs):
    """A suite of four prompts with these runs."""
    prompts = [{"id": request.id, "ids": list(request.prompt_ids)} for request in REQUESTS]
    data = {"name": "made", "stop": "eos", "add_special_tokens": True, "max_new_tokens": 2}
    return suite_from_dict({**data, "prompts": prompts, "runs": list(runs)}, "made.toml")


class Scripted(Engine):
    """An engine that writes down what it is asked, and shows logits that name the request."""

    spec = "scripted"
    capabilities = frozenset({"tokens", "logits", "replay"})
    vocabulary = VOCABULARY

    def __init__(self, tokenized=REQUESTS):
        self.declared = {"dtype": "float32"}
        self.asked = []
        self.tokenized = tokenized

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        return None

    @property
    def settings(self):
        return {"dtype": "float32", "threads": 1}

    def tokenize(self, suite):
        return self.tokenized

    def generate(self, requests, *, batch_size, stop_ids):
        self.asked.append(("generate", [r.id for r in requests], batch_size, stop_ids))
        return [Generation(tokens=(len(r.prompt_ids), 0), finish="length") for r in requests]

    def replay(self, requests, continuations, *, batch_size, sketcher):
        self._show("replay", requests, continuations, batch_size, sketcher, first=None)

    def prefill(self, requests, continuations, *, batch_size, sketcher):
        self._show("prefill", requests, continuations, batch_size, sketcher, first=1)

    def _show(self, view, requests, continuations, batch_size, sketcher, *, first):
        self.asked.append((view, [r.id for r in requests], batch_size, list(continuations)))
        for index, (request, tokens) in enumerate(zip(requests, continuations, strict=True)):
            sequence = [*request.prompt_ids, *tokens]
            places = torch.arange(first or len(request.prompt_ids), len(sequence))
            logits = torch.zeros((len(places), VOCABULARY))
            logits[:, len(request.prompt_ids)] = 1.0
            sketcher.add(
                logits,
                torch.tensor(sequence)[places],
                request=torch.full_like(places, index).int().numpy(),
                position=places.int().numpy(),
                generated=(places >= len(request.prompt_ids)).numpy(),
            )


def run(engine, suite, *, runs=None, **changes):
    """The trace of an engine on a suite."""
    arguments = {"runs": suite.runs if runs is None else runs, "stop_ids": frozenset({9}), "vocabulary": VOCABULARY}
    return run_suite(engine, suite, REQUESTS, CONTINUATIONS, **{**arguments, **changes})


ALL = {"name": "all", "quick": True}
SINGLE = {"name": "single", "quick": True, "batch_size": 1, "views": ["generate", "replay"]}
ORDER = {"name": "order", "quick": True, "order": "A-B-A", "batch_size": 1}


def test_every_pass_is_given():
    """Each run and view of the suite has its passes, in the suite's order, and no other."""
    trace = run(Scripted(), suite_of(ALL, SINGLE, ORDER))
    expected = (
        ("all", "generate"), ("all", "replay"), ("all", "prefill"),
        ("single", "generate"), ("single", "replay"),
        ("order", "generate"), ("order", "replay"), ("order", "prefill"),
    )  # fmt: skip
    given = [(one.run, one.view) for one in trace.passes]
    assert tuple(dict.fromkeys(given)) == expected
    assert all(given.count(key) == (3 if key[0] == "order" else 1) for key in expected)


def test_only_the_runs_asked_for_are_done():
    """With a part of the suite's runs the trace holds these alone."""
    suite = suite_of(ALL, SINGLE)
    trace = run(Scripted(), suite, runs=suite.runs[1:])
    assert [(one.run, one.view) for one in trace.passes] == [("single", "generate"), ("single", "replay")]


ALL_VIEWS = ("generate", "replay", "prefill")


@pytest.mark.parametrize(
    ("views", "capabilities", "shown"),
    [
        (ALL_VIEWS, {"tokens", "logits", "replay"}, ALL_VIEWS),
        (ALL_VIEWS, {"tokens"}, ("generate",)),
        (ALL_VIEWS, {"logits"}, ("prefill",)),
        (ALL_VIEWS, {"tokens", "logits"}, ("generate", "prefill")),
        (("replay", "generate"), {"replay", "tokens"}, ("replay", "generate")),
        (("replay", "prefill"), {"logits", "tokens"}, ("prefill",)),
        (("replay", "prefill"), {"tokens", "top_logprobs"}, ("generate",)),
        (("replay",), {"tokens", "logits"}, ("generate",)),
        (("replay",), {"logits"}, ()),
        (("generate",), {"replay", "logits"}, ()),
        (ALL_VIEWS, set(), ()),
    ],
)
def test_views_of_a_run(views, capabilities, shown):
    """A view needs its capability; where none is left, tokens are shown if there are any."""
    assert views_of(Run(name="r", views=views), frozenset(capabilities)) == shown


def test_an_engine_is_asked_for_what_it_can_show():
    """An engine that has tokens alone makes free runs, in the runs that ask for logits too."""
    engine = Scripted()
    engine.capabilities = frozenset({"tokens"})
    logits = {"name": "logits", "quick": True, "views": ["replay", "prefill"]}
    trace = run(engine, suite_of(SINGLE, logits, ORDER))
    assert [(one.run, one.view, one.repeat) for one in trace.passes] == [
        ("single", "generate", 0),
        ("logits", "generate", 0),
        *[("order", "generate", repeat) for repeat in range(3)],
    ]
    assert {asked[0] for asked in engine.asked} == {"generate"}
    assert trace.capabilities == {"tokens"}


def test_views_can_be_restricted():
    """With `views` only these are shown, and nothing takes the place of those that are left out."""
    trace = run(Scripted(), suite_of(ALL, SINGLE), views=("replay", "prefill"))
    assert [(one.run, one.view) for one in trace.passes] == [
        ("all", "replay"),
        ("all", "prefill"),
        ("single", "replay"),
    ]
    engine = Scripted()
    engine.capabilities = frozenset({"tokens"})
    assert run(engine, suite_of(ALL, SINGLE), views=("replay", "prefill")).passes == ()
    assert engine.asked == []


def test_what_is_planned_is_what_is_done():
    """The plan that a trace is held against has the passes of the trace, in their order."""
    suite = suite_of(ALL, SINGLE, ORDER)
    for capabilities in ({"tokens", "logits", "replay"}, {"tokens"}, {"logits", "tokens"}):
        for views in (None, ("prefill",), ("generate", "replay")):
            engine = Scripted()
            engine.capabilities = frozenset(capabilities)
            trace = run(engine, suite, views=views)
            plan = planned(suite.runs, REQUESTS, trace.capabilities, views)
            assert [(one.run, one.view, one.repeat, one.requests) for one in trace.passes] == [
                (one.name, view, repeat, visit) for one, view, repeat, visit in plan
            ]


def test_an_engine_cannot_be_widened_unless_it_says_how():
    """The contract's own `upcast` is an error that names the engine."""
    with pytest.raises(EngineError, match="scripted cannot be widened"):
        Scripted().upcast()


def test_a_suite_order_run_covers_all_requests_once():
    """A plain run asks for all requests in one call, with the run's batch size and the golden's continuations."""
    engine = Scripted()
    run(engine, suite_of(SINGLE))
    names = [request.id for request in REQUESTS]
    assert engine.asked == [
        ("generate", names, 1, frozenset({9})),
        ("replay", names, 1, list(CONTINUATIONS)),
    ]


def test_a_b_a_visits_the_first_the_longest_other_and_the_first_again():
    """A is the first prompt, even if it is the longest; B the longest of the others; then A again."""
    engine = Scripted()
    trace = run(engine, suite_of(ORDER))
    assert [asked[1] for asked in engine.asked] == [["first"], ["longest"], ["first"]] * 3
    visits = [(one.repeat, one.requests) for one in trace.passes if one.view == "replay"]
    assert visits == [(0, (0,)), (1, (2,)), (2, (0,))]
    assert engine.asked[4] == ("replay", ["longest"], 1, [CONTINUATIONS[2]])


def test_rows_are_named_as_in_the_suite():
    """Rows of a visit carry the request's index in the suite, not in the call."""
    trace = run(Scripted(), suite_of(ORDER))
    for one in trace.passes:
        if one.rows is not None:
            (index,) = one.requests
            assert set(one.rows.request.tolist()) == {index}
            assert set(one.rows.argmax.tolist()) == {len(REQUESTS[index].prompt_ids)}


def test_fingerprints_are_kept_in_a_b_a_alone():
    """Only a run that repeats a request needs the bits of its logits."""
    trace = run(Scripted(), suite_of(ALL, ORDER))
    for one in trace.passes:
        if one.rows is not None:
            assert one.rows.fingerprint.any() == (one.run == "order")


def test_views_show_what_they_are():
    """`generate` holds continuations and no rows, the others rows of generated or of all positions."""
    generate, replay, prefill = run(Scripted(), suite_of(ALL)).passes
    assert len(generate.generations) == len(REQUESTS)
    assert generate.rows is None
    assert replay.generations == prefill.generations == ()
    assert replay.rows.generated.all()
    assert len(replay.rows) == sum(map(len, CONTINUATIONS))
    assert len(prefill.rows) == sum(
        len(r.prompt_ids) + len(c) - 1 for r, c in zip(REQUESTS, CONTINUATIONS, strict=True)
    )
    assert all(one.seconds >= 0 for one in (generate, replay, prefill))


def test_the_trace_says_who_it_is_of():
    """Name, promises, live settings, capabilities, vocabulary and suite digest go into the trace."""
    suite = suite_of(ALL)
    trace = run(Scripted(), suite)
    assert (trace.engine, trace.vocabulary, trace.suite_digest) == ("scripted", VOCABULARY, suite.digest)
    assert trace.declared == {"dtype": "float32"}
    assert {key: trace.settings[key] for key in ("dtype", "threads")} == {"dtype": "float32", "threads": 1}
    assert set(trace.settings) == {"dtype", "threads", "versions", "machine"}
    assert trace.capabilities <= CAPABILITIES


def test_settings_are_read_after_the_work():
    """Settings are read back when all is done, so that what only a run decides (the cache) is in them."""

    class Late(Scripted):
        @property
        def settings(self):
            return {"cache": "used" if self.asked else "none"}

    assert run(Late(), suite_of(ALL)).settings["cache"] == "used"


@pytest.mark.parametrize("tokenized", [None, tuple(replace(r, prompt_ids=(0, *r.prompt_ids)) for r in REQUESTS)])
def test_the_engines_own_prompt_ids_are_kept(tokenized):
    """Ids of the engine's own tokenizer stand in the trace as they are, None where it has none."""
    trace = run(Scripted(tokenized), suite_of(ALL))
    assert trace.prompt_ids == (None if tokenized is None else tuple(r.prompt_ids for r in tokenized))


def test_progress_names_each_pass():
    """Before each pass the progress is told what comes."""
    told = []
    run(Scripted(), suite_of(SINGLE, ORDER), progress=told.append)
    assert told == [
        "single/generate",
        "single/replay",
        *["order/generate"] * 3,
        *["order/replay"] * 3,
        *["order/prefill"] * 3,
    ]
