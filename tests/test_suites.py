import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from harness.errors import SuiteError
from harness.models import tokenizer as small
from harness.suites import digest, load_suite, resolve, suite_from_dict, suite_to_dict, tokenizer_digest
from harness.values import Prompt, Run

PROMPTS = Path(__file__).parent.parent / "prompts"
SHIPPED = ("completion", "core", "edge", "headline", "translate")
VOCABULARY = 1021
CONTEXT = 1024

GOOD = """
name = "small"
description = "for tests"
stop = "eos"
add_special_tokens = true
max_new_tokens = 8

[[prompts]]
id = "a"
text = "In the morning"

[[prompts]]
id = "b"
messages = [{ role = "user", content = "What is my name?" }]

[[prompts]]
id = "c"
ids = [5, 6, 7]
repeat_to_tokens = 20
max_new_tokens = 2

[[runs]]
name = "all"
quick = true

[[runs]]
name = "one"
batch_size = 1
order = "A-B-A"
views = ["replay"]
"""


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer that adds no special tokens, as BLOOM's."""
    return wrapped(adds_bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer():
    """A small tokenizer that begins each text with <s>, as Llama's."""
    return wrapped(adds_bos=True)


def wrapped(*, adds_bos, seed=3):
    """A tokenizer trained here and wrapped as transformers loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=small.train(VOCABULARY, seed=seed, adds_bos=adds_bos),
        bos_token=small.BOS,
        eos_token=small.EOS,
        pad_token=small.PAD,
        chat_template=small.CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def written(folder, text):
    """The path of a suite file of that text."""
    path = folder / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


def data_of(*prompts, **changes):
    """A suite as plain data; prompts without an id are p0, p1, ..."""
    entries = [{"id": f"p{i}", **prompt} for i, prompt in enumerate(prompts)]
    data = {"name": "made", "stop": "eos", "add_special_tokens": True, "max_new_tokens": 8, "prompts": entries}
    return {**data, "runs": [{"name": "all", "quick": True}], **changes}


def suite_of(*prompts, **changes):
    """The suite that `data_of` describes."""
    return suite_from_dict(data_of(*prompts, **changes), "made.toml")


def resolved(suite, tokenizer, *, context=64, vocabulary=VOCABULARY):
    """The suite resolved against a model of 64 tokens called tiny."""
    return resolve(suite, tokenizer, context=context, vocabulary=vocabulary, model="tiny")


def refusal(call, *args):
    """The message of the SuiteError that the call raises; it has to be one line that ends in a fix."""
    with pytest.raises(SuiteError) as caught:
        call(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.fix
    assert message.endswith(caught.value.fix)
    return message


# --- reading ---------------------------------------------------------------------------------------


def test_reads_every_field(tmp_path):
    """A suite file gives the values that it writes, and defaults for what it leaves out."""
    suite = load_suite(written(tmp_path, GOOD))
    assert (suite.name, suite.description, suite.stop) == ("small", "for tests", "eos")
    assert (suite.add_special_tokens, suite.max_new_tokens) == (True, 8)
    assert suite.prompts == (
        Prompt(id="a", text="In the morning"),
        Prompt(id="b", messages=({"role": "user", "content": "What is my name?"},)),
        Prompt(id="c", ids=(5, 6, 7), repeat_to_tokens=20, max_new_tokens=2),
    )
    assert suite.runs == (
        Run(name="all", quick=True),
        Run(name="one", batch_size=1, order="A-B-A", views=("replay",)),
    )
    assert suite.digest == digest(suite)


def test_reads_a_file_with_a_byte_order_mark(tmp_path):
    """A file that an editor saved with a byte order mark reads as the same suite."""
    path = tmp_path / "mark.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_suite(str(path)) == load_suite(written(tmp_path, GOOD))


MESSAGES = '[{ role = "user", content = "What is my name?" }]'

# What is replaced in GOOD, by what, the place and problem that the error names, and a part of its fix.
REFUSED = {
    "unknown key": ('stop = "eos"', 'stop = "eos"\nseed = 3', 'small.toml: unknown key "seed"', 'keys are "name"'),
    "misspelt key": ("max_new_tokens = 8", "max_new_token = 8", "small.toml: unknown key", "Did you mean `max_new_tok"),
    "misspelt prompt key": ('text = "In', 'txt = "In', 'prompts[0] (id "a")', "Did you mean `text`?"),
    "misspelt run key": ("batch_size", "batchsize", 'runs[1] (name "one")', "Did you mean `batch_size`?"),
    "misspelt message key": ("role =", "rolle =", 'prompts[1] (id "b"): messages[0]', "Did you mean `role`?"),
    "no name": ('name = "small"', "", "small.toml: `name` is missing", 'name = "core"'),
    "no stop": ('stop = "eos"', "", "small.toml: `stop` is missing", 'stop = "ignore-eos"'),
    "no special tokens": ("add_special_tokens = true", "", "`add_special_tokens` is missing", "tokens = true"),
    "no new tokens": ("max_new_tokens = 8", "", "`max_new_tokens` is missing", "max_new_tokens = 64"),
    "name is a path": ('"small"', '"../small"', '`name` is "../small"', "A-Z a-z 0-9"),
    "name is empty": ('"small"', '""', '`name` is ""', "A-Z a-z 0-9"),
    "name is a number": ('"small"', "3", "`name` is a whole number", 'name = "core"'),
    "name with an escape": ('"small"', '"a\\u001b[31m"', '`name` is "a\\u001b[31m"', "A-Z a-z 0-9"),
    "description is a list": ('"for tests"', "[]", "small.toml: `description` is an array", "description ="),
    "stop is unknown": ('"eos"', '"never"', 'small.toml: `stop` is "never"', '"ignore-eos", "eos"'),
    "special tokens is a number": ("tokens = true", "tokens = 1", "`add_special_tokens` is a whole", "tokens = true"),
    "new tokens is a bool": ("tokens = 8", "tokens = true", "`max_new_tokens` is true or false", "tokens = 64"),
    "new tokens is a float": ("tokens = 8", "tokens = 8.0", "`max_new_tokens` is a number with a point", "tokens = 64"),
    "new tokens is zero": ("tokens = 8", "tokens = 0", "`max_new_tokens` is below 1", "whole number from 1"),
    "new tokens is huge": ("tokens = 8", f"tokens = 0x{'f' * 9000}", "`max_new_tokens` is below 1 or beyond", "from 1"),
    "prompt new tokens": ("max_new_tokens = 2", "max_new_tokens = -1", 'prompts[2] (id "c")', "whole number from 1"),
    "no id": ('id = "b"', "", "prompts[1]: `id` is missing", 'id = "story-en"'),
    "id is a date": ('id = "b"', "id = 2024-01-01", "prompts[1]: `id` is a date", 'id = "story-en"'),
    "id with a space": ('id = "b"', 'id = "b c"', 'prompts[1]: `id` is "b c"', "A-Z a-z 0-9"),
    "same id": ('id = "c"', 'id = "a"', 'prompts[2] (id "a"): prompts[0] has the same id', "its own id"),
    "no source": ('text = "In the morning"', "", 'prompts[0] (id "a"): no `text`', "exactly one"),
    "two sources": ("ids = [5, 6, 7]", 'ids = [5]\ntext = "x"', 'prompts[2] (id "c"): `text` and `ids`', "Keep one"),
    "text is empty": ('"In the morning"', '""', 'prompts[0] (id "a"): `text` is empty', "at least one character"),
    "text is a bool": ('"In the morning"', "true", 'prompts[0] (id "a"): `text` is true or false', "text = "),
    "ids is empty": ("[5, 6, 7]", "[]", 'prompts[2] (id "c"): `ids` is empty', "at least one entry"),
    "ids is a string": ("[5, 6, 7]", '"5"', 'prompts[2] (id "c"): `ids` is a string', "ids = [17, 4]"),
    "token is a bool": ("[5, 6, 7]", "[5, true]", 'prompts[2] (id "c"): `ids[1]` is not a token', "whole numbers from"),
    "token is negative": ("[5, 6, 7]", "[5, 6, -7]", "`ids[2]` is not a token id", "whole numbers from 0"),
    "token is beyond int32": ("[5, 6, 7]", "[4294967296]", "`ids[0]` is not a token id", "2147483647"),
    "messages is empty": (MESSAGES, "[]", 'prompts[1] (id "b"): `messages` is empty', "at least one entry"),
    "message is a string": (MESSAGES, '["x"]', "messages[0]: is a string", 'keys "role", "content"'),
    "message without role": ('role = "user", ', "", 'prompts[1] (id "b"): messages[0]: `role` is', 'role = "user"'),
    "message is empty": ("What is my name?", "", "messages[0]: `content` is empty", "at least one character"),
    "repeat is zero": ("= 20", "= 0", 'prompts[2] (id "c"): `repeat_to_tokens` is not a length', '"context-N"'),
    "repeat is a bool": ("= 20", "= true", "`repeat_to_tokens` is not a length", '"context-N"'),
    "repeat is a word": ("= 20", '= "context"', "`repeat_to_tokens` is not a length", '"context-N"'),
    "repeat is below context": ("= 20", '= "context--1"', "`repeat_to_tokens` is not a length", '"context-N"'),
    "repeat of messages": ('id = "b"', 'id = "b"\nrepeat_to_tokens = 9', 'prompts[1] (id "b")', "`text` or `ids`"),
    "no run name": ('name = "one"', "", "runs[1]: `name` is missing", "name ="),
    "same run name": ('name = "one"', 'name = "all"', 'runs[1] (name "all"): runs[0] has the same', "its own name"),
    "no quick run": ("quick = true", "quick = false", "small.toml: runs: no run is quick", "quick = true"),
    "quick is a number": ("quick = true", "quick = 1", 'runs[0] (name "all"): `quick` is a whole', "quick = true"),
    "batch of none": ("batch_size = 1", "batch_size = 0", 'runs[1] (name "one"): `batch_size` is below 1', "from 1"),
    "batch is a string": ("batch_size = 1", 'batch_size = "1"', "`batch_size` is a string", "batch_size = 4"),
    "order is unknown": ('"A-B-A"', '"B-A"', 'runs[1] (name "one"): `order` is "B-A"', '"suite", "A-B-A"'),
    "views is a string": ('["replay"]', '"replay"', 'runs[1] (name "one"): `views` is a string', "views = ["),
    "views is empty": ('["replay"]', "[]", "`views` is empty", "at least one entry"),
    "view is unknown": ('["replay"]', '["replay", "step"]', '`views[1]` is "step"', '"generate", "replay", "prefill"'),
    "view is a list": ('["replay"]', '[["replay"]]', "`views[0]` is an array", '"generate", "replay", "prefill"'),
    "same view": ('["replay"]', '["replay", "replay"]', '`views` names "replay" twice', "once"),
    "not TOML": ('name = "small"', "name = ", "small.toml: not valid TOML: Invalid value (at line 2", "syntax"),
    "key twice": ('name = "small"', 'name = "small"\nname = "x"', "small.toml: not valid TOML", "syntax"),
    "endless nesting": ('name = "small"', f"name = {'[' * 100_000}", "small.toml: not valid TOML", "syntax"),
    "a number too long": ("tokens = 8", f"tokens = {'9' * 9000}", "small.toml: not valid TOML", "syntax"),
}


@pytest.mark.parametrize(("old", "new", "place", "fix"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(tmp_path, old, new, place, fix):
    """Whatever a suite cannot say is refused in one line with the file, the place and the fix."""
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    message = refusal(load_suite, path)
    assert message.startswith(f"{path}: ")
    assert place in message
    assert fix in message
    assert len(message) < 500 + len(str(path))


@pytest.mark.parametrize("key", ["prompts", "runs"])
@pytest.mark.parametrize(
    ("entries", "problem"),
    [(None, "is missing"), ([], "is empty"), ("x", "is a string"), ({"a": 1}, "is a table")],
)
def test_refuses_a_suite_without_prompts_or_runs(key, entries, problem):
    """No prompts or no runs is refused, however they are not there, with the header to write."""
    data = data_of({"text": "x"})
    del data[key]
    message = refusal(suite_from_dict, data if entries is None else {**data, key: entries}, "golden.json")
    assert message.startswith(f"golden.json: `{key}` {problem}")
    assert "[[" in message or "at least one entry" in message


@pytest.mark.parametrize("key", ["prompts", "runs"])
def test_refuses_an_entry_that_is_no_table(key):
    """An entry of the wrong type is named by its index."""
    message = refusal(suite_from_dict, data_of({"text": "x"}, **{key: [3]}), "golden.json")
    assert message.startswith(f"golden.json: {key}[0]: is a whole number, a table is wanted")


def test_refuses_an_aba_run_of_one_prompt():
    """A-B-A needs a prompt to run in between."""
    runs = [{"name": "all", "quick": True}, {"name": "back", "order": "A-B-A"}]
    message = refusal(suite_from_dict, data_of({"text": "x"}, runs=runs), "made.toml")
    assert message == (
        'made.toml: runs[1] (name "back"): order A-B-A with one prompt. Add a second prompt, or write `order = "suite"`'
    )


def test_refuses_half_a_character():
    """JSON can write half of a surrogate pair; no tokenizer can encode it."""
    message = refusal(suite_from_dict, data_of(json.loads('{"text": "a\\ud83d"}')), "golden.json")
    assert 'golden.json: prompts[0] (id "p0"): `text` holds half a surrogate pair' in message


@pytest.mark.parametrize(("data", "kind"), [(None, "null"), ([], "an array"), ("suite", "a string")])
def test_refuses_data_that_is_no_table(data, kind):
    """A golden whose suite is not an object is refused by the golden's name."""
    assert refusal(suite_from_dict, data, "golden.json").startswith(f"golden.json: is {kind}, a table is wanted")


def test_refuses_a_missing_file_and_names_the_nearest(tmp_path):
    """A misspelt path is answered with the suite that lies there."""
    path = written(tmp_path, GOOD)
    assert refusal(load_suite, tmp_path / "smal.toml").endswith(f"no such suite file. Did you mean {path}?")
    assert refusal(load_suite, tmp_path / "zzz.toml").endswith("no such suite file. There are small.toml")
    assert refusal(load_suite, tmp_path / "none" / "x.toml").endswith("such as prompts/core.toml")


def test_refuses_a_directory(tmp_path):
    """A directory is told from a file, and the fix names a file in it."""
    assert refusal(load_suite, tmp_path).startswith(f"{tmp_path}: is a directory, not a suite file")


def test_refuses_a_path_that_no_file_can_have():
    """A null byte in a path gives a suite error, not a traceback."""
    assert "cannot be read" in refusal(load_suite, "core\0.toml")


def test_refuses_what_is_not_utf8(tmp_path):
    """A file in another encoding is refused with the offset of the first wrong byte."""
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "café"'.encode("latin-1"))
    assert refusal(load_suite, path) == f"{path}: not UTF-8 at byte 11. Save the file as UTF-8"


def test_refuses_a_file_over_four_mebibytes(tmp_path):
    """A file too large to be a suite is refused before it is parsed; one of exactly 4 MiB is read."""
    space = 4 * 2**20 - len(GOOD)
    assert load_suite(written(tmp_path, GOOD + "#" * space)).name == "small"
    path = written(tmp_path, GOOD + "#" * (space + 1))
    assert refusal(load_suite, path) == f"{path}: larger than 4 MiB. Split the suite into several files"


# --- digest and round trip ---------------------------------------------------------------------------

SAME = {
    "a comment": ('stop = "eos"', '# why\nstop = "eos"  # here'),
    "key order": ('name = "small"\ndescription = "for tests"', 'description = "for tests"\nname = "small"'),
    "message key order": (
        '{ role = "user", content = "What is my name?" }',
        '{content="What is my name?",role="user"}',
    ),
    "the description": ('"for tests"', '"other words"'),
    "no description": ('description = "for tests"\n', ""),
    "a run's name": ('name = "one"', 'name = "two"'),
    "a run's batch size": ("batch_size = 1", "batch_size = 2"),
    "a run more": ('[[runs]]\nname = "all"', '[[runs]]\nname = "more"\n\n[[runs]]\nname = "all"'),
}
OTHER = {
    "the name": ('name = "small"', 'name = "smaller"'),
    "the stop": ('stop = "eos"', 'stop = "ignore-eos"'),
    "special tokens": ("add_special_tokens = true", "add_special_tokens = false"),
    "new tokens": ("max_new_tokens = 8", "max_new_tokens = 9"),
    "a prompt's id": ('id = "a"', 'id = "d"'),
    "a prompt's text": ("In the morning", "In the evening"),
    "a message": ("What is my name?", "What do I need?"),
    "a role": ('role = "user"', 'role = "assistant"'),
    "ids": ("[5, 6, 7]", "[5, 7, 6]"),
    "a length": ("repeat_to_tokens = 20", 'repeat_to_tokens = "context-20"'),
    "a prompt's new tokens": ("max_new_tokens = 2", "max_new_tokens = 3"),
    "a prompt more": ('[[prompts]]\nid = "a"', '[[prompts]]\nid = "z"\ntext = "x"\n\n[[prompts]]\nid = "a"'),
}


@pytest.mark.parametrize(("old", "new"), SAME.values(), ids=SAME.keys())
def test_digest_stays(tmp_path, old, new):
    """What cannot change a golden does not change the digest."""
    assert old in GOOD
    before = load_suite(written(tmp_path, GOOD)).digest
    assert load_suite(written(tmp_path, GOOD.replace(old, new, 1))).digest == before


@pytest.mark.parametrize(("old", "new"), OTHER.values(), ids=OTHER.keys())
def test_digest_changes(tmp_path, old, new):
    """Whatever changes a golden changes the digest."""
    assert old in GOOD
    before = load_suite(written(tmp_path, GOOD)).digest
    assert load_suite(written(tmp_path, GOOD.replace(old, new, 1))).digest != before


def test_digest_is_pinned():
    """The digest is written into goldens: a change of how it is made would turn every one of them stale."""
    canonical = (
        '{"add_special_tokens":true,"max_new_tokens":8,"name":"made",'
        '"prompts":[{"id":"p0","text":"\\u00e9"}],"stop":"eos"}'
    )
    assert suite_of({"text": "é"}).digest == hashlib.sha256(canonical.encode()).hexdigest()


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
counts = st.integers(1, 2**31 - 1)
lengths = st.one_of(counts, st.integers(0, 999_999_999).map("context-{}".format))
messages = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=3)
id_lists = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
more = {"max_new_tokens": counts}
prompts = st.one_of(
    st.fixed_dictionaries({"text": texts}, optional={"repeat_to_tokens": lengths, **more}),
    st.fixed_dictionaries({"ids": id_lists}, optional={"repeat_to_tokens": lengths, **more}),
    st.fixed_dictionaries({"messages": messages}, optional=more),
)
views = st.lists(st.sampled_from(["generate", "replay", "prefill"]), min_size=1, max_size=3, unique=True)
runs = st.fixed_dictionaries({"name": names}, optional={"batch_size": counts, "views": views, "quick": st.booleans()})
top = st.fixed_dictionaries(
    {"name": names, "stop": st.sampled_from(["eos", "ignore-eos"]), "add_special_tokens": st.booleans(), **more},
    optional={"description": st.text(st.characters(exclude_categories=["Cs"]))},
)


