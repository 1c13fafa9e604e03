import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.engines import ENGINES, build_engine, hf, spec, target
from harness.errors import UsageError

READERS = {"size": spec.positive, "fast": spec.flag, "kernel": spec.one_of("eager", "sdpa"), "where": str}


def refusal(call, *args, **kwargs):
    """The error of a refused call: one line that ends in its fix."""
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).endswith(caught.value.fix)
    return caught.value


# --- parsing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "engine", "options"),
    [
        ("hf", "hf", {}),
        ("hf:", "hf", {}),
        (" hf:dtype=bfloat16 ", "hf", {"dtype": "bfloat16"}),
        ("hf:dtype=bfloat16,attn=sdpa", "hf", {"dtype": "bfloat16", "attn": "sdpa"}),
        ("hf: dtype = bfloat16 , attn = sdpa", "hf", {"dtype": "bfloat16", "attn": "sdpa"}),
        ("hf:device=cuda:0", "hf", {"device": "cuda:0"}),
        ("hf:model=a=b", "hf", {"model": "a=b"}),
        ("hf:model='a,b: c'", "hf", {"model": "a,b: c"}),
        ('hf:model="it\'s here",batch=2', "hf", {"model": "it's here", "batch": "2"}),
        ("hf:model=''", "hf", {"model": ""}),
        (r"hf:model=C:\models\x", "hf", {"model": r"C:\models\x"}),
        ("hf:model=a#b", "hf", {"model": "a#b"}),
        ("hf:model=/home/me/my model", "hf", {"model": "/home/me/my model"}),
        ("hf:batch=1,,", "hf", {"batch": "1"}),
    ],
)
def test_parses(text, engine, options):
    """Engine and options are read as written; quotes keep commas, nothing else is special."""
    parsed = spec.parse_spec(text)
    assert (parsed.engine, dict(parsed.options)) == (engine, options)
    assert parsed.text == text.strip()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no engine"),
        ("   ", "names no engine"),
        (":dtype=float32", "names no engine"),
        ("hf:float32", "'float32' in the spec 'hf:float32' is not key=value"),
        ("hf:=float32", "is not key=value"),
        ("hf:dtype=float32,batch", "'batch' in the spec"),
        ("hf:dtype=float32,dtype=float32", "gives 'dtype' twice"),
        ("hf:dtype=float32, dtype=float16", "gives 'dtype' twice"),
        ("hf:model='a", "has an open quote"),
        ('hf:model="a', "has an open quote"),
    ],
)
def test_refuses(text, problem):
    """What cannot be read is named, in one line with its fix."""
    assert problem in refusal(spec.parse_spec, text).problem


@pytest.mark.parametrize(
    ("text", "target", "options"),
    [
        ("py:port:build", "port:build", {}),
        (" py:my_pkg.port:Ports.build ", "my_pkg.port:Ports.build", {}),
        ("py:port:build?", "port:build", {}),
        ("py:port:build?dtype=bfloat16", "port:build", {"dtype": "bfloat16"}),
        ("py:port:build?dtype=bfloat16&device=cuda:1&batch=4", "port:build",
         {"dtype": "bfloat16", "device": "cuda:1", "batch": "4"}),
        ("py:port:build?model=a,b?c=d", "port:build", {"model": "a,b?c=d"}),
        ("py:port:build?model='a&b'&batch=2", "port:build", {"model": "a&b", "batch": "2"}),
        ("py", "", {}),
        ("py:port", "port", {}),
    ],
)  # fmt: skip
def test_parses_a_target(text, target, options):
    """Everything up to the question mark is the target, and the options are joined by ampersands."""
    parsed = spec.parse_spec(text)
    assert (parsed.engine, parsed.target, dict(parsed.options)) == ("py", target, options)
    assert spec.parse_spec("hf:dtype=float32").target == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("py:port:build?bfloat16", "'bfloat16' in the spec 'py:port:build?bfloat16' is not key=value"),
        ("py:port:build?batch=1&batch=2", "gives 'batch' twice"),
        ("py:port:build?model='a", "has an open quote"),
    ],
)
def test_refuses_options_of_a_target(text, problem):
    """What cannot be read after the question mark is named as elsewhere, with an example of such a spec."""
    assert problem in refusal(spec.parse_spec, text).problem


