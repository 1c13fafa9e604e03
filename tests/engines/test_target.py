import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from harness.engines import Engine, build_engine
from harness.errors import EngineError, ModelError, UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Status
from tests.engines.ports import REQUESTS
from tests.engines.recorder import recorded

GOLDEN = "golden/small/small"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module into the working directory, and forgets it afterwards; returns its name."""
    made = []
    known = set(sys.modules)

    def write(text, name=None):
        name = name or f"port_under_test_{len(known)}_{len(made)}"
        file = Path(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        made.append(name.partition(".")[0])
        return name

    if "home" not in str(Path.cwd()):
        monkeypatch.chdir(tmp_path)
    yield write
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in made:
            del sys.modules[name]


# --- a port that a spec names ----------------------------------------------------------------------

PORT = """
import torch
from transformers import AutoModelForCausalLM, DynamicCache

def build(path, *, dtype, device):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    {change}
    return {what}

def around(model):
    def forward(input_ids, position_ids, attention_mask, cache):
        past = DynamicCache() if cache is None else cache
        output = model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, past_key_values=past
        )
        return output.logits, past
    return forward
"""
SWAP = "model.model.layers[0].self_attn.o_proj.weight.data[:, [0, 9]] *= 1.5"
FORWARD = "def forward(input_ids):\n    return TABLE[input_ids]\n"
TABLE = "import torch\nTABLE = torch.eye(7)\n"


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("what", ["model", "around(model)"])
def test_a_spec_names_a_port(home, written, what, broken):
    """A module in the working directory is imported, built from the golden's own model, and judged."""
    name = written(PORT.format(change=SWAP if broken else "pass", what=what))
    spec = f"py:{name}:build?dtype=bfloat16"
    verdict = harness.check(GOLDEN, spec)
    assert verdict.ok is not broken, str(verdict)
    assert verdict.candidate == spec
    assert verdict.settings["dtype"] == "bfloat16"
    asked = {answer.question: answer.status for answer in verdict.answers}
    # A transformers model is run as `hf` runs it, and can be widened.
    assert verdict.settings["engine"] == ("hf" if what == "model" else "py")
    assert (asked["function"] is Status.UNMEASURED) == (what != "model")


def test_a_promise_that_is_not_held_is_structural(home, written):
    """What is built in another dtype than the spec says, or shows logits in a narrower one, is found out."""
    name = written(PORT.format(change="model = model.to(torch.float16)", what="model"))
    verdict = harness.check(GOLDEN, f"py:{name}:build?dtype=float32")
    assert verdict.status is Status.STRUCTURAL
    assert "dtype=float32, but dtype=float16 is in force" in str(verdict)
    name = written(PORT.format(change="model = model.half()", what="around(model)"))
    verdict = harness.check(GOLDEN, f"py:{name}:build?dtype=float32")
    assert verdict.status is Status.STRUCTURAL
    assert "dtype=float32, but dtype=float16 is in force" in str(verdict)


def test_a_batch_that_cannot_be_padded_is_no_batch(written):
    """A spec that promises a batch size to a port without a mask promises too much."""
    name = written(f"{TABLE}{FORWARD}def build(): return forward")
    with build_engine(f"py:{name}:build?batch=4") as engine:
        assert engine.declared["batch"] == 4
        assert engine.settings["batch"] == 1


@pytest.mark.parametrize(
    ("claim", "wanted"), [("", set()), ("?deterministic=true", {"deterministic"}), ("?deterministic=false", set())]
)
def test_deterministic_is_a_claim_of_the_spec(written, claim, wanted):
    """A port promises the same bits only where its spec says so."""
    name = written(f"{TABLE}{FORWARD}def build(): return forward")
    with build_engine(f"py:{name}:build{claim}") as engine:
        assert engine.capabilities == {"logits"} | wanted


RECORDS = "import torch\nSEEN = []\n" + FORWARD.replace("TABLE", "torch.eye(301)")


@pytest.mark.parametrize(
    ("signature", "seen", "wanted"),
    [
        ("path, *, dtype, device", "path, dtype, device", (Path("."), torch.float16, "cpu")),
        ("path, dtype=None, device=None", "path, dtype, device", (Path("."), torch.float16, "cpu")),
        ("path, **options", "path, sorted(options)", (Path("."), ["device", "dtype"])),
        ("*, path, dtype", "path, dtype", (Path("."), torch.float16)),
        ("dtype", "dtype", torch.float16),
        ("where, dtype, threads=3", "where, dtype, threads", (Path("."), torch.float16, 3)),
        ("*places, dtype", "places, dtype", ((Path("."),), torch.float16)),
    ],
)
def test_build_gets_what_it_takes(written, signature, seen, wanted):
    """Path, dtype and device in whichever way the function asks for them."""
    name = written(f"{RECORDS}def build({signature}):\n    SEEN.append(({seen}))\n    return forward")
    with build_engine(f"py:{name}:build?dtype=float16&model=."):
        seen_by_build = sys.modules[name].SEEN
    assert seen_by_build == [wanted]