@st.composite
def suite_data(draw):
    """A suite that is right, as plain data."""
    chosen = draw(st.lists(prompts, min_size=1, max_size=4))
    ids = draw(st.lists(names, min_size=len(chosen), max_size=len(chosen), unique=True))
    entries = draw(st.lists(runs, min_size=1, max_size=3, unique_by=lambda run: run["name"]))
    entries[0]["quick"] = True
    if len(chosen) > 1:
        entries[-1]["order"] = draw(st.sampled_from(["suite", "A-B-A"]))
    return {**draw(top), "prompts": [{"id": i, **p} for i, p in zip(ids, chosen, strict=True)], "runs": entries}


@given(suite_data())
def test_round_trips_through_json(data):
    """Every suite comes back equal, digest and all, from the JSON that a golden holds."""
    suite = suite_from_dict(data, "made.toml")
    again = suite_from_dict(json.loads(json.dumps(suite_to_dict(suite))), "golden.json")
    assert again == suite
    assert suite_to_dict(again) == suite_to_dict(suite)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | names | lengths,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(suite_data(), st.data())
def test_hostile_data_is_a_suite_or_a_suite_error(data, source):
    """Whatever stands in the place of any one value: a suite that round-trips, or one line; never a traceback."""
    where = source.draw(st.sampled_from([data, data["prompts"][0], data["runs"][-1]]))
    where[source.draw(st.sampled_from(sorted(where)) | st.text(max_size=8))] = source.draw(anything)
    message, suite = attempt(data)
    assert (message.startswith("golden.json: ") and len(message.splitlines()) == 1) or attempt(suite_to_dict(suite))[
        1
    ] == suite


