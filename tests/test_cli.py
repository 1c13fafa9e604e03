"""The command: what users get wrong ends in one clear line, exit code 2 or 3, and a directory as it was."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import engines, reference_model
from harness.arrays import ARRAYS_NAME
from harness.engines.hf import HFEngine
from harness.models.recipes import RECIPES
from harness.store import JSON_NAME, read_golden
from tests.commands import Ended, listing, refused, runner
from tests.killing import ROOT, Forks
from tests.support import read_json, write_model

GOLDEN = "golden/small/small"
RECORD = ("record", "--model", "golden/small/model", "--suite", "prompts/small.toml", "--out")
COMMANDS = ((), ("check",), ("locate",), ("record",), ("models",), ("models", "list"), ("models", "build"),
            ("models", "table"),
            ("run",), ("compare",), ("gate",), ("bench",), ("lint",), ("power",), ("convert",), ("doctor",),
            ("schema",))  # fmt: skip


@pytest.fixture
def harness(monkeypatch, capsys):
    """Run the command in this process, as the entry point does."""
    return runner(monkeypatch, capsys)


# --- without torch -----------------------------------------------------------------------------

#: Usage errors, and words of the line that each gives.
MISTAKES = {
    "unknown engine": (("check", GOLDEN, "-c", "hff"), ("no engine 'hff'", "Did you mean 'hf'?")),
    "an engine of nobody": (("check", GOLDEN, "-c", "zzz:dtype=float32"), ("no engine 'zzz'", "There are: ", "hf")),
    "unknown key": (("check", GOLDEN, "-c", "hf:dtpye=float32"), ("no key 'dtpye'", "Did you mean 'dtype'?")),
    "unknown value": (("check", GOLDEN, "-c", "hf:dtype=bf16"), ("dtype='bf16'", "bfloat16, float16")),
    "unknown attention": (("check", GOLDEN, "-c", "hf:attn=flash"), ("attn='flash'", "eager, sdpa")),
    "no flag": (("check", GOLDEN, "-c", "hf:compile=yes"), ("compile='yes'", "true or false")),
    "no number": (("check", GOLDEN, "-c", "hf:batch=many"), ("batch='many'", "a whole number from 1")),
    "batch of zero": (("check", GOLDEN, "-c", "hf:batch=0"), ("batch='0'", "a whole number from 1")),
    "too many threads": (("check", GOLDEN, "-c", "hf:threads=9999999999"), ("threads=", "a whole number from 1")),
    "no engine": (("check", GOLDEN, "-c", ":dtype=float32"), ("names no engine", "hf:dtype=bfloat16")),
    "an empty spec": (("check", GOLDEN, "-c", ""), ("names no engine", "hf:dtype=bfloat16")),
    "no equals sign": (("check", GOLDEN, "-c", "hf:float32"), ("'float32'", "is not key=value")),
    "a key twice": (("check", GOLDEN, "-c", "hf:batch=1,batch=2"), ("gives 'batch' twice", "Keep one")),
    "an open quote": (("check", GOLDEN, "-c", "hf:model='a"), ("open quote", "Close it")),
    "a line break": (("check", GOLDEN, "-c", "h\nf"), ("no engine",)),
    "the second of two": (("check", GOLDEN, "-c", "hf", "-c", "hff"), ("no engine 'hff'",)),
    "no candidate": (("check", GOLDEN), ("no candidate was given", "-c hf:dtype=bfloat16")),
    "no golden": (("check", "-c", "hf"), ("either one golden or --all",)),
    "both": (("check", GOLDEN, "--all"), ("either one golden or --all",)),
    "all with a candidate": (("check", "--all", "-c", "hf"), ("--all takes its candidates from",)),
    "all with a reference": (("check", "--all", "--reference", "x"), ("--all takes its candidates from",)),
    "an unknown quantiser": (("check", GOLDEN, "-c", "hf:quantised=gptq"), ("quantised='gptq'", "e.g. int4-g128")),
    "unknown weights": (("check", GOLDEN, "-c", "hf:weights=int3"), ("weights='int3'", "int8, int4")),
    "unknown show": (("check", GOLDEN, "-c", "hf:show=text"), ("show='text'", "logits, top, tokens")),
    "all with a trace": (("check", "--all", "--trace", "x"), ("--all takes its candidates from",)),
    "two reports to one place": (
        ("check", GOLDEN, "-c", "hf", "--json", "-", "--junit", "-"),
        ("two reports cannot both go", "Name a file"),
    ),
    "a report nowhere": (("check", GOLDEN, "-c", "hf", "--junit", "no/where.xml"), ("--junit no/where.xml", "Make it")),
    "a model without a suite": (("record", "--model", "x", "--out", "y"), ("--model and --suite go together",)),
    "nothing to record": (("record", "--out", "y"), ("nothing to record from", "--model DIR")),
    "parallel of an update": (
        ("record", "--update", "--out", "y", "--tensor-parallel", "2"),
        ("keeps the floors that are there",),
    ),
    "a run of nothing": (("run", "hf", "--trace", "x"), ("either --golden or --suite",)),
    "a run of two things": (
        ("run", "hf", "--golden", "a", "--suite", "b", "--trace", "x"),
        ("either --golden or --suite",),
    ),
    "a run of an unknown engine": (("run", "hff", "--golden", "a", "--trace", "x"), ("no engine 'hff'",)),
    "a trace nowhere": (("run", "hf", "--golden", "a", "--trace", "no/where"), ("--trace no/where",)),
    "a trace on the terminal": (("run", "hf", "--golden", "a", "--trace", "-"), ("a trace is no text",)),
    "unknown recipe": (("models", "build", "bloom-tin"), ("no recipe 'bloom-tin'", "Did you mean 'bloom-tiny'?")),
}
#: What click refuses: it shows the usage first, and its last line says what is wrong.
MISUSES = {
    "unknown command": (("chekc",), "No such command 'chekc'"),
    "unknown option": (("check", "--quik"), "No such option"),
    "missing option": (("record", "--model", "x", "--suite", "y"), "Missing option '--out'"),
    "a run without a file": (("run", "hf", "--golden", "x"), "Missing option '--trace'"),
    "one golden to compare": (("compare", "a"), "Missing argument 'B'"),
    "goldens of nowhere": (("lint", "nowhere"), "'nowhere' does not exist"),
    "a golden too many": (("check", "a", "b"), "Got unexpected extra argument (b)"),
    "steps of nothing": (("models", "build", "bloom-tiny", "--steps", "0"), "0 is not in the range"),
}
_TORCHLESS = """
import contextlib, io, json, sys
from harness import cli, engines

