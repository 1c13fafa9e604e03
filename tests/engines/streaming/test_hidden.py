"""A run that is killed goes on from its last block, to the same bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from harness.engines import build_engine
from harness.engines.streaming import hidden, passes
from harness.errors import UsageError
from harness.files import content_digest
from harness.numerics.sketch import Sketcher
from harness.values import Request
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
    """A commit that is damaged, or whose file is, starts anew."""
    words = []
    for change in ("none", "words", "file"):
        with hidden.States([(1, 2, 3)], torch.float32, directory=tmp_path / "w", budget=0, work="a") as states:
            states.resume()
            states.write(0, torch.ones(1, 2, 3))
            states.commit({"stage": "blocks", "done": 1})
        if change == "words":
            document = json.loads((tmp_path / "w" / hidden.PROGRESS).read_text())
            (tmp_path / "w" / hidden.PROGRESS).write_text(json.dumps({**document, "done": 7}))
        if change == "file":
            next((tmp_path / "w").glob("hidden-*")).write_bytes(b"short")
        with hidden.States([(1, 2, 3)], torch.float32, directory=tmp_path / "w", budget=0, work="a") as states:
            words.append(states.resume())
            if words[-1]:
                assert states.read(0).tolist() == torch.ones(1, 2, 3).tolist()
            states.finish(None)
    assert [one is not None for one in words] == [True, False, False]


@pytest.mark.parametrize("kept", [False, True])
def test_other_work_is_never_removed(tmp_path, kept):
    """What hours made, half or whole, stays: another work in its directory is refused, and says what is there."""
    given = {"shapes": [(1, 2, 3)], "dtype": torch.float32, "directory": tmp_path, "budget": 0}
    with hidden.States(**given, work="a") as states:
        states.resume()
        states.write(0, torch.ones(1, 2, 3))
        states.commit({"stage": "blocks", "done": 1})
        if kept:
            states.finish({"x": torch.ones(2)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = "finished" if kept else "1 blocks done"
    with hidden.States(**given, work="b") as states, pytest.raises(UsageError, match=f"{tmp_path} .*{said}"):
        states.resume()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with hidden.States(**given, work="a") as states:
        assert states.resume() is not None


@pytest.mark.parametrize("name", [hidden.PROGRESS, "hidden-1.bin", "sums-head-2.safetensors"])
def test_files_of_others_are_never_removed(tmp_path, name):
    """A file of the same name that no pass wrote is named, neither removed nor written over."""
    (tmp_path / name).write_text("{}")
    with hidden.States([(1, 2, 3)], torch.float32, directory=tmp_path, budget=0, work="a") as states:
        with pytest.raises(UsageError, match=name):
            states.resume()
        hidden.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_beside_a_pass_s_stay(tmp_path):
    """A name that is only like one of a pass's, or that its words make up, is not removed with them."""
    work, outside = tmp_path / "work", tmp_path / "hidden-7.bin"
    work.mkdir()
    for path in (outside, work / "hidden-states.bin", work / "sums-mine.safetensors"):
        path.write_bytes(bytes(24))
    document = {"work": "a", "hidden": "../hidden-7.bin", "stage": "blocks", "done": 1}
    (work / hidden.PROGRESS).write_text(json.dumps({**document, "digest": content_digest(document)}))
    with hidden.States([(1, 2, 3)], torch.float32, directory=work, budget=0, work="a") as states:
        assert states.resume() is None
        for done in (1, 2):
            states.write(0, torch.ones(1, 2, 3))
            states.commit({"stage": "blocks", "done": done})
        states.finish(None)
    assert outside.exists()
    assert sorted(path.name for path in work.iterdir()) == ["hidden-states.bin", "sums-mine.safetensors"]


def test_the_sums_of_another_basis_are_refused(tmp_path):
    """A pass that is asked for other sums of the same sequences goes on from none of the first."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "model")
    with build_engine(f"stream:work={tmp_path}/work", model=str(tmp_path / "model")) as engine:
        bases = [np.random.default_rng(seed).standard_normal((engine.vocabulary, 2)) for seed in (1, 2)]
        engine.score([list(range(3, 9))], [2], basis=bases[0], keep=True)
        for other in ({"basis": bases[1]}, {"basis": bases[0], "fingerprints": True}, {}):
            with pytest.raises(UsageError, match="other work, finished"):
                engine.score([list(range(3, 9))], [2], keep=True, **other)


def test_the_passes_of_a_check_do_not_meet(tmp_path, monkeypatch):
    """Killed in its second pass, a check does the first again and goes on with the second."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "model")
    asked = [Request(id="0", prompt_ids=(3, 4, 5), max_new_tokens=2)], [(7, 8)]
    with build_engine(f"stream:work={tmp_path}/work", model=str(tmp_path / "model")) as engine:
        basis = np.ones((engine.vocabulary, 1))

        def run(basis):
            engine._known = None
            engine.prefill(*asked, batch_size=None, sketcher=Sketcher(engine.vocabulary, basis=basis))

        run(basis)
        with monkeypatch.context() as patched:
            patched.setattr(passes.Pass, "_tail", lambda *_a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(None)
        run(basis)
        assert len(engine.took) > LAYERS
        run(None)
        assert [one.name for one in engine.took] == ["lm_head columns from 0"]
    assert list((tmp_path / "work").iterdir()) == []


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