def attempt(data):
    """The message of a refusal, or else the suite."""
    try:
        return "", suite_from_dict(data, "golden.json")
    except SuiteError as error:
        return str(error), None


def test_a_digest_in_the_data_is_not_believed():
    """The digest is computed, so that data which brings its own is refused."""
    data = {**suite_to_dict(suite_of({"text": "x"})), "digest": "0" * 64}
    assert 'unknown key "digest"' in refusal(suite_from_dict, data, "golden.json")


# --- resolving -----------------------------------------------------------------------------------------


def test_resolves_text(tokenizer):
    """A text prompt becomes the tokenizer's ids, with the text beside them."""
    (request,) = resolved(suite_of({"text": "At noon Lena paints"}), tokenizer)
    assert request.id == "p0"
    assert request.prompt_ids == tuple(tokenizer("At noon Lena paints")["input_ids"])
    assert request.text == "At noon Lena paints"
    assert request.max_new_tokens == 8


def test_adds_special_tokens_only_where_the_suite_says_so(bos_tokenizer):
    """`add_special_tokens` decides on the beginning-of-sequence token."""
    bos = bos_tokenizer.bos_token_id
    (with_bos,) = resolved(suite_of({"text": "At noon"}), bos_tokenizer)
    (without,) = resolved(suite_of({"text": "At noon"}, add_special_tokens=False), bos_tokenizer)
    assert with_bos.prompt_ids == (bos, *without.prompt_ids)
    assert bos not in without.prompt_ids