_NAME = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="_"), min_size=1, max_size=8)
_VALUE = st.text(st.characters(exclude_characters="'", exclude_categories=["Cs", "Cc"]), max_size=20).map(str.strip)


@given(engine=_NAME, options=st.dictionaries(_NAME, _VALUE, max_size=4))
@example(engine="hf", options={"model": ',="#\\:'})
@settings(deadline=None)
def test_round_trip(engine, options):
    """Whatever stands between quotes comes back as it was, for any number of options."""
    text = f"{engine}:" + ",".join(f"{key}='{value}'" for key, value in options.items())
    parsed = spec.parse_spec(text)
    assert (parsed.engine, dict(parsed.options)) == (engine, options)


@given(target=_NAME, options=st.dictionaries(_NAME, _VALUE, max_size=4))
@settings(deadline=None)
def test_round_trip_of_a_target(target, options):
    """The same for the options of a target."""
    text = f"py:{target}:{target}?" + "&".join(f"{key}='{value}'" for key, value in options.items())
    parsed = spec.parse_spec(text)
    assert (parsed.target, dict(parsed.options)) == (f"{target}:{target}", options)


@given(text=st.text(max_size=30) | st.text(max_size=30).map("py:{}".format))
@settings(deadline=None)
def test_any_text_is_a_spec_or_a_usage_error(text):
    """No text ends in a traceback."""
    try:
        parsed = spec.parse_spec(text)
    except UsageError:
        return
    assert parsed.engine


# --- options ---------------------------------------------------------------------------------------


def test_reads_values():
    """Each option is converted by its own reader."""
    parsed = spec.parse_spec("x:size=12,fast=true,kernel=sdpa,where=there")
    assert spec.read_options(parsed, READERS) == {"size": 12, "fast": True, "kernel": "sdpa", "where": "there"}


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("size=0", "a whole number from 1 to 1048576"),
        ("size=-1", "a whole number"),
        ("size=1048577", "a whole number"),
        ("size=1.5", "a whole number"),
        ("size=٣", "a whole number"),
        ("size=", "a whole number"),
        ("size=" + "9" * 5000, "a whole number"),
        ("fast=yes", "true or false"),
        ("fast=True", "true or false"),
        ("kernel=flash", "one of eager, sdpa"),
    ],
)
def test_refuses_values(option, wanted):
    """A refused value is named with its key, and the fix says what the key takes."""
    error = refusal(spec.read_options, spec.parse_spec(f"x:{option}"), READERS)
    assert option.partition("=")[0] in error.problem
    assert wanted in error.fix


def test_suggests_the_closest_key():
    """A mistyped key is answered with the one that was meant, and with all there are."""
    error = refusal(spec.read_options, spec.parse_spec("x:kernal=sdpa"), READERS)
    assert error.problem == "the engine 'x' has no key 'kernal'"
    assert error.fix == "Did you mean 'kernel'? There are: fast, kernel, size, where"


def test_suggests_nothing_far_away():
    """Where nothing is close only the list is given."""
    assert spec.suggest("zzz", READERS) == "There are: fast, kernel, size, where"


# --- engines by name -------------------------------------------------------------------------------


def test_builds_an_engine_without_opening_it():
    """An engine is made from its spec alone; the model need not be there yet."""
    engine = build_engine("hf:dtype=bfloat16,batch=2", model="nowhere")
    assert isinstance(engine, hf.HFEngine)
    assert engine.spec == "hf:dtype=bfloat16,batch=2"
    assert (engine.options.model, engine.options.dtype, engine.options.batch) == ("nowhere", "bfloat16", 2)
    assert dict(engine.declared) == {"dtype": "bfloat16", "batch": 2, "device": "cpu"}


def test_declares_what_can_be_read_back():
    """A quantiser that is applied and a chunk size are promises; a rounding and what is shown are not."""
    declared = build_engine("hf:weights=int4,chunk=64,show=top,quantised=int8", model="nowhere").declared
    assert dict(declared) == {"weights": "int4", "chunk": 64, "device": "cpu"}
    assert dict(build_engine("hf:weights=float16", model="nowhere").declared) == {"device": "cpu"}