ended = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["harness", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main()
        except SystemExit as exit:
            code = exit.code
    heavy = sorted({"torch", "transformers", "scipy"} & set(sys.modules))
    ended.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy})
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def torchless(tmp_path_factory):
    """Help and usage errors, each run in one process that must not import torch: arguments to what came out."""
    directory = tmp_path_factory.mktemp("empty")
    lines = [(*command, "--help") for command in COMMANDS] + [("--version",), (), ("models", "list")]
    lines += [arguments for arguments, _words in (*MISTAKES.values(), *MISUSES.values())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _TORCHLESS, json.dumps(lines)]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stderr == ""
    assert listing(directory) == {}
    found = dict(zip(lines, json.loads(done.stdout), strict=True))
    heavy = {arguments: one.pop("heavy") for arguments, one in found.items()}
    first = next((arguments for arguments, names in heavy.items() if names), None)
    assert first is None, f"harness {' '.join(first)} imports {heavy[first]}"
    return {arguments: Ended(**one) for arguments, one in found.items()}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_printed_without_torch(torchless, command):
    """Each command explains itself at once, with exit code 0."""
    ended = torchless[(*command, "--help")]
    assert ended.code == 0
    assert ended.err == ""
    assert ended.out.startswith("Usage: harness")
    assert all(len(line) <= 120 for line in ended.out.splitlines())


def test_the_help_names_every_command_and_exit_code(torchless):
    """The first page is complete."""
    text = torchless[("--help",)].out
    commands = ("check", "record", "run", "compare", "lint", "models", "power", "convert", "doctor", "schema")
    for word in (*commands, "Exit codes: 0 ok", "1 failed", "2 bad input", "4 the engine"):
        assert word in text


def test_the_help_of_check_names_every_key_of_the_engine(torchless):
    """The list of keys is written by hand, so it is compared with the engine's own."""
    from harness.engines.hf import READERS

    words = set(torchless[("check", "--help")].out.replace(",", " ").replace(".", " ").split())
    assert set(READERS) <= words