def test_resolves_messages_through_the_chat_template(tokenizer):
    """Messages are encoded as the template writes them, up to where the answer begins."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (request,) = resolved(suite_of({"messages": turns}), tokenizer)
    assert request.text == "User: Hi\nAssistant: Hello\nAssistant:"
    assert request.prompt_ids == tuple(tokenizer(request.text)["input_ids"])


def test_resolves_messages_of_transformers_4():
    """Before version 5, a chat template gave a list of ids and no encoding around it."""
    old = SimpleNamespace(
        chat_template="x",
        apply_chat_template=lambda messages, *, add_generation_prompt, tokenize: [5, 6] if tokenize else "x",
    )
    (request,) = resolved(suite_of({"messages": [{"role": "user", "content": "Hi"}]}), old)
    assert request.prompt_ids == (5, 6)


def test_resolves_ids_without_a_tokenizer():
    """Raw ids need no tokenizer, keep no text, and may have their own number of new tokens."""
    (request,) = resolved(suite_of({"ids": [5, 6], "max_new_tokens": 3}), None)
    assert (request.prompt_ids, request.text, request.max_new_tokens) == ((5, 6), None, 3)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 55])
@pytest.mark.parametrize("text", ["soup", "At noon Lena paints a small boat.", "我喜欢汤。", "é"])
def test_repeats_text_to_an_exact_length(tokenizer, bos_tokenizer, text, length):
    """Repeated text has exactly the wanted length, starts as the text alone does, and keeps its first token."""
    suite = suite_of({"text": text, "repeat_to_tokens": length})
    for chosen in (tokenizer, bos_tokenizer):
        (request,) = resolved(suite, chosen)
        whole = chosen(request.text)["input_ids"]
        assert len(request.prompt_ids) == length
        assert request.prompt_ids == tuple(whole[:length])
        assert request.prompt_ids[0] == chosen(text)["input_ids"][0]


def test_repeats_text_no_more_often_than_needed(tokenizer):
    """The text that is kept is the fewest copies, joined by one space, that reach the length."""
    for length in range(1, 50):
        (request,) = resolved(suite_of({"text": "a red house.", "repeat_to_tokens": length}), tokenizer)
        copies = (len(request.text) + 1) // len("a red house. ")
        assert request.text == " ".join(["a red house."] * copies)
        fewer = " ".join(["a red house."] * (copies - 1))
        assert copies == 1 or len(tokenizer(fewer)["input_ids"]) < length


def test_repeats_ids():
    """Ids are repeated as they are and cut to the length."""
    requests = resolved(
        suite_of({"ids": [5, 6, 7], "repeat_to_tokens": 7}, {"ids": [8, 9], "repeat_to_tokens": 1}), None
    )
    assert [request.prompt_ids for request in requests] == [(5, 6, 7, 5, 6, 7, 5), (8,)]


def test_context_lengths_follow_the_model(tokenizer):
    """`context-N` leaves N tokens of whatever context the model has."""
    suite = suite_of({"text": "soup", "repeat_to_tokens": "context-8"}, {"ids": [5], "repeat_to_tokens": "context-9"})
    for context in (16, 64, 300):
        assert [len(r.prompt_ids) for r in resolved(suite, tokenizer, context=context)] == [context - 8, context - 9]


def test_a_model_without_a_stated_context():
    """Where the model states no context every length fits, and a length that is counted from its end is refused."""
    (request,) = resolved(suite_of({"ids": [5], "repeat_to_tokens": 5000}), None, context=None)
    assert len(request.prompt_ids) == 5000
    message = refusal(lambda: resolved(suite_of({"ids": [5], "repeat_to_tokens": "context-8"}), None, context=None))
    assert "tiny states no context length. Write the length as a number" in message


def test_repeating_does_not_warn_of_a_long_text(tokenizer, caplog):
    """A prompt that fills the context makes transformers warn of nothing: what is too long is cut."""
    suite = suite_of({"text": "soup", "repeat_to_tokens": "context-8"})
    (request,) = resolved(suite, tokenizer, context=CONTEXT)
    assert len(request.prompt_ids) == CONTEXT - 8
    assert not caplog.records


# A prompt, a part of the problem that the error names, and a part of its fix; the context is 64 tokens.
UNRESOLVED = {
    "too long": (
        {"ids": [5] * 60},
        "60 tokens and 8 new ones are 68, tiny holds 64",
        "Shorten the prompt to 56 tokens",
    ),
    "one too long": ({"ids": [5] * 57}, "57 tokens and 8 new ones are 65, tiny holds 64", "to 56 tokens"),
    "too many new": ({"ids": [5], "max_new_tokens": 64}, "1 tokens and 64 new ones are 65", "Lower `max_new_tokens`"),
    "repeated too far": ({"text": "soup", "repeat_to_tokens": 57}, "57 tokens and 8 new ones", "to 56 tokens"),
    "repeated beyond memory": ({"ids": [5], "repeat_to_tokens": 2**31 - 1}, "2147483647 tokens and 8", "to 56 tokens"),
    "fills too much": ({"text": "soup", "repeat_to_tokens": "context-7"}, "57 tokens and 8 new ones", "to 56 tokens"),
    "no context left": ({"text": "x", "repeat_to_tokens": "context-64"}, "leaves 0 tokens, tiny holds 64", "below 64"),
    "unknown id": ({"ids": [5, 1021]}, "token id 1021 is not one of the 1021 of tiny", "Use ids below 1021"),
    "no such role": ({"messages": [{"role": "system", "content": "x"}]}, "only the roles user and assistant", "roles"),
}


@pytest.mark.parametrize(("prompt", "problem", "fix"), UNRESOLVED.values(), ids=UNRESOLVED.keys())
def test_refuses_to_resolve(tokenizer, prompt, problem, fix):
    """A prompt that the model cannot take is refused with suite, prompt, model, numbers and fix; none is cut."""
    message = refusal(resolved, suite_of({"text": "fits"}, prompt), tokenizer)
    assert message.startswith('suite "made": prompt "p1": ')
    assert "tiny" in message
    assert problem in message
    assert fix in message


def test_a_prompt_that_just_fits_is_resolved():
    """Prompt and new tokens may fill the context to its last token."""
    (request,) = resolved(suite_of({"ids": [5] * 56}), None)
    assert len(request.prompt_ids) == 56


@pytest.mark.parametrize("prompt", [{"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}])
def test_refuses_text_without_a_tokenizer(prompt):
    """Text for a model that comes without a tokenizer is refused; the fix is a tokenizer, or ids."""
    message = refusal(resolved, suite_of({"ids": [5]}, prompt), None)
    assert 'prompt "p1": it is text, and tiny comes without a tokenizer' in message
    assert "as `ids`" in message


def test_refuses_messages_without_a_chat_template():
    """Messages for a tokenizer without a chat template are refused, not joined by guess."""
    plain = wrapped(adds_bos=False)
    plain.chat_template = None
    message = refusal(resolved, suite_of({"messages": [{"role": "user", "content": "x"}]}), plain)
    assert "the tokenizer of tiny has no chat template" in message
    assert "write the prompt as `text`" in message


def silent(text, *, add_special_tokens, verbose):
    """A tokenizer whose normalizer leaves nothing of any text."""
    return {"input_ids": [1] if add_special_tokens else []}


def test_refuses_text_that_gives_no_tokens():
    """A prompt of no tokens cannot be run."""
    message = refusal(resolved, suite_of({"text": " "}, add_special_tokens=False), silent)
    assert "the tokenizer of tiny makes no token of it" in message


def test_refuses_to_repeat_text_that_does_not_grow():
    """Text of which no copy adds a token ends in an error, not in an endless loop."""
    message = refusal(resolved, suite_of({"text": " ", "repeat_to_tokens": 9}), silent)
    assert "copies of the text are 1 tokens, 9 are wanted" in message


# --- tokenizer digest ------------------------------------------------------------------------------------


def test_tokenizer_digest_tells_tokenizers_apart(tokenizer, bos_tokenizer):
    """Other merges, special tokens or another chat template are another digest; no tokenizer has none."""
    other = wrapped(adds_bos=False, seed=4)
    silent_chat = wrapped(adds_bos=False)
    assert tokenizer_digest(silent_chat) == tokenizer_digest(tokenizer)
    silent_chat.chat_template = None
    digests = {tokenizer_digest(each) for each in (tokenizer, bos_tokenizer, other, silent_chat)}
    assert len(digests) == 4
    assert tokenizer_digest(None) is None


def test_tokenizer_digest_survives_use():
    """Padding and truncating a batch leaves traces in the backend, and none in the digest."""
    used = wrapped(adds_bos=False)
    before = tokenizer_digest(used)
    used(["soup", "a red house and a green hill"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(used) == before


def test_tokenizer_digest_survives_saving(tmp_path, tokenizer):
    """A tokenizer that is saved and loaded again keeps its digest."""
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)


# --- the suites of this repository -----------------------------------------------------------------------


def shipped(name):
    """A suite of this repository by its name."""
    return load_suite(PROMPTS / f"{name}.toml")


def test_every_shipped_suite_is_tested():
    """The suites named here are those in prompts/, each under its file's name."""
    assert tuple(sorted(path.stem for path in PROMPTS.glob("*.toml"))) == SHIPPED
    assert tuple(shipped(name).name for name in SHIPPED) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suite_resolves(name, tokenizer, bos_tokenizer):
    """Each suite fits the small models' context, with and without a first special token; no prompt is there twice."""
    suite = shipped(name)
    for chosen in (tokenizer, bos_tokenizer):
        requests = resolved(suite, chosen, context=CONTEXT)
        assert len({request.prompt_ids for request in requests}) == len(suite.prompts)


