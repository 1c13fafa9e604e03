"""Templates on disk: made once, read as they were written, made again where they do not fit or are damaged."""

from __future__ import annotations

import json
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save, save_file

from harness.errors import HarnessError, UsageError
from harness.templates import caching, making
from harness.values import Run
from tests.templates import tiny


def same(a, b):
    """Whether two values are equal to the bit, arrays included."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if hasattr(a, "items"):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    return a == b


class Made:
    """`making.make` that gives the tiny templates and counts how often."""

    def __init__(self):
        self.calls = []

    def __call__(self, golden, model, _progress, *, places=True):
        self.calls.append((golden.name, model, places))
        return tiny.bank()


@pytest.fixture
def made(monkeypatch):
    """Counts what is made."""
    counted = Made()
    tiny.bank()
    monkeypatch.setattr(making, "make", counted)
    return counted


def asked(place, **more):
    """The tiny golden's templates, from a cache."""
    return caching.templates_of(tiny.golden(), tiny.MODEL, lambda _text: None, place=place, **more)


# --- once --------------------------------------------------------------------------------------


def test_templates_are_made_once(made, tmp_path):
    """The second time they are read, to the bit, and nothing is run."""
    first = asked(tmp_path)
    second = asked(tmp_path)
    assert made.calls == [(tiny.golden().name, tiny.MODEL, True)]
    assert second is not first
    assert same(second, first)


def test_nothing_else_is_left_in_the_directory(made, tmp_path):
    """One file of the key's name beside its lock; no temporary one."""
    asked(tmp_path / "deep" / "er")
    key = caching.key_of(tiny.golden())
    assert {path.name for path in (tmp_path / "deep" / "er").iterdir()} == {f"{key}.safetensors", f"{key}.lock"}


def test_with_places_is_another_file(made, tmp_path):
    """Templates without places are not taken for those with them."""
    asked(tmp_path, places=False)
    asked(tmp_path, places=True)
    asked(tmp_path, places=False)
    assert [places for _, _, places in made.calls] == [False, True]


def test_a_golden_that_allows_none_is_refused_before_anything(made, tmp_path):
    """A suite without logits is told, and no directory is made for it."""
    runs = (Run(name="free", views=("generate",)),)
    blind = replace(tiny.golden(), suite=replace(tiny.golden().suite, runs=runs))
    with pytest.raises(UsageError, match="logits"):
        caching.templates_of(blind, tiny.MODEL, lambda _text: None, place=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert made.calls == []


# --- where -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("own", "xdg", "own/templates"),
        (None, "xdg", "xdg/golden-harness/templates"),
        (None, None, "home/.cache/golden-harness/templates"),
        ("", "", "home/.cache/golden-harness/templates"),
    ],
)
def test_where_they_are_kept(monkeypatch, tmp_path, own, xdg, expected):
    """HARNESS_CACHE is the whole answer, else the user's cache directory; an empty variable is none."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in (("HARNESS_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value and str(tmp_path / value))
    assert caching.directory() == tmp_path / expected


def test_the_directory_is_used(made, monkeypatch, tmp_path):
    """Without a place of its own the cache is where HARNESS_CACHE says, and its size is that of the file."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert caching.size_of(tiny.golden()) == 0
    asked(None)
    (path,) = (tmp_path / "templates").glob("*.safetensors")
    assert caching.size_of(tiny.golden()) == path.stat().st_size > 0