def test_version_list_and_an_empty_line_come_without_torch(torchless):
    """The version, the recipes, and the usage for a command without arguments."""
    assert torchless[("--version",)].out.startswith("harness, version ")
    assert all(name in torchless[("models", "list")].out for name in RECIPES)
    empty = torchless[()]
    assert empty.code == 2
    assert "Usage: harness" in empty.out + empty.err


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_usage_error_is_one_line_without_torch(torchless, arguments, words):
    """An unknown engine, key or value, and what does not go together: one line with the fix, exit 2."""
    refused(torchless[arguments], *words)


@pytest.mark.parametrize(("arguments", "words"), MISUSES.values(), ids=MISUSES)
def test_a_misused_command_shows_its_usage_without_torch(torchless, arguments, words):
    """What the command line itself refuses shows usage, where help is, and what is wrong; exit 2."""
    ended = torchless[arguments]
    assert ended.code == 2
    assert ended.out == ""
    usage, *_, last = ended.err.splitlines()
    assert usage.startswith("Usage: harness")
    assert last.startswith("Error: ")
    assert words in last
    assert "--help" in ended.err


def test_a_reader_that_has_gone_is_no_error():
    """Piped into `head`, which may have left: no message, no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from harness.cli import main; main()", "models", "list"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# --- golden files that are damaged or hostile --------------------------------------------------


def _cut(path, kept):
    os.truncate(path, kept)


def _flip(path):
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 4
    path.write_bytes(payload)


class Bomb:
    """Makes the directory `marker` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


DAMAGE = {
    "arrays truncated": (ARRAYS_NAME, lambda path: _cut(path, 1000), "truncated"),
    "arrays empty": (ARRAYS_NAME, lambda path: _cut(path, 0), "truncated"),
    "arrays flipped": (ARRAYS_NAME, _flip, "SHA-256"),
    "arrays with an oversized header": (
        ARRAYS_NAME,
        lambda path: path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:]),
        "its header is larger than the file",
    ),
    "arrays pickled": (ARRAYS_NAME, lambda path: torch.save(Bomb(), path), "never opened"),
    "arrays missing": (ARRAYS_NAME, Path.unlink, "is missing"),
    "JSON truncated": (JSON_NAME, lambda path: _cut(path, 1000), "is not JSON"),
    "JSON flipped": (JSON_NAME, _flip, "golden.json"),
    "JSON pickled": (JSON_NAME, lambda path: torch.save(Bomb(), path), "is not JSON"),
    "JSON of another version": (
        JSON_NAME,
        lambda path: path.write_text('{"format": 99}', encoding="utf-8"),
        "format 99, this version reads 2",
    ),
    "JSON of the version before": (
        JSON_NAME,
        lambda path: path.write_text(path.read_text(encoding="utf-8").replace('"format": 2', '"format": 1'), "utf-8"),
        "format 1, this version reads 2",
    ),
    "JSON missing": (JSON_NAME, Path.unlink, "there is no golden at"),
}


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_golden_is_one_line(home, harness, name, damage, words):
    """Truncated, flipped, oversized, pickled, missing: exit 2, the file and the fix named, nothing written or run."""
    damage(home / GOLDEN / name)
    before = listing()
    line = refused(harness("check", GOLDEN, "-c", "hf:dtype=float32", "--json", "verdicts.json"), words, GOLDEN)
    assert "record" in line.lower()
    assert listing() == before
    assert not Path("marker").exists()


def test_a_damaged_golden_is_an_error_among_others(home, harness):
    """`check --all` does not pass over a golden that it cannot read, and goes on with the others."""
    Path("golden/small/candidates.toml").write_text('quick = ["hf:dtype=float32"]\nfull = []\n', encoding="utf-8")
    shutil.copytree(GOLDEN, "golden/small/another")
    _flip(home / GOLDEN / ARRAYS_NAME)
    ended = harness("check", "--all", "--quick", "--json", "verdicts.json")
    assert ended.code == 4
    assert "SHA-256" in ended.out
    verdicts = read_json(Path("verdicts.json"))

    assert verdicts[1]["findings"][0]["check"] == "golden"
    assert [one["status"] for one in verdicts] == ["identical", "error"]


# --- paths that are wrong ----------------------------------------------------------------------


def _no_weights(home):
    (home / "golden/small/model/model.safetensors").unlink()
    torch.save(Bomb(), home / "golden/small/model/pytorch_model.bin")


def _cut_weights(home):
    _cut(home / "golden/small/model/model.safetensors", 5000)


def _no_config(home):
    (home / "golden/small/model/config.json").unlink()


def _config(home, text):
    (home / "golden/small/model/config.json").write_text(text, encoding="utf-8")


