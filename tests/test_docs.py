"""Every command in README and docs is executed, document by document, in a copy of the repository's data.

A block that is run is fenced as `sh` or `python`; comments before it say more: `<!-- file: NAME -->` saves it first,
`<!-- exit: N -->` names the exit code that it must end with,
`<!-- needs: PACKAGE -->` an extra without which it is not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import ROOT
from tests import preloaded

DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/how-to").glob("*.md")]
)
DATA = ("golden", "prompts", "benchmarks", "tests", "harness", "pyproject.toml", "conftest.py")

#: What takes minutes or hours is run on less of the same: (what the document says, what is run).
SHORTER = (
    (  # of a hundred tokens nothing can be told
        "prompts/core.toml --trace said.trace\nharness verify --model golden/bloom-tiny/model "
        "--suite prompts/core.toml --trace said.trace",
        "prompts/headline.toml --trace said.trace\nharness verify --model golden/bloom-tiny/model "
        "--suite prompts/headline.toml --trace said.trace || test $? = 3",
    ),
    ("--suite prompts/core.toml", "--suite prompts/headline.toml"),
    ("golden/bloom-tiny/core", "golden/bloom-tiny/headline"),
    ("check golden/llama-tiny/core -c 'py:fused_llama", "check golden/llama-tiny/headline -c 'py:fused_llama"),
    ("power --locate\n", "power --locate --host mistral-window --only plain\n"),
    (",static_cache=true,compile=true", ",static_cache=true"),
    (",show=tokens ", ",show=top "),  # tokens alone say too little about the one prompt of the shorter suite
    # One of three: tests/engines/ranks/test_engine.py has both keys together, and the next command has shards.
    (
        "-c tp:size=2,dtype=bfloat16 -c pp:stages=3,dtype=float16,micro_batches=2 -c tp:size=2,stages=2,dtype=float32",
        "-c pp:stages=3,dtype=float16,micro_batches=2",
    ),
    ("harness run tp:size=2,dtype=bfloat16", "harness run hf:dtype=bfloat16"),  # the check above it has shards
    ("--quick --diagnose || test $? = 1", "--quick"),  # templates of a suite take minutes
    ("harness models build bloom-tiny", "harness models build bloom-tiny --steps 1 --out built"),
    ("--spreads --groups 2", "--spreads --groups 1 --minutes 0.2"),
    ("null_simulation.py --draws 20000", "null_simulation.py --draws 20 --processes 1"),
    ("test_null.py -s -q", "test_null.py -s -q -k shared_error"),
    ("harness power --ranks", "harness power --ranks --only tp-shard-0-layer --host gpt2-tiny"),
    (
        "--locate --port bloom:rungs=all",
        "--locate --port bloom:rungs=all --host bloom-tiny --only x-row-scaled",
    ),
    ("power --jobs 2", "power --jobs 2 --quick --only wc-eps,plain --host llama-tiny"),
    ("harness power --model golden/bloom-tiny/model", "harness power --model golden/gpt2-tiny/model"),
    ("max_new_tokens = 8\n", "max_new_tokens = 2\n"),
    ("benchmarks/updates.py", "benchmarks/updates.py --golden golden/llama-tiny/headline"),
    ("benchmarks/cost.py", "benchmarks/cost.py --repeats 1"),
    ("benchmarks/ladder.py --write docs/ladder.md", "benchmarks/ladder.py --model bloom-tiny --batch 1 --quick"),
    ("golden/llama-tiny/core --base", "golden/llama-tiny/headline --base"),
    ("golden/llama-tiny/core -c 'py:fused_llama", "golden/llama-tiny/headline -c 'py:fused_llama"),
    ("--require-speedup 1.05", "--require-speedup 1.05 --batch 1 --new-tokens 4"),
    (
        "--kind latency --kind completion --kind burst --kind modules --burst 1000x512+20",
        "--kind latency --kind burst --burst 4x16+2 --repeats 1 --new-tokens 8",
    ),
    (
        "harness bench tp:size=2,dtype=float32,threads=1 --golden golden/bloom-tiny/completion",
        "harness bench tp:size=1,dtype=float32,threads=1 --golden golden/bloom-tiny/headline",
    ),
    ("python benchmarks/scale.py linear", "python benchmarks/scale.py linear --quick"),
    ("--kind scaling --ranks 1,2,3", "--kind scaling --ranks 1 --repeats 1 --new-tokens 8"),
)
#: Commands that only a clone of its own can show, or that something else runs as well, each with what runs it.
ELSEWHERE = {
    "python benchmarks/scale.py blocks --prompts 8 --tokens 8 --repeats 1": (
        "by nobody: it takes 22 GB of disk and 12 GB of memory"
    ),
    "python benchmarks/scale.py blocks --prompts 24 --tokens 16 --repeats 1": "by nobody, as the one above",
    "python benchmarks/scale.py verdicts": "by nobody: minutes, and tests/engines/streaming/ has the verdicts",
    "python benchmarks/scale.py record": "by nobody: minutes, and tests/flow/test_speculating.py has the drafts",
    "harness power --names --nulls 3000 --jobs 2": "by tests/power/test_naming.py, on one host",
    "harness power --nulls 3000 --jobs 2": "by tests/power/test_nulls.py, on a small model",
    "python benchmarks/repros.py --seconds 60": "by nobody: minutes, and tests/flow/test_reproducing.py has cases",
    "make check": "by .ci/run",
    "make test": "by .ci/run, and this is a part of it",
    "make test-deepspeed": "by whoever changes that engine: it installs an extra, and this is a part of it",
    "make test-transformers-4.55": "by whoever changes what depends on transformers: it makes an environment",
    "make lint": "by .ci/run",
    ".ci/run": "it runs this",
    "pip install -c constraints.txt -e '.[test]'": "what runs this test was installed so",
    ". .venv/bin/activate": "the environment of `make`; here it is the one that runs this test",
    "harness check golden/my-model/core --candidate tp:size=2,dtype=bfloat16": "by check-a-sharded-model.md",
    "harness check golden/my-model/core --candidate pp:stages=2,dtype=float32": "by check-a-sharded-model.md",
    "harness check golden/bloom-tiny/core --matrix": "by tests/flow/test_matrix.py",
    "harness gate golden/llama-tiny/core --base hf:dtype=float32,attn=eager --candidate hf:dtype=float32,attn=sdpa "
    "--max-slowdown 1.5 --quick": "by tests/flow/test_gating.py",
    "harness gate golden/bloom-tiny/core --base $base --candidate $candidate --max-slowdown 1.1 --batch 1 "
    "--new-tokens 8 --quick": (
        "by nobody: minutes each; tests/engines/test_bloom.py has the verdicts, and tests/flow/test_gating.py gates"
    ),
    "harness gate golden/bloom-tiny/headline "
    "--base bloom:rungs=alibi+layout+gelu+softmax+matvec,dtype=bfloat16,threads=1 --candidate "
    "bloom:tp=2,dtype=bfloat16,threads=1 --max-slowdown 1.1 --batch 1 --new-tokens 8 --prompt-tokens 32 "
    "--rounds 8 --quick || test $? = 1": "by nobody: it takes minutes, and tests/engines/ranks/ has the verdict",
    "harness power --port bloom:rungs=all --as-reported": "by tests/power/test_placing.py, a few bugs of it",
    "python benchmarks/gate_trials.py --runs 20": "by nobody: it takes an hour and a half",
    "harness gate ../golden/bloom-tiny/core --base-rev HEAD --candidate py:my_port:build --max-slowdown 1.5 --quick": (
        "by tests/flow/test_gating.py"
    ),
    "torchrun --standalone --nproc-per-node 2 -m harness check golden/bloom-tiny/core --quick "
    "-c tp:size=2,dtype=float32": "by tests/engines/ranks/test_outer.py",
    "torchrun --standalone --nproc-per-node 2 -m harness verify --model golden/bloom-tiny/model --answers said.jsonl "
    "--dtype bfloat16 --replicas 2": "by tests/engines/streaming/test_spreading.py",
}
#: The document whose programs start as a reader's do; those of the others fork from a process that has the libraries.
REAL = ROOT / "docs/how-to/read-a-verdict.md"
COMMANDS = ("harness ", "python ", "pytest ", "make ", ".ci/run", "time harness", "pip ")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced or indented block of a document."""

    language: str
    text: str
    line: int
    file: str | None
    exit: int
    needs: str | None