def test_build_gets_float32_and_the_cpu_where_nothing_is_said(written):
    """The defaults: no path, float32, the CPU."""
    name = written(
        f"{RECORDS}def build(path, *, dtype, device):\n    SEEN.append((path, dtype, device))\n    return forward"
    )
    with build_engine(f"py:{name}:build") as engine:
        seen = sys.modules[name].SEEN
        assert seen == [(None, torch.float32, "cpu")]
        assert engine.declared == {}
        assert engine.directory is None


@pytest.mark.parametrize("option", ["dtype=float16", "device=cpu"])
def test_an_empty_promise_is_refused(written, option):
    """A setting that the function does not take, and that nothing shows, cannot be in the spec; a module shows it."""
    name = written(f"{RECORDS}def build(path): return forward")
    key = option.partition("=")[0]
    with pytest.raises(UsageError, match=f"takes no {key}, so {option} would be an empty promise"):
        build_engine(f"py:{name}:build?{option}").__enter__()
    module = "class Port(torch.nn.Linear):\n    def forward(self, input_ids): return self.weight[input_ids]\n"
    name = written(f"{RECORDS}{module}def build(path): return Port(5, 7)")
    with build_engine(f"py:{name}:build?{option}") as engine:
        assert engine.settings["dtype"] == "float32"
    own = "forward.settings = {'dtype': 'float16'}\n"
    name = written(f"{RECORDS}{own}def build(path): return forward")
    with build_engine(f"py:{name}:build?dtype=float16") as engine:
        assert engine.settings["dtype"] == "float16"


def test_an_engine_that_is_built_is_used_and_closed(written):
    """An Engine is run as it is, and its own context manager opens and closes it."""
    source = (
        f"{RECORDS}from harness.engines.port import from_object\n"
        "class Mine(type(from_object(forward))):\n"
        "    def __exit__(self, *error):\n        SEEN.append('closed')\n        super().__exit__(*error)\n"
        "def build(): return Mine(forward, text='mine')\n"
    )
    name = written(source)
    with build_engine(f"py:{name}:build?batch=3") as engine:
        assert isinstance(engine.inner, Engine)
        assert engine.spec == f"py:{name}:build?batch=3"
        assert engine.limits == engine.inner.limits
        assert sys.modules[name].SEEN == []
        assert len(recorded(engine, "prefill", REQUESTS[1:2], [(1, 2)])) == 2
    assert sys.modules[name].SEEN == ["closed"]


def test_dots_on_both_sides(written):
    """Packages before the colon, attributes of classes after it; a class builds its instance."""
    source = f"{TABLE}class Port:\n    def __call__(self, input_ids): return TABLE[input_ids]\n"
    source += "class Ports:\n    @staticmethod\n    def build(): return Port()\n"
    name = written(source, "package_under_test.inner.port")
    for target in ("Ports.build", "Port"):
        with build_engine(f"py:{name}:{target}") as engine:
            assert engine.vocabulary == 7
            assert engine.settings["model"] == "Port"


# --- importing -------------------------------------------------------------------------------------


def test_nothing_is_imported_before_it_is_opened(written):
    """Making the engine executes nothing of the user's, and neither does a check of another golden's path."""
    name = written("raise RuntimeError('imported')")
    engine = build_engine(f"py:{name}:build")
    assert name not in sys.modules
    with pytest.raises(EngineError, match=r"fails \(RuntimeError: imported\)"):
        engine.__enter__()


def test_only_the_users_module_is_left(written):
    """After an engine was open, the module path is as before, and no module but the user's is there."""
    warm = written(f"{RECORDS}def build(): return forward")
    with build_engine(f"py:{warm}:build"):
        pass
    name = written(f"{RECORDS}def build(): return forward")
    path, loaded = list(sys.path), set(sys.modules)
    with build_engine(f"py:{name}:build"):
        assert sys.path[0] == str(Path.cwd()) or {"", str(Path.cwd())} & set(path)
    assert sys.path == path
    assert set(sys.modules) - loaded == {name}
    broken = written(f"{RECORDS}def build(): return 1 / 0")
    with pytest.raises(ZeroDivisionError):
        build_engine(f"py:{broken}:build").__enter__()
    assert sys.path == path