def _keep(home):
    pass


WRONG = {
    "record: no model directory": (
        _keep, ("record", "--model", "golden/none", "--suite", "prompts/small.toml", "--out", "new"),
        ("there is no model directory golden/none", "Check the path"),
    ),
    "record: the model is a file": (
        _keep, ("record", "--model", "prompts/small.toml", "--suite", "prompts/small.toml", "--out", "new"),
        ("prompts/small.toml",),
    ),
    "record: no config": (_no_config, (*RECORD, "new"), ("golden/small/model", "config.json")),
    "record: config is not JSON": (lambda home: _config(home, "{"), (*RECORD, "new"), ("golden/small/model",)),
    "record: config of no model": (lambda home: _config(home, "{}"), (*RECORD, "new"), ("golden/small/model",)),
    "record: config of an encoder": (
        lambda home: _config(home, '{"model_type": "t5"}'), (*RECORD, "new"), ("encoder-decoder",),
    ),
    "record: pickled weights alone": (_no_weights, (*RECORD, "new"), ("golden/small/model", "never loaded")),
    "record: weights cut": (_cut_weights, (*RECORD, "new"), ("model.safetensors", "again")),
    "record: no suite": (
        _keep, ("record", "--model", "golden/small/model", "--suite", "prompts/smal.toml", "--out", "new"),
        ("prompts/smal.toml",),
    ),
    "record: a bad suite": (
        lambda home: Path("prompts/small.toml").write_text('name = "x"\nsurprise = 1\n', encoding="utf-8"),
        (*RECORD, "new"), ("prompts/small.toml", "surprise"),
    ),
    "record: there is a golden": (_keep, (*RECORD, GOLDEN), (f"there is a golden at {GOLDEN}", "--update")),
    "check: no golden": (_keep, ("check", "golden/none", "-c", "hf"), ("no golden at golden/none", "harness record")),
    "check: no model directory": (
        _keep, ("check", GOLDEN, "-c", "hf:model=golden/none"),
        ("there is no model directory golden/none", "Check the path"),
    ),
    "check: no reference directory": (
        _keep, ("check", GOLDEN, "-c", "hf", "--reference", "golden/none"), ("golden/none", "--reference"),
    ),
    "check: no model anywhere": (
        lambda home: shutil.rmtree(home / "golden/small/model"), ("check", GOLDEN, "-c", "hf"), ("model=DIR",),
    ),
    "check: a device of nobody": (_keep, ("check", GOLDEN, "-c", "hf:device=quantum"), ("quantum", "harness doctor")),
    "check: JSON into no directory": (
        _keep, ("check", GOLDEN, "-c", "hf", "--json", "none/verdicts.json"), ("none/verdicts.json", "Make it"),
    ),
    "check: JSON onto a directory": (
        _keep, ("check", GOLDEN, "-c", "hf", "--json", "prompts"), ("prompts", "directory"),
    ),
    "all: no goldens": (_keep, ("check", "--all", "--root", "prompts"), ("no golden under prompts", "--root")),
    "all: no candidates": (_keep, ("check", "--all"), ("candidates.toml", "quick =")),
    "all: candidates are not TOML": (
        lambda home: Path("golden/small/candidates.toml").write_text("quick = [", encoding="utf-8"),
        ("check", "--all"), ("candidates.toml", "line"),
    ),
    "all: an unknown key": (
        lambda home: Path("golden/small/candidates.toml").write_text("quik = []", encoding="utf-8"),
        ("check", "--all"), ("candidates.toml", "quik"),
    ),
    "all: an unknown engine": (
        lambda home: Path("golden/small/candidates.toml").write_text('quick = ["hff"]', encoding="utf-8"),
        ("check", "--all"), ("no engine 'hff'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "arguments", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_path_is_one_line(home, harness, prepare, arguments, words):
    """A missing or unusable model, golden, suite, device or target: exit 2, one line, nothing written or run."""
    prepare(home)
    before = listing()
    refused(harness(*arguments), *words)
    assert listing() == before
    assert not Path("marker").exists()


# --- verdicts ----------------------------------------------------------------------------------


@pytest.fixture
def others(home):
    """Beside the golden's model: `noisy`, the same shapes with other weights, and `other`, another architecture."""
    write_model(home / "golden/noisy", seed=1)
    write_model(home / "golden/other", "gpt2")
    return home


def told(ended, status, code):
    """A verdict on standard output, nothing on the other."""
    assert ended.code == code, ended
    assert ended.out.startswith(f"{status}: ")
    assert ended.err == ""
    return ended.out


def test_a_good_candidate_is_one_line_and_exit_0(home, harness):
    """What is well is said briefly, and a check writes nothing."""
    before = listing()
    ended = harness("check", GOLDEN, "-c", "hf:dtype=bfloat16")
    assert told(ended, ended.out.split(":")[0], 0).startswith(("identical", "drift"))
    assert "small/small" in ended.out
    assert listing() == before


def test_other_weights_fail_with_exit_1(others, harness):
    """Other weights of the same shapes are a candidate that deviates."""
    before = listing()
    assert "next: " in told(harness("check", GOLDEN, "-c", "hf:model=golden/noisy,dtype=float32"), "deviates", 1)
    assert listing() == before


def test_a_golden_of_another_model_is_stale_with_exit_3(others, harness):
    """A candidate of other shapes is no candidate of this golden: exit 3, what to do, nothing written."""
    before = listing()
    text = told(harness("check", GOLDEN, "-c", "hf:model=golden/other"), "stale", 3)
    assert "another model than the one of small/small" in text
    assert "next: Check it against a golden of its own" in text
    assert listing() == before


def test_an_exchanged_reference_is_stale_with_exit_3(others, harness):
    """Another model beside the golden, also of the same shapes, is noticed before anything runs."""
    shutil.rmtree("golden/small/model")
    shutil.copytree("golden/noisy", "golden/small/model")
    before = listing()
    text = told(harness("check", GOLDEN, "-c", "hf:dtype=float32"), "stale", 3)
    assert "is not the one that small/small was recorded from" in text
    assert "next: Record the golden again" in text
    assert listing() == before


def test_another_reference_given_by_hand_is_stale_with_exit_3(others, harness):
    """--reference is held to the digest of the golden's model too."""
    told(harness("check", GOLDEN, "-c", "hf", "--reference", "golden/noisy"), "stale", 3)


def test_a_changed_suite_is_stale_with_exit_3(home, harness):
    """The suite's file asks other questions than the golden answers."""
    path = Path("prompts/small.toml")
    path.write_text(path.read_text(encoding="utf-8").replace("In the morning", "In the evening"), encoding="utf-8")
    assert "prompts/small.toml was changed" in told(harness("check", GOLDEN, "-c", "hf"), "stale", 3)


def test_an_engine_that_fails_is_exit_4(home, harness, monkeypatch):
    """A port under test can raise anything: that is a verdict with its words, and no traceback."""
    monkeypatch.setattr(HFEngine, "replay", _raise)
    text = told(harness("check", GOLDEN, "-c", "hf"), "error", 4)
    assert "ZeroDivisionError: a port's own" in text
    assert "Traceback" not in text


def _raise(*_arguments, **_options):
    raise ZeroDivisionError("a port's own bug")


GOOD, BAD, STALE = "hf:dtype=float32", "hf:model=golden/noisy", "hf:model=golden/other"


@pytest.mark.parametrize(
    ("candidates", "code"),
    [((GOOD, "hf:batch=1"), 0), ((GOOD, BAD), 1), ((BAD, GOOD), 1), ((STALE, GOOD), 3), ((STALE, BAD), 1)],
)
def test_one_exit_code_for_several_candidates(others, harness, candidates, code):
    """A failure comes before what is stale, and that before what is well, in any order; each has its verdict."""
    arguments = [word for spec in candidates for word in ("-c", spec)]
    ended = harness("check", GOLDEN, *arguments, "--json", "-", "--quick")
    assert ended.code == code
    verdicts = json.loads(ended.out)
    assert [one["candidate"] for one in verdicts] == list(candidates)
    assert code in [one["exit_code"] for one in verdicts]


@pytest.mark.parametrize("target", ["-", "verdicts.json"])
def test_json_holds_the_verdicts_and_nothing_else(home, harness, target):
    """FILE is written whole beside the usual words, '-' prints the JSON alone."""
    before = listing()
    ended = harness("check", GOLDEN, "-c", GOOD, "--json", target)
    assert (ended.code, ended.err) == (0, "")
    text = ended.out if target == "-" else Path(target).read_text(encoding="utf-8")
    [one] = json.loads(text, parse_constant=pytest.fail)
    assert one["status"] in ("identical", "drift")
    assert (one["ok"], one["exit_code"], one["golden"], one["candidate"]) == (True, 0, "small/small", GOOD)
    assert one["settings"]["dtype"] == "float32"
    assert {run["run"] for run in one["passes"]} == {"batched", "single", "order"}
    assert set(listing()) - set(before) == ({target} - {"-"})
    if target != "-":
        assert ended.out.startswith(f"{one['status']}: ")


def test_json_has_both_answers_and_their_statistics(home, harness):
    """Of a 16-bit candidate the JSON says what each question was answered, by which numbers, and what was not seen."""
    ended = harness("check", GOLDEN, "-c", "hf:dtype=bfloat16", "--json", "-")
    [one] = json.loads(ended.out, parse_constant=pytest.fail)
    assert (ended.code, one["version"]) == (0, 3)
    assert [answer["question"] for answer in one["answers"]] == ["function", "precision"]
    for answer in one["answers"]:
        assert set(answer) >= {"question", "status", "power", "effective"}
        assert answer["power"]["coverage"] == answer["power"]["decidable"] / answer["power"]["steps"]
    assert one["power"] == one["answers"][-1]["power"]
    for question, precision in (("function", "float32"), ("precision", "bfloat16")):
        found = [each for each in one["statistics"] if each["question"] == question]
        assert {each["precision"] for each in found} == {precision}
        assert {"error", "gain", "log p", "entropy", "margin"} <= {each["name"] for each in found}
        assert all(each["why"] and isinstance(each["z"], float) for each in found)
    assert {run["question"] for run in one["passes"]} == {"function", "precision"}


@pytest.fixture
def subtle(home):
    """A checkpoint beside the golden's model with one weight wrong by less than bf16 can show."""
    shutil.copytree("golden/small/model", "golden/subtle")
    model = reference_model(GOLDEN)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] *= 1.25
    model.save_pretrained("golden/subtle")
    return home


def test_no_upcast_judges_as_shipped_alone(subtle, harness):
    """With --no-upcast one question is left, and what was not asked is said; without it the copy sees more."""
    check = ("check", GOLDEN, "-c", "hf:model=golden/subtle,dtype=bfloat16")
    text = told(harness(*check), "deviates", 1)
    assert text.splitlines()[0].endswith(": function wrong, precision ok")
    text = told(harness(*check, "--verbose"), "deviates", 1)
    assert "same function (float32 copy): deviates" in text
    assert "error within its precision (as shipped): identical" in text
    ended = harness(*check, "--no-upcast")
    assert ended.code == 0
    assert "not seen: the function: no float32 copy of the candidate was run" in ended.out
    [one] = json.loads(harness(*check, "--no-upcast", "--json", "-").out)
    statuses = {answer["question"]: answer["status"] for answer in one["answers"]}
    assert statuses == {"function": "unmeasured", "precision": "identical"}
    assert {run["question"] for run in one["passes"]} == {"precision"}


def test_no_upcast_changes_nothing_in_float32(subtle, harness):
    """A float32 candidate is its own copy, whatever is said."""
    for more in ((), ("--no-upcast",)):
        told(harness("check", GOLDEN, "-c", "hf:model=golden/subtle,dtype=float32", *more), "deviates", 1)
        assert harness("check", GOLDEN, "-c", GOOD, *more).code == 0


def test_json_of_a_stale_golden(others, harness):
    """A verdict that never came to a comparison is in the JSON as well."""
    ended = harness("check", GOLDEN, "-c", STALE, "--json", "-")
    [one] = json.loads(ended.out)
    assert (ended.code, one["status"], one["ok"], one["power"]) == (3, "stale", False, None)
    assert (one["answers"], one["statistics"], one["passes"]) == ([], [], [])
    assert one["findings"][0]["fix"]


def test_an_old_json_file_is_replaced_only_by_a_new_one(home, harness):
    """A check that cannot be done leaves the report of the last one."""
    Path("verdicts.json").write_text("[]", encoding="utf-8")
    refused(harness("check", GOLDEN, "-c", "hf:model=golden/none", "--json", "verdicts.json"))
    assert Path("verdicts.json").read_text(encoding="utf-8") == "[]"
    assert harness("check", GOLDEN, "-c", GOOD, "--json", "verdicts.json").code == 0
    assert len(read_json(Path("verdicts.json"))) == 1


def test_all_prints_a_table_and_counts(others, harness):
    """`check --all` takes the candidates beside each golden, and says in the end how many were what."""
    Path("golden/small/candidates.toml").write_text(
        f'quick = ["{GOOD}"]\nfull = ["hf:model=golden/noisy,dtype=float32"]\n', encoding="utf-8"
    )
    quick = harness("check", "--all", "--quick")
    assert quick.code == 0
    assert quick.out.splitlines()[0].startswith("status")
    assert quick.out.splitlines()[-1] in ("1 checks: 1 identical", "1 checks: 1 drift")
    whole = harness("check", "--all", "--json", "verdicts.json")
    assert whole.code == 1
    assert "deviates: hf:model=golden/noisy,dtype=float32 against small/small" in whole.out
    assert [one["status"] for one in read_json(Path("verdicts.json"))][1] == "deviates"
    assert "  deviates (function): error: " not in whole.out
    assert "  deviates (function): error: " in harness("check", "--all", "--verbose").out


# --- record, doctor ----------------------------------------------------------------------------


def test_record_writes_a_golden_and_says_what_it_is(home, harness):
    """A golden and nothing else is written; every precision has its line."""
    before = listing()
    ended = harness(*RECORD, "golden/small/again")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("recorded golden/small/again: 3 prompts, 18 tokens, reference in float64\n")
    assert [line.split(":")[0].strip() for line in ended.out.splitlines()[1:]] == ["float32", "bfloat16", "float16"]
    written = {f"golden/small/again/{name}" for name in (JSON_NAME, ARRAYS_NAME)} | {"golden/small/again"}
    assert set(listing()) - set(before) == written
    assert harness("check", "golden/small/again", "-c", GOOD).code == 0


def test_record_measures_tensor_parallelism(home, harness):
    """Each size that is named has a floor beside that of every precision, with its line; one rank is no size."""
    ended = harness(*RECORD, "golden/small/parallel", "--tensor-parallel", "2")
    assert (ended.code, ended.err) == (0, "")
    names = [line.split(":")[0].strip() for line in ended.out.splitlines()[1:]]
    assert names == [f"{name}{size}" for name in ("float32", "bfloat16", "float16") for size in ("", "/tp2")]
    assert list(read_golden("golden/small/parallel").floors) == names
    assert harness("check", "golden/small/parallel", "-c", GOOD).code == 0
    refused_by_click = harness(*RECORD, "golden/small/other", "--tensor-parallel", "1")
    assert (refused_by_click.code, Path("golden/small/other").exists()) == (2, False)


def test_record_replaces_only_when_told_to(home, harness):
    """Without --update a golden stays as it is; with it the reason joins the history."""
    before = listing()
    refused(harness(*RECORD, GOLDEN, "--reason", "because"), "--update")
    assert listing() == before
    assert harness(*RECORD, GOLDEN, "--update", "--reason", "because").code == 0
    history = read_golden(GOLDEN).provenance["history"]
    assert [entry["reason"] for entry in history] == ["recorded", "because"]


def test_record_replaces_a_damaged_golden(home, harness):
    """--update is the way out that the refusal of a damaged golden names."""
    _flip(Path(GOLDEN) / JSON_NAME)
    refused(harness(*RECORD, GOLDEN), "--update")
    assert harness(*RECORD, GOLDEN, "--update").code == 0
    assert harness("check", GOLDEN, "-c", GOOD).code == 0


def test_a_target_that_cannot_be_written_is_one_line(home, harness):
    """--out below a file: the line names it, and nothing is written."""
    before = listing()
    refused(harness(*RECORD, "prompts/small.toml/new"), "prompts/small.toml")
    assert listing() == before


def test_doctor_tells_versions_devices_and_engines(harness):
    """Versions, machine, devices, compiler, and for each engine whether it can run here."""
    ended = harness("doctor")
    assert (ended.code, ended.err) == (0, "")
    for words in (torch.__version__, "transformers", "devices", "cpu", "compiler", "engines", "can run: "):
        assert words in ended.out
    found = json.loads(harness("doctor", "--json").out)
    assert set(found) == {"versions", "machine", "devices", "compiler", "engines"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["engines"]["hf"].startswith("can run: ")


def test_doctor_says_why_an_engine_cannot_run(harness, monkeypatch):
    """Of an engine without its packages, the packages are named."""
    entry = replace(engines.ENGINES["hf"], packages=("torch", "a_package_of_nobody"))
    monkeypatch.setattr(engines, "ENGINES", {"hf": entry})
    assert "install a_package_of_nobody" in harness("doctor").out
    refused(harness("check", GOLDEN, "-c", "hf"), "cannot run here", "install a_package_of_nobody")


# --- interrupted and killed --------------------------------------------------------------------

#: Runs the command in a fork, and tells in the file `progress` (beside the working directory) where it is.
_COMMAND = """
import contextlib, json
import torch
from harness import cli, flow
from harness.cli import checks, records

torch.set_num_threads(1)
# Imports what a recording needs, once for all forks.
flow.check("golden/small/small", "hf:dtype=float32")
flow.record("golden/small/model", "prompts/small.toml", out="../warm", replicas=2)

@contextlib.contextmanager
def announced(quiet=False):
    with open("../progress", "a", buffering=1) as opened:
        yield lambda text: opened.write(text + "\\n")

checks.progress_line = records.progress_line = announced

def work(line):
    sys.argv = ["harness", *json.loads(line)]
    cli.main()
"""


@pytest.fixture(scope="module")
def work(small_home, tmp_path_factory):
    """A copy of `small_home` for the forks below, the working directory of each."""
    return Path(shutil.copytree(small_home, tmp_path_factory.mktemp("forks") / "home"))


@pytest.fixture(scope="module")
def command(work):
    """A process that runs the command in forks."""
    with Forks(_COMMAND, work) as forks:
        yield forks


def reach(work, forks, arguments, words):
    """Start the command and wait until it says ``words``; the process id."""
    progress = work.parent / "progress"
    progress.unlink(missing_ok=True)
    pid = forks.start(json.dumps(arguments))
    limit = time.monotonic() + 120
    while not progress.exists() or words not in progress.read_text(encoding="utf-8"):
        assert time.monotonic() < limit, f"{words!r} is not reached: {forks.log}"
        time.sleep(0.0005)
    return pid


UPDATE = (*RECORD, GOLDEN, "--update", "--reason", "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [(UPDATE, "replica 3 of"), (("check", GOLDEN, "-c", GOOD, "--json", "verdicts.json"), "single")],
    ids=["record", "check"],
)
def test_an_interrupted_command_ends_with_130_and_leaves_no_trace(work, command, arguments, words):
    """Ctrl-C in the middle: one line, exit 130, everything as it was."""
    before = listing(work)
    pid = reach(work, command, arguments, words)
    assert command.signal(pid, signal.SIGINT) == 130, command.log
    # The empty line ends the one on which the terminal shows ^C.
    assert command.log == "\nerror: interrupted; nothing was written half\n"
    assert listing(work) == before


def _at_once(_directory, _before):
    return True


def _first_file(directory, _before):
    return any(path.suffix == ".tmp" for path in directory.iterdir())


def _staged(directory, _before):
    return any(path.name.startswith(f"{ARRAYS_NAME}.") for path in directory.iterdir())


def _committed(directory, before):
    return (directory / JSON_NAME).stat().st_ino != before


@pytest.mark.slow
def test_a_killed_record_leaves_the_old_golden_or_the_new_one(work, command):
    """SIGKILL at stages of `record --update`, most while it writes: one whole golden is there, never a mixture."""
    stages = [("resolving", _at_once), ("bfloat16: replica 9 of", _at_once)]
    stages += [("writing", sign) for sign in (_at_once, _first_file, _staged, _committed)]
    old = read_golden(work / GOLDEN)
    outcomes = []
    for words, sign in stages:
        before = (work / GOLDEN / JSON_NAME).stat().st_ino
        pid = reach(work, command, UPDATE, words)
        while not (sign(work / GOLDEN, before) or _committed(work / GOLDEN, before)):
            pass  # these moments last a millisecond
        assert command.signal(pid, signal.SIGKILL) in (-signal.SIGKILL, 0), command.log
        read = read_golden(work / GOLDEN)
        # The model did not change, so both goldens say the same of it; a mixture would not even be read.
        assert read.rows.projections.tobytes() == old.rows.projections.tobytes()
        assert read.generations == old.generations
        outcomes.append(len(read.provenance["history"]) - len(old.provenance["history"]))
        old = read
    print(f"goldens replaced by the killed recordings: {outcomes}")
    assert outcomes[:2] == [0, 0]
    assert set(outcomes[2:-1]) <= {0, 1}
    assert outcomes[-1] == 1
    command.start(json.dumps(UPDATE))
    assert command.ended() == 0, command.log
    assert sorted(path.name for path in (work / GOLDEN).iterdir()) == [JSON_NAME, ARRAYS_NAME]