_FENCE = re.compile(
    r"^(?P<notes>(?:<!-- (?:file|exit|needs): [^\n]+ -->\n)*)```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(document):
    """The fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        notes = dict(re.findall(r"<!-- (file|exit|needs): (.+?) -->", found["notes"]))
        yield Block(
            language=found["language"],
            text=found["text"],
            line=text[: found.start()].count("\n") + 1,
            file=notes.get("file"),
            exit=int(notes.get("exit", 0)),
            needs=notes.get("needs"),
        )


def test_a_note_ends_with_its_line(tmp_path):
    """A file's note takes nothing in that stands between it and a later exit code: each block is there."""
    (tmp_path / "x.md").write_text(
        "<!-- file: a.toml -->\n```toml\na = 1\n```\n\n```sh\nfirst\n```\n\n<!-- exit: 1 -->\n```sh\nsecond\n```\n"
    )
    found = [(block.file, block.text, block.exit) for block in blocks_of(tmp_path / "x.md")]
    assert found == [("a.toml", "a = 1\n", 0), (None, "first\n", 0), (None, "second\n", 1)]


def shortened(text):
    """A block's text with what takes long replaced, and without what is run elsewhere."""
    lines = [line for line in text.splitlines() if line.partition("#")[0].strip() not in ELSEWHERE]
    text = "\n".join(lines) + "\n"
    for long, short in SHORTER:
        text = text.replace(long, short)
    return text


@pytest.fixture
def data(tmp_path):
    """A copy of the repository's data, with a model where the documents say `path/to/...`."""
    home = tmp_path / "home"
    home.mkdir()
    for name in DATA:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, home / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, home / name)
    for name in ("path/to/model", "path/to/converted/weights"):
        shutil.copytree(ROOT / "golden/bloom-tiny/model", home / name)
    return home