def test_what_is_imported_later_is_found_too(written):
    """A port may import its neighbours when it is called: the working directory stays on the path until then."""
    helper = written(TABLE)
    forward = f"    def forward(input_ids):\n        import {helper}\n        return {helper}.TABLE[input_ids]\n"
    name = written(f"def build():\n{forward}    return forward")
    with build_engine(f"py:{name}:build") as engine:
        assert engine.vocabulary == 7


@pytest.mark.parametrize(
    ("source", "target", "error", "problem", "fix"),
    [
        ("", "no_such_module:build", UsageError, "there is no module 'no_such_module'", "working directory"),
        ("", "{name}.inner:build", UsageError, "there is no module '{name}.inner'", "working directory"),
        ("def build(path): ...", "{name}:biuld", UsageError, "has no attribute 'biuld'", "Did you mean 'build'?"),
        ("build = 7", "{name}:build", UsageError, "is a int, not a function", "Name the function"),
        ("import no_such_module", "{name}:build", EngineError, "No module named 'no_such_module'", "import {name}"),
        ("1 / 0", "{name}:build", EngineError, "fails (ZeroDivisionError: division by zero)", "import {name}"),
        ("def (", "{name}:build", EngineError, "fails (SyntaxError", "import {name}"),
        ("import sys; sys.exit(3)", "{name}:build", EngineError, "fails (SystemExit: 3)", "import {name}"),
        ("def build(): ...", "{name}:build", EngineError, "returned None", "Return a transformers model"),
        ("def build(path, size): ...", "{name}:build", UsageError, "missing a required argument: 'size'", "build(path"),
        (FORWARD, "{name}:forward", UsageError, "is a port itself", "build(path, *, dtype, device)"),
        ("import torch\nport = torch.nn.ReLU()", "{name}:port", UsageError, "is a port itself", "build(path"),
    ],
)
def test_what_a_target_can_be_wrong_in(written, source, target, error, problem, fix):
    """Each mistake is one line when the engine is opened, with its fix; nothing of it is seen before."""
    name = written(source)
    engine = build_engine("py:" + target.format(name=name))
    with pytest.raises(error) as caught:
        engine.__enter__()
    assert problem.format(name=name) in caught.value.problem
    assert fix.format(name=name) in caught.value.fix
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_or_a_device_that_is_not_there(written):
    """The path and the device are looked at before the user's function is called."""
    name = written(f"{RECORDS}def build(path): SEEN.append(path)")
    with pytest.raises(ModelError, match="there is no model at nowhere"):
        build_engine(f"py:{name}:build?model=nowhere").__enter__()
    with pytest.raises(UsageError, match="the device 'gpu' cannot be used"):
        build_engine(f"py:{name}:build?device=gpu").__enter__()
    assert sys.modules[name].SEEN == []


def test_a_namesake_from_elsewhere_is_not_run_in_its_place(written, monkeypatch):
    """Where a module of this name was imported from another directory, Python would run that one: it is refused."""
    name = written(f"{RECORDS}def build(): return forward")
    with build_engine(f"py:{name}:build"):
        pass
    Path("other").mkdir()
    monkeypatch.chdir("other")
    written("def build(): raise AssertionError('not run')", name)
    with pytest.raises(UsageError, match=r"was imported from .* already"):
        build_engine(f"py:{name}:build").__enter__()


def test_a_check_says_what_is_wrong_with_a_spec(home, written):
    """Bad input ends a check as bad input, a module that fails as an engine that failed."""
    with pytest.raises(UsageError, match="there is no module"):
        harness.check(GOLDEN, "py:no_such_module:build")
    verdict = harness.check(GOLDEN, f"py:{written('1 / 0')}:build")
    assert verdict.status is Status.ERROR
    assert "ZeroDivisionError" in str(verdict)


def test_a_numpy_reference_can_be_run_over(written):
    """What records a foreign reference has what it needs: greedy tokens and rows of a port in numpy, no cache."""
    name = written(
        "import numpy as np\n"
        "TABLE = np.random.default_rng(0).standard_normal((301, 301))\n"
        "def build():\n    return lambda input_ids: TABLE[input_ids.numpy()]\n"
    )
    table = np.random.default_rng(0).standard_normal((301, 301))
    with build_engine(f"py:{name}:build") as engine:
        texts = engine.continue_greedily(REQUESTS, batch_size=None, stop_ids=frozenset())
        sketcher = Sketcher(engine.vocabulary)
        engine.prefill(REQUESTS, [text.tokens for text in texts], batch_size=None, sketcher=sketcher)
        rows = sketcher.rows()
    for request, text in zip(REQUESTS, texts, strict=True):
        token = request.prompt_ids[-1]
        for shown in text.tokens:
            token = int(table[token].argmax())
            assert shown == token
        assert len(text.tokens) == request.max_new_tokens
    assert rows.argmax[rows.generated].tolist() == [token for text in texts for token in text.tokens]
