"""The commands that make a certificate, and the check that refers to one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.power import certificate, drawn
from harness.report.certificate import NAME
from harness.report.unseen import golden_digest
from tests.commands import refused, runner
from tests.templates import tiny

SUITE = """
name = "two"
stop = "ignore-eos"
add_special_tokens = true
max_new_tokens = 2

[[runs]]
name = "batched"
views = ["replay", "prefill"]
quick = true

[[prompts]]
id = "a"
text = "In the morning"

[[prompts]]
id = "b"
text = "Count by 3: 4, 7"
"""


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `harness` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "m"), "--model and --suite go together"),
        (("--suite", "s.toml"), "--model and --suite go together"),
        (("--model", "m", "--suite", "s.toml", "--list"), "give one of"),
        (("--model", "m", "--suite", "s.toml", "--quick"), "are of the bugs"),
        (("--model", "m", "--suite", "s.toml", "--jobs", 2), "are of other runs"),
        (("--model", "m", "--suite", "s.toml"), "there is no model directory m"),
    ],
)
def test_what_does_not_go_together(command, arguments, words):
    """One line, before anything is done."""
    refused(command("power", *arguments), words)


def test_power_prints_the_certificate_and_writes_it_as_json(command, tried, monkeypatch, tmp_path):
    """The golden is made in --work; the text goes to the terminal, and JSON where it is asked for."""
    asked = []
    monkeypatch.setattr(drawn, "recorded", lambda *given: asked.append(given) or tiny.golden())
    monkeypatch.setattr(certificate, "make", lambda *_args: tried)
    (tmp_path / "s.toml").write_text(SUITE)
    ended = command("power", "--model", tiny.MODEL, "--suite", "s.toml", "--work", "w", "--json", "c.json")
    assert ended.code == 0, ended
    assert "to see more" in ended.out
    assert asked[0][2].parts[0] == "w"
    assert len(json.loads((tmp_path / "c.json").read_text())["bugs"]) == len(tried.bugs)
    ended = command("power", "--model", tiny.MODEL, "--suite", "s.toml", "--work", "w", "--json", "-")
    assert json.loads(ended.out)["model_type"] == "llama"


def test_record_writes_the_certificate_and_check_refers_to_it(command, tried, monkeypatch, tmp_path):
    """certificate.json lies beside the golden; a changed golden makes it out of date."""
    monkeypatch.setattr(
        certificate, "make", lambda golden, *_args: replace(tried, digest=golden_digest(Path(golden.directory)))
    )
    (tmp_path / "s.toml").write_text(SUITE)
    out = tmp_path / "golden" / "m" / "two"
    ended = command("record", "--model", tiny.MODEL, "--suite", "s.toml", "--out", out, "--certificate")
    assert ended.code == 0, ended
    assert "bugs of the catalogue turn a check red" in ended.out
    assert (out / NAME).is_file()
    ended = command("check", out, "-c", f"hf:dtype=float32,model={tiny.MODEL}")
    assert f"see {out / NAME}" in ended.out, ended
    (out / NAME).write_text((out / NAME).read_text().replace(golden_digest(out), "0" * 64))
    ended = command("check", out, "-c", f"hf:dtype=float32,model={tiny.MODEL}")
    assert "out of date" in ended.out


def test_record_refuses_before_anything_is_recorded(command, tmp_path):
    """A port has no floors, and an unknown type no bugs: nothing is written."""
    (tmp_path / "s.toml").write_text(SUITE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for model, words in (("py:a.b:c", "a port has no floors"), ("other", "nothing for models of type 'qwen2'")):
        refused(command("record", "--model", model, "--suite", "s.toml", "--out", "g", "--certificate"), words)
    assert not (tmp_path / "g").exists()
