"""A candidate that ends the process is a candidate that failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.commands import runner

SMALL = "golden/small/small"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process; ports of this test are forgotten afterwards."""
    yield runner(monkeypatch, capsys)
    for name in [name for name in sys.modules if name.startswith("exiting_")]:
        del sys.modules[name]


@pytest.mark.parametrize("where", ["build", "forward"])
@pytest.mark.parametrize("code", ["0", "3", "'bye'"])
def test_a_port_that_exits_is_an_error_and_no_pass(home, command, where, code):
    """`sys.exit(0)` in a port ends neither the command nor the other candidates, and nothing counts as passed."""
    lines = ["import sys", "", "def build(path, *, dtype, device):"]
    lines += [f"    sys.exit({code})"] if where == "build" else ["    return forward", "", "def forward(input_ids):"]
    lines += [] if where == "build" else [f"    sys.exit({code})"]
    name = f"exiting_{where}_{'bye' if 'bye' in code else code}"
    Path(f"{name}.py").write_text("\n".join(lines), encoding="utf-8")
    ended = command("check", SMALL, "-c", f"py:{name}:build", "-c", "hf:dtype=float32", "--quick", "--junit", "e.xml")
    assert ended.code == 4
    assert "SystemExit" in ended.out
    assert "identical: hf:dtype=float32" in ended.out
    assert 'errors="1"' in Path("e.xml").read_text(encoding="utf-8")
    ended = command("run", f"py:{name}:build", "--golden", SMALL, "--trace", "e.trace")
    assert ended.code == 4
    assert not Path("e.trace").exists()
