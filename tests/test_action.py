"""The GitHub action and the pre-commit hook: read as GitHub reads them, run as it runs them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from harness.cli import cli
from harness.report.json import schema

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
INSTALL, CHECK = ACTION["runs"]["steps"]
#: What `shell: bash` means on GitHub.
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
#: A command that writes down its arguments and ends as it is told to.
RECORDER = """#!{python}
import json, os, sys
json.dump(sys.argv[1:], open(os.environ["RECORDED"], "w"))
sys.exit(int(os.environ.get("CODE", "0")))
"""
HARNESS = """#!/bin/sh
exec {python} -m harness "$@"
"""


def _values(**inputs):
    """What `env:` of the check is given: the expressions replaced by these inputs, or by their defaults."""
    given = {name: one["default"] for name, one in ACTION["inputs"].items()} | inputs
    assert set(given) == set(ACTION["inputs"])
    return {variable: given[_input(expression)] for variable, expression in CHECK["env"].items()}


def _input(expression):
    """NAME of ``${{ inputs.NAME }}``; an environment variable is given nothing else."""
    words = expression.split()
    assert (words[0], words[2:]) == ("${{", ["}}"])
    return words[1].removeprefix("inputs.")


@pytest.fixture
def step(tmp_path):
    """Run a script of the action in an empty directory, with `command` on the path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    work = tmp_path / "work"
    work.mkdir()

    def run(script, command, text, *, cwd=work, **environment):
        program = programs / command
        program.write_text(text.format(python=shlex.quote(sys.executable)), encoding="utf-8")
        program.chmod(0o755)
        (tmp_path / "script").write_text(script, encoding="utf-8")
        (tmp_path / "output").write_text("", encoding="utf-8")
        return subprocess.run(
            [*BASH, str(tmp_path / "script")],
            cwd=cwd,
            env={
                **os.environ,
                "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "RECORDED": str(tmp_path / "recorded"),
                "GITHUB_OUTPUT": str(tmp_path / "output"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    return run


def _recorded(tmp_path):
    return json.loads((tmp_path / "recorded").read_text(encoding="utf-8"))


def _outputs(tmp_path):
    lines = (tmp_path / "output").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


# --- as it is written --------------------------------------------------------------------------


def test_the_action_is_composite_and_described():
    """A composite action whose inputs and outputs each say what they are; an input that is left out has a default."""
    assert ACTION["runs"]["using"] == "composite"
    assert ACTION["name"]
    assert ACTION["description"]
    assert set(ACTION["inputs"]) == {
        "golden", "all", "candidate", "reference", "quick", "base", "base-revision", "max-slowdown",
        "require-speedup", "arguments", "junit", "json", "install",
    }  # fmt: skip
    for one in ACTION["inputs"].values():
        assert one["description"]
        assert isinstance(one["default"], str)
    for name, one in ACTION["outputs"].items():
        assert one["description"]
        assert one["value"] == f"${{{{ steps.{CHECK['id']}.outputs.{name} }}}}"


@pytest.mark.parametrize("step", ACTION["runs"]["steps"], ids=lambda step: step["name"])
def test_no_expression_stands_in_a_script(step):
    """GitHub pastes expressions into a script before bash reads it, so an input there would be code."""
    assert "${{" not in step["run"]
    assert step["shell"] == "bash"
    assert "uses" not in step


def test_every_input_reaches_the_check():
    """Each input but `install` has its variable, and the script uses every one of them."""
    assert {_input(expression) for expression in CHECK["env"].values()} == set(ACTION["inputs"]) - {"install"}
    for variable in CHECK["env"]:
        assert f'"${variable}"' in CHECK["run"]


def test_the_hook_is_one_that_the_command_has():
    """The pre-commit hook runs `harness lint golden/` on changes of goldens and suites, once, on all of them."""
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["id"] == "golden-lint"
    assert f"{hook['entry']} {' '.join(hook['args'])}" == "harness lint golden/"
    assert (hook["language"], hook["pass_filenames"]) == ("system", False)
    assert hook["files"] == "^(golden|prompts)/"
    assert CliRunner().invoke(cli, [hook["entry"].split()[1], "--help"]).exit_code == 0


# --- with a command that writes down what it is given ---------------------------------------------


def test_inputs_arrive_as_they_are(step, tmp_path):
    """Many candidates, spaces, quotes, globs and commands in inputs are arguments, word for word, and never run."""
    candidates = [
        "hf:dtype=bfloat16",
        "hf:model=a dir/with  two spaces,dtype=float32",
        'py:it\'s."quoted":build?a=1&b=*',
        "$(touch x) `touch x` ; touch x && touch x",
        "--all",
    ]
    done = step(
        CHECK["run"],
        "harness",
        RECORDER,
        **_values(
            golden="-golden/$(touch x)/*",
            candidate="\n".join([*candidates[:2], "", *candidates[2:]]) + "\n",
            reference="my models/$HOME",
            quick="true",
            arguments="--root\nanother place; touch x\n",
            junit="re ports/junit.xml",
            json="$(touch x).json",
        ),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert _recorded(tmp_path) == [
        "check", "--quick", "--reference", "my models/$HOME", "--junit", "re ports/junit.xml",
        "--json", "$(touch x).json",
        *[word for candidate in candidates for word in ("--candidate", candidate)],
        "--root", "another place; touch x", "--", "-golden/$(touch x)/*",
    ]  # fmt: skip
    assert list((tmp_path / "work").iterdir()) == []


def test_without_inputs_nothing_is_added(step, tmp_path):
    """Defaults give the bare command; `all` gives --all."""
    assert step(CHECK["run"], "harness", RECORDER, **_values()).returncode == 0
    assert _recorded(tmp_path) == ["check"]
    assert step(CHECK["run"], "harness", RECORDER, **_values(all="true")).returncode == 0
    assert _recorded(tmp_path) == ["check", "--all"]


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ({"base": "hf"}, ["--base", "hf"]),
        ({"base-revision": "origin/main"}, ["--base-rev", "origin/main"]),
        (
            {"base": "hf:model=my dir", "base-revision": "main", "max-slowdown": "1.05", "require-speedup": "1.1"},
            ["--base", "hf:model=my dir", "--base-rev", "main", "--max-slowdown", "1.05", "--require-speedup", "1.1"],
        ),
    ],
)
def test_a_base_makes_it_a_gate(step, tmp_path, inputs, arguments):
    """With a base, or a revision of one, the candidate's speed is gated too."""
    given = _values(golden="g", candidate="hf:attn=sdpa", **inputs)
    assert step(CHECK["run"], "harness", RECORDER, **given).returncode == 0
    assert _recorded(tmp_path) == ["gate", *arguments, "--candidate", "hf:attn=sdpa", "--", "g"]


def test_a_limit_without_a_base_is_not_forgotten(step, tmp_path):
    """The check is handed it, and refuses what it does not know."""
    assert step(CHECK["run"], "harness", RECORDER, **_values(**{"max-slowdown": "1.05"})).returncode == 0
    assert _recorded(tmp_path) == ["check", "--max-slowdown", "1.05"]
    assert CliRunner().invoke(cli, _recorded(tmp_path)).exit_code == 2


def test_lines_may_end_as_on_windows(step, tmp_path):
    """A carriage return is an end of line, not a part of a SPEC."""
    inputs = _values(golden="g", candidate="hf\r\nhf:batch=1\r\n", arguments="--no-upcast\r\n\r\n")
    assert step(CHECK["run"], "harness", RECORDER, **inputs).returncode == 0
    assert _recorded(tmp_path) == [
        "check", "--candidate", "hf", "--candidate", "hf:batch=1", "--no-upcast", "--", "g",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["all", "quick"])
def test_a_flag_is_true_or_false(step, tmp_path, name):
    """A word that is neither is refused, with the input named, before anything runs: `yes` must not mean no."""
    done = step(CHECK["run"], "harness", RECORDER, **_values(**{name: "yes"}))
    assert done.returncode == 2
    assert f"the input {name} must be true or false" in done.stdout
    assert not (tmp_path / "recorded").exists()


@pytest.mark.parametrize(
    ("code", "status"), [(0, "ok"), (1, "failed"), (2, "bad-input"), (3, "unmeasured"), (4, "error"), (130, "error")]
)
def test_the_exit_code_is_an_output_and_that_of_the_step(step, tmp_path, code, status):
    """A check that is not ok fails the step, and later steps can read how it ended."""
    done = step(CHECK["run"], "harness", RECORDER, CODE=str(code), **_values(golden="g", candidate="hf"))
    assert done.returncode == code
    assert _outputs(tmp_path) == {"exit-code": str(code), "status": status}
    assert set(_outputs(tmp_path)) == set(ACTION["outputs"])


def test_the_install_takes_the_pinned_versions(step, tmp_path):
    """The action installs its own checkout, wherever that is, with constraints.txt; only `install: false` skips it."""
    place = "/runner/my actions/golden-harness"
    done = step(INSTALL["run"], "python", RECORDER, GITHUB_ACTION_PATH=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert _recorded(tmp_path) == [
        "-m", "pip", "install", "--disable-pip-version-check", "--constraint", f"{place}/constraints.txt", place,
    ]  # fmt: skip
    assert INSTALL["if"] == "inputs.install != 'false'"


# --- with the real command -----------------------------------------------------------------------


def test_a_real_check(home, step, tmp_path):
    """Two candidates on a real golden: reports, summary and outputs are there, and the exit code is theirs."""
    summary = tmp_path / "summary.md"
    candidates = ["hf:dtype=float32", "hf:dtype=float32,batch=1"]
    done = step(
        CHECK["run"],
        "harness",
        HARNESS,
        cwd=home,
        GITHUB_STEP_SUMMARY=str(summary),
        **_values(
            golden="golden/small/small", candidate="\n".join(candidates), quick="true", junit="j.xml", json="v.json"
        ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _outputs(tmp_path) == {"exit-code": "0", "status": "ok"}
    verdicts = json.loads((home / "v.json").read_text(encoding="utf-8"))
    jsonschema.validate(verdicts, schema())
    assert [one["candidate"] for one in verdicts] == candidates
    assert ElementTree.parse(home / "j.xml").getroot().get("tests") == "2"
    assert summary.read_text(encoding="utf-8").startswith("### golden-harness: 2 checks: ")