def environment(*programs):
    """The environment of a document's shell: some programs and this Python's first, no settings of the caller's CI."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_STEP_SUMMARY")}
    path = [*map(str, programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    kept |= {"PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {key: value for key, value in kept.items() if not key.startswith("PYTEST_")}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Programs that have imported the libraries."""
    with preloaded.programs(tmp_path_factory.mktemp("programs"), environment()) as directory:
        yield directory


def run(command, home, *programs, **more):
    """Run a command in the copy."""
    given = {**environment(*programs), "PYTHONPATH": str(home)}
    return subprocess.run(
        command, cwd=home, env=given, capture_output=True, text=True, timeout=280, check=False, **more
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of a document; each of its blocks has the limit of `run`
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_says_can_be_done(document, data, quick):
    """The blocks of a document run one after the other, each with the exit code that it promises."""
    programs = () if document == REAL else (quick,)
    left_out = []
    for block in blocks_of(document):
        text = shortened(block.text)
        if block.file is not None:
            (data / block.file).parent.mkdir(parents=True, exist_ok=True)
            (data / block.file).write_text(text, encoding="utf-8")
            continue
        if block.needs is not None and find_spec(block.needs) is None:
            left_out.append(f"line {block.line}, which needs {block.needs}: make test-{block.needs} installs it")
            continue
        if block.language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", text]
        elif block.language == "python":
            command = ["python", "-c", text]
        else:
            continue
        done = run(command, data, *programs)
        said = f"{document.name}, line {block.line}:\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == block.exit, said
    if left_out:
        pytest.skip(f"all was run but {'; '.join(left_out)}")


_PROBE = """
import os, sys
loaded = sorted(name for name in sys.modules if name.partition(".")[0] in ("harness", "tests", "benchmarks"))
print(sys.argv, __name__, os.getcwd(), sys.path, loaded, sorted(set(os.environ.items())), sys.stdin.read())
print("to the other", file=sys.stderr)
sys.exit(3)
"""


def test_a_quick_program_is_as_a_fresh_one(tmp_path, quick):
    """Arguments, directory, environment, path, standard files and exit code are the caller's; nothing is left over."""
    (tmp_path / "probe.py").write_text(_PROBE, encoding="utf-8")
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)", encoding="utf-8")
    for arguments in (["-c", _PROBE, "a b"], ["-", "c"], ["probe.py", "d"], ["killed.py"]):
        said = _PROBE if arguments[0] == "-" else "said"
        fresh, forked = (
            run([f"{place}/python", *arguments], tmp_path, quick, input=said)
            for place in (Path(sys.executable).parent, quick)
        )
        assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
        assert fresh.returncode == (-9 if arguments == ["killed.py"] else 3)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_command_hides_from_the_test_above(document):
    """Commands stand in blocks that are run: none is indented, or fenced as something else."""
    text = document.read_text(encoding="utf-8")
    outside = _FENCE.sub("", text)
    assert "```" not in outside, "a block that the pattern above does not know"
    hidden = [line for line in outside.splitlines() if line.startswith("    ") and line.strip().startswith(COMMANDS)]
    other = [block for block in blocks_of(document) if block.language not in ("sh", "python") and block.file is None]
    hidden += [line for block in other for line in block.text.splitlines() if line.startswith(COMMANDS)]
    assert not hidden


def test_what_is_shortened_is_still_said():
    """A replacement that no document needs any more is removed."""
    everything = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    unused = [long for long, _ in SHORTER if long.strip() not in everything]
    unused += [command for command in ELSEWHERE if command not in everything]
    assert not unused


def test_links_lead_somewhere():
    """Relative links in the documents are of files that exist."""
    for document in [*DOCUMENTS, *(ROOT / "docs/decisions").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