def test_the_specs_model_wins():
    """A model named in the spec is used in place of the one given beside it."""
    assert build_engine("hf:model=mine", model="other").options.model == "mine"


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("hff", "there is no engine 'hff'", "Did you mean 'hf'?"),
        ("hf:dtyp=float32", "no key 'dtyp'", "Did you mean 'dtype'?"),
        ("hf:dtype=float23", "dtype='float23'", "float32"),
        ("hf:static_cache=1", "static_cache='1'", "true or false"),
        ("hf:weights=int5", "weights='int5'", "int8, int4"),
        ("hf:quantised=int4-32", "quantised='int4-32'", "e.g. int4-g128"),
        ("hf:quantised=", "quantised=''", "e.g. int4-g128"),
        ("hf:chunk=0", "chunk='0'", "a whole number from 1"),
        ("hf:show=all", "show='all'", "one of logits, top, tokens"),
    ],
)
def test_unknown_engine_key_and_value(text, problem, fix):
    """Each mistake in a spec is one line that names it and its fix."""
    error = refusal(build_engine, text, model="nowhere")
    assert problem in error.problem
    assert fix in error.fix


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("py", "names no target", "py:MODULE:FUNCTION"),
        ("py:?dtype=float32", "names no target", "e.g. py:my_pkg.port:build"),
        ("py:port", "'port' of the spec 'py:port' is not MODULE:FUNCTION", "options follow a question mark"),
        ("py:port:", "is not MODULE:FUNCTION", "options follow a question mark"),
        ("py::build", "is not MODULE:FUNCTION", "options follow a question mark"),
        ("py:.port:build", "is not MODULE:FUNCTION", "options follow a question mark"),
        ("py:port:build()", "is not MODULE:FUNCTION", "options follow a question mark"),
        ("py:port:build,dtype=float32", "is not MODULE:FUNCTION", "options follow a question mark"),
        ("py:my-port:build", "is not MODULE:FUNCTION", "options follow a question mark"),
        ("py:port.py:build", "'port.py' in the spec 'py:port.py:build' is a file", "without .py"),
        ("py:pkg/port:build", "is a file", "with dots"),
        ("py:port:build?dtyp=float32", "no key 'dtyp'", "Did you mean 'dtype'?"),
        ("py:port:build?target=a:b", "no key 'target'", "There are: batch, deterministic, device"),
        ("py:port:build?dtype=int8", "dtype='int8'", "float32"),
        ("py:port:build?batch=0", "batch='0'", "a whole number"),
        ("py:port:build?deterministic=yes", "deterministic='yes'", "true or false"),
    ],
)
def test_a_target_that_cannot_be_one(text, problem, fix):
    """The form of a target is looked at when the engine is made, without importing anything."""
    error = refusal(build_engine, text)
    assert problem in error.problem
    assert fix in error.fix


def test_a_port_declares_what_its_spec_says():
    """Settings that the spec names are promises; what it does not name is none."""
    engine = build_engine("py:port:build?dtype=bfloat16&device=cuda:1&batch=4&threads=2&deterministic=true", model="m")
    assert isinstance(engine, target.PyEngine)
    assert dict(engine.declared) == {"dtype": "bfloat16", "device": "cuda", "batch": 4, "threads": 2}
    assert (engine.options.target, engine.options.model, engine.options.deterministic) == ("port:build", "m", True)
    assert dict(build_engine("py:port:build").declared) == {}
    assert build_engine("py:port:build?model=mine", model="other").options.model == "mine"


def test_an_engine_without_its_packages_says_so(monkeypatch):
    """Where a package is missing the engine is refused, with what to install."""
    entry = ENGINES["hf"]
    missing = type(entry)(build=entry.build, summary=entry.summary, packages=("torch", "no_such_package"))
    monkeypatch.setitem(ENGINES, "hf", missing)
    error = refusal(build_engine, "hf", model="nowhere")
    assert error.fix == "To use it, install no_such_package"
