"""A run that is killed goes on from its last block, to the same bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from harness.engines import build_engine
from harness.engines.streaming import hidden
from tests.killing import Forks
from tests.support import random_model

LAYERS = 2
WORK = """
import json, os, signal
import numpy as np
from pathlib import Path
from harness.engines import build_engine
from harness.engines.streaming import hidden, passes
import harness.engines.streaming.skeleton, transformers.models.llama.modeling_llama

passes._SLICE_BYTES = 8000
SEQUENCES, STARTS = [list(range(3, 40)), list(range(9, 20))], [4, 3]

def die(*_a, **_k):
    os.kill(os.getpid(), signal.SIGKILL)

def work(line):
    step, where = json.loads(line)
    count = [0]
    write = hidden.replace_file
    def counted(path, payload):
        if path.name == hidden.PROGRESS:
            count[0] += 1
            if count[0] == step and where == "before":
                die()
        write(path, payload)
        if path.name == hidden.PROGRESS and count[0] == step and where == "after":
            die()
    hidden.replace_file = counted
    with build_engine("stream:work=work", model="model") as engine:
        rows = engine.score(SEQUENCES, STARTS)[0]
        Path("pieces.json").write_text(json.dumps([one.name for one in engine.took]))
    np.savez("rows.npz", projections=rows.projections, top=rows.top_logits, logp=rows.logp)
"""


def test_kills_lose_one_block_at_most_and_change_no_bit(tmp_path):
    """Killed before and after each commit, again and again, it ends with the rows of a run that nobody killed."""
    place = tmp_path / "place"
    place.mkdir()
    random_model("llama", dtype="bfloat16").save_pretrained(place / "model")
    with Forks(WORK, place) as forks:
        forks.start(json.dumps([0, ""]))
        assert forks.ended() == 0, forks.log
        whole = dict(np.load(place / "rows.npz"))
        pieces = json.loads((place / "pieces.json").read_text())
        assert len(pieces) > LAYERS + 1
        assert list((place / "work").iterdir()) == []
        (place / "rows.npz").unlink()
        reached = []
        # Commits: one a block, one behind the last norm, one a slice. Each run is killed at its first or second one.
        for number in range(len(pieces)):
            forks.start(json.dumps([1 + number % 2, ("after", "before")[number % 2]]))
            if forks.ended() == 0:
                break
            words = hidden.progress_in(place / "work")
            reached.append((words["stage"] == "head", words["done"]))
            assert len(list((place / "work").glob("hidden-*.bin"))) <= 2
        # Each life commits one more piece: of what it did, no more than the piece that it was killed in is lost.
        assert reached == sorted(set(reached)), reached
        assert len(reached) > LAYERS + 1
        if not (place / "rows.npz").exists():
            forks.start(json.dumps([0, ""]))
            assert forks.ended() == 0, forks.log
        rest = json.loads((place / "pieces.json").read_text())
        assert rest == pieces[len(pieces) - len(rest) :]
    for name, array in np.load(place / "rows.npz").items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert list((place / "work").iterdir()) == []


def test_progress_of_other_work_is_not_gone_on_from(tmp_path):
    """Other sequences, another dtype or a damaged file start anew."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "model")
    words = []
    for change in ("none", "work", "words", "file"):
        with hidden.States([(1, 2, 3)], torch.float32, directory=tmp_path / "w", budget=0, work="a") as states:
            states.resume()
            states.write(0, torch.ones(1, 2, 3))
            states.commit({"stage": "blocks", "done": 1})
        if change == "words":
            document = json.loads((tmp_path / "w" / hidden.PROGRESS).read_text())
            (tmp_path / "w" / hidden.PROGRESS).write_text(json.dumps({**document, "done": 7}))
        if change == "file":
            next((tmp_path / "w").glob("hidden-*")).write_bytes(b"short")
        work = "b" if change == "work" else "a"
        with hidden.States([(1, 2, 3)], torch.float32, directory=tmp_path / "w", budget=0, work=work) as states:
            words.append(states.resume())
            if words[-1]:
                assert states.read(0).tolist() == torch.ones(1, 2, 3).tolist()
            states.finish(None)
    assert [one is not None for one in words] == [True, False, False, False]


def test_a_result_that_is_kept_is_there_again(tmp_path, monkeypatch):
    """Asked to keep, a pass leaves its result for the same work, and reads nothing when it is asked again."""
    from harness.engines.streaming import reading

    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "model")
    with build_engine(f"stream:work={tmp_path}/work", model=str(tmp_path / "model")) as engine:
        first = engine.score([list(range(3, 9))], [2], keep=True)[0]
        monkeypatch.setattr(reading.Reader, "_read", lambda *_a: pytest.fail("read again"))
        again = engine.score([list(range(3, 9))], [2], keep=True)[0]
    np.testing.assert_array_equal(first.projections, again.projections)
    assert not list((tmp_path / "work").glob("hidden-*"))
    hidden.forget(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    """What cannot be committed is not passed over: the system's own error comes through."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "model")

    def full(_path, _payload):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden, "replace_file", full)
    with (
        build_engine(f"stream:work={tmp_path}/work", model=str(tmp_path / "model")) as engine,
        pytest.raises(OSError, match="No space left"),
    ):
        engine.score([list(range(3, 9))], [2])