def test_a_cache_that_cannot_be_written_is_told(made, monkeypatch, tmp_path):
    """A file where the directory should be is the user's to mend, and the error names the variable."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(HarnessError, match="cannot be kept in") as error:
        asked(None)
    assert "HARNESS_CACHE" in error.value.fix
    assert made.calls == []


# --- the key -----------------------------------------------------------------------------------


def _moved(golden):
    floor = golden.floors["bfloat16"]
    return replace(golden, floors={**golden.floors, "bfloat16": replace(floor, sigma=floor.sigma * 2)})


def _longer(golden):
    first, *others = golden.generations
    return replace(golden, generations=(replace(first, tokens=(*first.tokens[:-1], 5)), *others))


OTHERS = {
    "model": lambda golden: replace(golden, model=replace(golden.model, digest="another")),
    "tokens": _longer,
    "precision": lambda golden: replace(golden, precision="float32"),
    "round-off": _moved,
    "floors": lambda golden: replace(golden, floors={"float32": golden.floors["float32"]}),
    "batch": lambda golden: replace(
        golden, suite=replace(golden.suite, runs=(replace(golden.suite.runs[0], batch_size=4),))
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_golden_has_another_key(what):
    """Whatever templates are made from is in their key."""
    golden = tiny.golden()
    other = OTHERS[what](golden)
    assert caching.key_of(other) != caching.key_of(golden)


def test_what_templates_do_not_depend_on_is_not_in_the_key():
    """A golden that was moved, renamed or given a history needs no other templates."""
    golden = tiny.golden()
    moved = replace(golden, name="other/name", directory=None, provenance={})
    assert caching.key_of(moved) == caching.key_of(golden)
    assert len(caching.key_of(golden)) == 32


@pytest.mark.parametrize("package", ["mutations", "templates"])
def test_another_catalogue_has_another_key(monkeypatch, tmp_path, package):
    """A changed byte in any file of the catalogue, or of what makes templates, and a file more, are another key."""
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "simple.py").write_text("MUTATIONS = 1\n")
    module = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(f"harness.{package}", module)
    keys = [caching.key_of(tiny.golden())]
    (tmp_path / "simple.py").write_text("MUTATIONS = 2\n")
    keys.append(caching.key_of(tiny.golden()))
    (tmp_path / "more.py").write_text("MUTATIONS = 3\n")
    keys.append(caching.key_of(tiny.golden()))
    assert len(set(keys)) == 3
    (tmp_path / "notes.txt").write_text("no code")
    assert caching.key_of(tiny.golden()) == keys[-1]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_other_libraries_have_another_key(monkeypatch, library):
    """Logits are those of the libraries of the day."""
    before, version = caching.key_of(tiny.golden()), caching.importlib.metadata.version
    monkeypatch.setattr(caching.importlib.metadata, "version", lambda name: "0.1" if name == library else version(name))
    assert caching.key_of(tiny.golden()) != before


def test_another_format_has_another_key(monkeypatch):
    """A file of another layout is never looked for."""
    before = caching.key_of(tiny.golden())
    monkeypatch.setattr(caching, "FORMAT", caching.FORMAT + 1)
    assert caching.key_of(tiny.golden()) != before


# --- the file ----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """The tiny templates on disk."""
    path = tmp_path / "one.safetensors"
    caching.write(tiny.bank(), path)
    return path


def test_a_file_is_read_as_it_was_written(file):
    """Every array and word of the templates comes back to the bit."""
    assert same(caching.read(file), tiny.bank())


def test_templates_without_any_bug_come_back(tmp_path):
    """None at all is a result too, and is not made again and again."""
    bank = tiny.bank()
    noises = {
        name: replace(noise, along=noise.along[..., :0], gram=noise.gram[..., :0, :0])
        for name, noise in bank.noises.items()
    }
    empty = replace(bank, names=(), wrong=(), places=(), codes=bank.codes[:0], scales=bank.scales[:0], noises=noises)
    caching.write(empty, tmp_path / "empty")
    assert same(caching.read(tmp_path / "empty"), empty)


def test_a_missing_file_is_none(tmp_path):
    """Nothing there, and a directory of that name, are no templates."""
    assert caching.read(tmp_path / "nothing") is None
    assert caching.read(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"[" * 9000]
)
def test_what_is_no_file_of_templates_is_none(tmp_path, content):
    """Whatever bytes lie there are not opened as templates, and no error escapes."""
    (tmp_path / "one").write_bytes(content)
    assert caching.read(tmp_path / "one") is None


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_a_truncated_file_is_none(file, share):
    """A file that ends early is made again, whatever is left of it."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert caching.read(file) is None


def rewritten(file, change):
    """The file with its words and arrays changed."""
    payload = file.read_bytes()
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    words, arrays = json.loads(header["__metadata__"]["words"]), load(payload)
    words = change(words, arrays) or words
    file.write_bytes(save(arrays, metadata={"words": json.dumps(words)}))


def _cut(name):
    return lambda _words, arrays: arrays.update({name: np.ascontiguousarray(arrays[name][:-1])})


def _typed(name, dtype):
    return lambda _words, arrays: arrays.update({name: arrays[name].astype(dtype)})