def test_core_has_long_prompts(tokenizer):
    """The core suite reaches past 500 tokens in five prompts, and has both short ones and a conversation."""
    requests = resolved(shipped("core"), tokenizer, context=CONTEXT)
    assert sum(len(request.prompt_ids) > 500 for request in requests) == 5
    assert min(len(request.prompt_ids) for request in requests) < 10
    assert 24 <= len(requests) <= 26
    assert sum(prompt.messages is not None for prompt in shipped("core").prompts) == 1


def test_completion_rows_are_openings_of_sixteen_tokens(tokenizer):
    """The completion suite is 100 texts, each cut to its first 16 tokens and none repeated to reach them."""
    requests = resolved(shipped("completion"), tokenizer, context=CONTEXT)
    assert [len(request.prompt_ids) for request in requests] == [16] * 100
    assert [request.text for request in requests] == [prompt.text for prompt in shipped("completion").prompts]


def test_edge_fills_the_context(tokenizer):
    """The edge suite has a prompt of one token, and two that end at the context's last token."""
    requests = {request.id: request for request in resolved(shipped("edge"), tokenizer, context=CONTEXT)}
    assert len(requests["one-token"].prompt_ids) == 1
    filled = [r for r in requests.values() if len(r.prompt_ids) + r.max_new_tokens == CONTEXT]
    assert sorted(request.max_new_tokens for request in filled) == [1, 8]


def test_translate_prompts_are_prefixes():
    """The translate suite's prompts are prefixes of the load test's sentence, the whole of it among them."""
    texts = [prompt.text for prompt in shipped("translate").prompts]
    assert texts[-1] == "Translate to chinese. EN: I like soup. CN: "
    assert all(texts[-1].startswith(text) for text in texts)
