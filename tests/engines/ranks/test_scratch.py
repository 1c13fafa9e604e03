from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.engines.ranks.scratch import Scratch

_KILLED = """
import os, signal, sys
from pathlib import Path
from harness.engines.ranks.scratch import Scratch
print(Scratch(Path(sys.argv[1])).path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """A directory in use, one that is being made and one of another name stay."""
    mine = Scratch(tmp_path)
    making, other = tmp_path / "harness-ranks-new", tmp_path / "other"
    making.mkdir()
    other.mkdir()
    done = subprocess.run([sys.executable, "-c", _KILLED, tmp_path], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    another = Scratch(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine.path, making, other, another.path])
    mine.remove()
    mine.remove()
    assert not mine.path.exists()
    assert another.path.is_dir()
    another.remove()