CHANGES = {
    "no names": lambda words, _: words.pop("names") and None,
    "fewer names": lambda words, _: words["names"].pop() and None,
    "names of another kind": lambda words, _: words.update(names=3),
    "left_out is a list": lambda words, _: words.update(left_out=["na-gelu"]),
    "words are a list": lambda words, _: [words],
    "another precision": lambda words, _: words.update(precisions=["float16"]),
    "another format": lambda words, _: words.update(format=caching.FORMAT + 1),
    "a strength that is none": lambda words, _: words["names"][0].reverse(),
    "no codes": lambda _, arrays: arrays.pop("codes") is None,
    "flat codes": lambda _, arrays: arrays.update(codes=arrays["codes"].reshape(-1)),
    "flat basis": lambda _, arrays: arrays.update(basis=arrays["basis"].reshape(-1)),
    "fewer rows": _cut("place"),
    "fewer scales": _cut("scales"),
    "another turn": _cut("turn"),
    "another centre": _cut("centre.bfloat16"),
    "another mean": _cut("noise.bfloat16.mean"),
    "another gram": _cut("noise.bfloat16.gram"),
    "fewer sums": lambda _, arrays: arrays.update(
        {"noise.bfloat16.along": np.ascontiguousarray(arrays["noise.bfloat16.along"][..., :-1])}
    ),
    "fewer squares": lambda _, arrays: arrays.update(
        {"noise.bfloat16.square": np.ascontiguousarray(arrays["noise.bfloat16.square"][..., :-1])}
    ),
    "codes of another type": _typed("codes", np.float32),
    "places of another type": _typed("place", np.float64),
    "fewer reasons": lambda words, _: words["wrong"].pop() and None,
    "no views": lambda words, _: words.update(views=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_the_wrong_content_is_none(file, change):
    """A file that is whole and does not hold what templates hold is made again, and never half believed."""
    rewritten(file, CHANGES[change])
    assert caching.read(file) is None


def test_damaged_templates_are_made_again(made, tmp_path):
    """A file that cannot be read is replaced by a good one, and then read."""
    first = asked(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert same(asked(tmp_path), first)
    assert same(asked(tmp_path), first)
    assert len(made.calls) == 2


def test_a_file_of_something_else_is_made_again(made, tmp_path):
    """Another safetensors file under the key's name is no error."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / f"{caching.key_of(tiny.golden())}.safetensors"
    save_file({"a": np.zeros(3)}, path)
    assert same(asked(tmp_path), tiny.bank())
    assert len(made.calls) == 1
    assert "codes" in load_file(path)


def test_a_failed_write_leaves_what_was_there(file, monkeypatch):
    """Where a file cannot be replaced the old one stays whole, and nothing is left beside it."""
    before = file.read_bytes()

    def fails(*_arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("harness.files.os.replace", fails)
    with pytest.raises(OSError, match="full"):
        caching.write(replace(tiny.bank(), seconds=99.0), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_nothing_is_kept_where_making_fails(monkeypatch, tmp_path):
    """An error while making leaves no file, and the next time it is tried again."""

    def fails(*_arguments, **_options):
        raise UsageError("no", fix="none")

    monkeypatch.setattr(making, "make", fails)
    for _ in range(2):
        with pytest.raises(UsageError):
            asked(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_two_at_once_make_them_once(monkeypatch, tmp_path):
    """Who comes while another makes the same templates waits for them, and reads them."""
    entered, go, calls = threading.Event(), threading.Event(), []
    bank = tiny.bank()

    def slow(*_arguments, **_options):
        calls.append(threading.current_thread().name)
        entered.set()
        assert go.wait(20)
        return bank

    monkeypatch.setattr(making, "make", slow)
    found = {}
    workers = [threading.Thread(target=lambda n=n: found.update({n: asked(tmp_path)}), name=str(n)) for n in range(2)]
    workers[0].start()
    assert entered.wait(20)
    workers[1].start()
    workers[1].join(0.3)
    assert workers[1].is_alive()
    assert not list(tmp_path.glob("*.safetensors"))
    go.set()
    for worker in workers:
        worker.join(20)
    assert calls == ["0"]
    assert same(found[1], found[0])


def test_a_relative_cache_is_not_another(monkeypatch, tmp_path):
    """The directory may be named relative to where one stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", "mine")
    assert caching.directory() == Path("mine/templates")
