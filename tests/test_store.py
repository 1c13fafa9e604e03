"""A golden survives writing and reading to the bit; nothing damaged or hostile gets in; no killed writer breaks it."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from harness import store
from harness.arrays import ARRAYS_NAME
from harness.errors import GoldenError
from harness.files import content_digest
from harness.store import JSON_NAME, list_goldens, read_golden, write_golden
from harness.values import Centre, Generation, Golden, Moments
from tests.killing import Forks
from tests.support import read_json

#: Steps of the file system that a write is made of; a kill can fall before each.
STEPS = ((os, "replace"), (os, "fsync"), (os, "chmod"), (tempfile, "mkstemp"), (Path, "unlink"), (Path, "mkdir"))


@pytest.fixture(scope="session")
def stored(small_home) -> Path:
    """The directory of a recorded golden (read only)."""
    return small_home / "golden" / "small" / "small"


@pytest.fixture(scope="session")
def golden(stored) -> Golden:
    """A recorded golden."""
    return read_golden(stored)


@pytest.fixture
def victim(stored, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(stored, tmp_path / "victim"))


def reworded(golden):
    """The same numbers with another history, as `record --update` of an unchanged model gives."""
    return replace(golden, provenance={**golden.provenance, "history": [{"date": "2001-01-01", "reason": "again"}]})


def changed(golden):
    """Other words, other numbers, and what the recorded golden lacks: a centre, a floor of tensor parallelism with
    fewer replicas, other directions, stop ids, an eos, an umlaut."""
    rows = replace(golden.rows, projections=golden.rows.projections + 1, argmax=golden.rows.argmax[::-1].copy())
    centre = Centre(
        logsumexp=rows.logsumexp * 2,
        logp=rows.logp - 1,
        entropy=rows.entropy + 0.25,
        projections=rows.projections * 3,
        top_ids=rows.top_ids[:, ::-1].copy(),
        top_logits=rows.top_logits * 0.5,
        shift=0.1 + 0.2,
        inexact_tensors=3,
    )
    floor = golden.floors["bfloat16"]
    moments = {field.name: getattr(floor.moments, field.name)[:3] + 1 for field in dataclasses.fields(Moments)}
    fewer = replace(floor, sigma=floor.sigma * 2, moments=Moments(**moments), families=("one", "zwölf", "three"))
    request = replace(golden.requests[0], text='Größe "✓"\n\u2028')
    first, *others = golden.generations
    return replace(
        reworded(golden),
        rows=rows,
        centres={"float16": centre},
        floors={**golden.floors, "bfloat16/tp2": fewer},
        directions={"int4": golden.directions["int8"], "something": -golden.directions["int4"]},
        requests=(request, *golden.requests[1:]),
        generations=(Generation(tokens=first.tokens, finish="eos"), *others),
        model=replace(golden.model, path=None),
        tokenizer_digest=None,
        stop_ids=(2, 300),
    )


def bare(golden):
    """What a golden need not have: directions, and more than one floor."""
    floor = golden.floors["float32"]
    moments = replace(floor.moments, along=floor.moments.along[..., :0])
    return replace(reworded(golden), directions={}, floors={"float32": replace(floor, moments=moments)})


def content(golden):
    """Everything that a golden says, in values that compare bit for bit; where it lies is not part of it."""
    return bits(dataclasses.asdict(replace(golden, directory=None)))


def bits(value):
    """Arrays as dtype, shape and bytes, and sequences as tuples, all the way down."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(bits(item) for item in value)
    return value


def files(directory):
    """Name and bytes of every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refusal(directory, *names):
    """The one line that refuses a golden; it names one of the files and says how to mend it."""
    with pytest.raises(GoldenError) as caught:
        read_golden(directory)
    message, fix = str(caught.value), caught.value.fix
    assert len(message.splitlines()) == 1
    assert message.endswith(fix)
    assert fix
    assert any(str(directory / name) in message for name in names or (JSON_NAME, ARRAYS_NAME))
    return message


def sign(directory, edit=lambda document: None):
    """Edit golden.json and make both digests right again: what a hostile author would do."""
    document = read_json(directory / JSON_NAME)
    payload = (directory / ARRAYS_NAME).read_bytes()
    document["arrays"].update(sha256=hashlib.sha256(payload).hexdigest(), bytes=len(payload))
    edit(document)
    document["digest"] = content_digest(document)
    (directory / JSON_NAME).write_text(json.dumps(document), encoding="utf-8")


def put(directory, payload, *, signed):
    """Replace the arrays by ``payload``, with or without digests that match."""
    (directory / ARRAYS_NAME).write_bytes(payload)
    if signed:
        sign(directory)


# --- writing and reading -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [reworded, changed, bare])
def test_everything_comes_back(golden, tmp_path, make):
    """Every field of a golden, and every array to the bit, is read as it was written."""
    expected = make(golden)
    write_golden(expected, tmp_path / "new" / "golden")
    again = read_golden(tmp_path / "new" / "golden")
    assert content(again) == content(expected)
    assert again.directory == str(tmp_path / "new" / "golden")
    assert content(expected) != content(golden)


def test_two_readable_files_are_written(golden, tmp_path):
    """There are two files that everybody may read, and no leftover."""
    write_golden(golden, tmp_path)
    assert sorted(files(tmp_path)) == [JSON_NAME, ARRAYS_NAME]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("make", [reworded, changed, bare])
def test_writing_again_gives_the_same_bytes(golden, tmp_path, make):
    """A golden that did not change makes no diff, also after it was read back."""
    write_golden(make(golden), tmp_path)
    before = files(tmp_path)
    write_golden(make(golden), tmp_path)
    assert files(tmp_path) == before
    write_golden(read_golden(tmp_path), tmp_path / "copy")
    assert files(tmp_path / "copy") == before


def test_the_json_is_for_people(golden, tmp_path):
    """One key a line, the ids of a prompt on one line, letters as they are, no line longer than its list."""
    write_golden(changed(golden), tmp_path)
    text = (tmp_path / JSON_NAME).read_text(encoding="utf-8")
    tokens = ", ".join(map(str, golden.generations[1].tokens))
    assert f'\n      "tokens": [{tokens}],\n' in text
    assert "Größe" in text
    assert '\n  "vocabulary": 301,\n' in text
    assert text.endswith("}\n")


def test_the_layout_of_the_json_may_change(victim, golden):
    """Whitespace and the order of keys carry nothing: a formatter does not break a golden."""
    document = read_json(victim / JSON_NAME)
    text = json.dumps(dict(reversed(document.items())), indent=7, ensure_ascii=True)
    (victim / JSON_NAME).write_text(text, encoding="utf-8")
    assert content(read_golden(victim)) == content(golden)


def test_goldens_are_listed_in_order(golden, tmp_path):
    """Directories with a golden are found at any depth, sorted; elsewhere there are none."""
    for name in ("b/suite", "a/x/suite", "a/suite"):
        write_golden(golden, tmp_path / name)
    (tmp_path / "a" / "model").mkdir()
    assert list_goldens(tmp_path) == [tmp_path / name for name in ("a/suite", "a/x/suite", "b/suite")]
    assert list_goldens(tmp_path / "nowhere") == []


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 100, "half", -2])  # -1 of the JSON is only its last newline
@pytest.mark.parametrize("name", [JSON_NAME, ARRAYS_NAME])
def test_a_truncated_file_is_refused(victim, name, kept):
    """A file cut anywhere is refused by its name."""
    payload = (victim / name).read_bytes()
    (victim / name).write_bytes(payload[: len(payload) // 2 if kept == "half" else kept])
    refusal(victim, name)


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_in_the_arrays_is_refused(victim, seed):
    """One bit anywhere in golden.safetensors is seen."""
    flip(victim / ARRAYS_NAME, seed)
    refusal(victim, ARRAYS_NAME)


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_in_the_json_is_refused_or_harmless(victim, golden, seed):
    """One bit anywhere in golden.json is seen, unless the values are the same (1e-05 and 1E-05)."""
    flip(victim / JSON_NAME, seed)
    try:
        read = read_golden(victim)
    except GoldenError:
        refusal(victim, JSON_NAME)
    else:
        assert content(read) == content(golden)


def flip(path, seed):
    """Flip one bit, drawn from the seed."""
    payload = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(payload))
    payload[bit // 8] ^= 1 << bit % 8
    path.write_bytes(payload)


@pytest.mark.parametrize("name", [JSON_NAME, ARRAYS_NAME])
def test_a_missing_file_or_a_directory_in_its_place_is_refused(victim, name):
    """Half a golden is none."""
    (victim / name).unlink()
    without = refusal(victim, name, "")
    (victim / name).mkdir()
    assert refusal(victim, name, "") == without


def test_no_golden_at_all_is_said_as_such(tmp_path):
    """A wrong path is not a damaged golden, and the next command is named."""
    message = refusal(tmp_path / "nowhere", "")
    assert "there is no golden at" in message
    assert "harness record" in message


def test_arrays_of_another_golden_are_refused(victim, golden, tmp_path):
    """The JSON of one golden beside the arrays of another is no golden."""
    write_golden(changed(golden), tmp_path / "other")
    shutil.copy(tmp_path / "other" / ARRAYS_NAME, victim / ARRAYS_NAME)
    assert "is damaged: its SHA-256 is not the one in golden.json" in refusal(victim, ARRAYS_NAME)


def test_a_file_larger_than_memory_is_not_read(victim):
    """A golden.safetensors of a tebibyte (sparse) costs neither memory nor time."""
    os.truncate(victim / ARRAYS_NAME, 2**40)
    started = time.monotonic()
    refusal(victim, ARRAYS_NAME)
    assert time.monotonic() - started < 5


def test_a_json_larger_than_any_golden_is_not_read(victim):
    """A golden.json of a tebibyte (sparse) is refused by its size."""
    os.truncate(victim / JSON_NAME, 2**40)
    assert "1,099,511,627,776 bytes, which no golden.json has" in refusal(victim, JSON_NAME)


NO_GOLDEN = {
    "text": (b"not JSON at all", "is not JSON (JSONDecodeError)"),
    "binary": (bytes(range(256)), "is not JSON (UnicodeDecodeError)"),
    "half a character": (b'{"format": 2, "name": "\xc3"}', "is not JSON (UnicodeDecodeError)"),
    "deep": (b"[" * 200_000, "is not JSON (RecursionError)"),
    "deep objects": (b'{"a":' * 200_000, "is not JSON (RecursionError)"),
    "a very long number": (b'{"format": 2, "vocabulary": ' + b"9" * 100_000 + b"}", "is not JSON (ValueError)"),
    "a pickle": (pickle.dumps({"format": 2}), "is not JSON (UnicodeDecodeError)"),
    "a list": (b"[1, 2]", "is JSON but not a golden"),
    "a number": (b"1", "is JSON but not a golden"),
    "another object": (b'{"a": 1}', "is JSON but not a golden"),
    "an infinity": (b'{"format": 2, "digest": "x", "vocabulary": 1e999}', "was changed after it was written"),
    "format alone": (b'{"format": 2}', "was changed after it was written"),
}


@pytest.mark.parametrize(("payload", "words"), NO_GOLDEN.values(), ids=NO_GOLDEN)
def test_what_is_not_the_json_of_a_golden_is_refused(victim, payload, words):
    """Text, binary, endless nesting, endless numbers, other JSON: one line each."""
    (victim / JSON_NAME).write_bytes(payload)
    assert words in refusal(victim, JSON_NAME)


@pytest.mark.parametrize("depth", [100, 800, 900, 980, 1000, 5000])
def test_nesting_of_any_depth_is_refused(victim, depth):
    """Whether parsing or digesting gives up first: one line."""
    (victim / JSON_NAME).write_text('{"format": 2, "name": ' + "[" * depth + "]" * depth + "}", encoding="utf-8")
    refusal(victim, JSON_NAME)


@pytest.mark.parametrize("number", [0, 1, 3, 2.5, "2", None, 10**30])
def test_another_format_is_refused_with_both_numbers(victim, number):
    """The golden of another version says which one, and which one is read here."""
    sign(victim, lambda document: document.update(format=number))
    assert f"format {number!r}, this version reads {store.FORMAT}" in refusal(victim, JSON_NAME)


def test_a_changed_value_is_refused(victim):
    """Editing golden.json by hand breaks its digest."""
    document = read_json(victim / JSON_NAME)
    document["prompts"][0]["tokens"][0] += 1
    (victim / JSON_NAME).write_text(json.dumps(document), encoding="utf-8")
    assert "was changed after it was written" in refusal(victim, JSON_NAME)


# --- hostile authors: the digests are right ------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(kind, marker):
    """A pickle, or torch's zip archive of one, that makes ``marker``."""
    if kind != "torch":
        return pickle.dumps(Bomb(marker), protocol=int(kind))
    with tempfile.TemporaryFile() as opened:
        torch.save(Bomb(marker), opened)
        opened.seek(0)
        return opened.read()


@pytest.mark.parametrize("signed", [False, True], ids=["wrong digest", "right digest"])
@pytest.mark.parametrize("name", [JSON_NAME, ARRAYS_NAME])
@pytest.mark.parametrize("kind", ["0", "2", "5", "torch"])
def test_a_pickle_is_never_opened(victim, tmp_path, kind, name, signed):
    """A pickle in the place of either file is refused, and its payload does not run."""
    payload = pickled(kind, tmp_path / "marker")
    if name == ARRAYS_NAME:
        put(victim, payload, signed=signed)
    else:
        (victim / name).write_bytes(payload)
    message = refusal(victim, name)
    assert not (tmp_path / "marker").exists()
    if name == ARRAYS_NAME and not signed and kind != "0":
        assert "is a pickle or a zip archive, which is never opened" in message


def test_the_pickle_of_these_tests_is_live(tmp_path):
    """Unpickled, the payload does make its marker: the test above could fail."""
    pickle.loads(pickled("5", tmp_path / "marker"))  # noqa: S301 - the test's own payload
    assert (tmp_path / "marker").exists()


def tensor_file(header, data=b"", *, length=None):
    """A safetensors file with a header of our own, and perhaps a length that lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"reference.argmax": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


NO_TENSORS = {
    "empty": b"",
    "seven bytes": b"\x00" * 7,
    "zeros": b"\x00" * 64,
    "header longer than the file": tensor_file({}, length=10**6),
    "header of 2^63": tensor_file({}, length=2**63),
    "header of 2^64 - 1": tensor_file({}, length=2**64 - 1),
    "header cut": tensor_file(_tensor(), b"0000", length=10),
    "header is a list": tensor_file([]),
    "header is no text": tensor_file(b"\xff\xfe" * 20),
    "header nested without end": tensor_file(b'{"a":' * 100_000),
    "metadata of numbers": tensor_file({"__metadata__": {"a": 1}}),
    "no tensor": tensor_file({}),
    "offsets beyond the end": tensor_file(_tensor(offsets=(0, 2**40)), b"0000"),
    "offsets reversed": tensor_file(_tensor(offsets=(4, 0)), b"0000"),
    "shape of 2^64 elements": tensor_file(_tensor(shape=(2**62, 4)), b"0000"),
    "shape of no element": tensor_file(_tensor(shape=(0, 2**63), offsets=(0, 0))),
    "a dtype that numpy lacks": tensor_file(_tensor("BF16", (2,)), b"0000"),
    "a dtype of nobody": tensor_file(_tensor("F99"), b"0000"),
}


@pytest.mark.parametrize("signed", [False, True], ids=["wrong digest", "right digest"])
@pytest.mark.parametrize("payload", NO_TENSORS.values(), ids=NO_TENSORS)
def test_no_safetensors_file_is_refused(victim, payload, signed):
    """Headers that lie, nest or overflow are refused, whether the digests are right or not."""
    put(victim, payload, signed=signed)
    refusal(victim)


def _narrow(array):
    return array[..., :-1]


def _wide(array):
    return array.astype(np.float64)


def _flat(array):
    return array.reshape(-1, 1, 1)


def _none(array):
    return array[:0]


def _scalar(array):
    return array.reshape(-1)[0]


def _nan(array):
    return np.full_like(array, np.nan)


def _infinite(array):
    return np.concatenate([array[:-1], np.full_like(array[-1:], np.inf)])


@pytest.mark.parametrize("mutate", [_narrow, _wide, _flat, _none, _scalar, _nan, _infinite])
def test_arrays_that_do_not_fit_are_refused_by_name(victim, golden, mutate):
    """Another shape or dtype, a NaN or an infinity in any one array is refused, the array named."""
    write_golden(changed(golden), victim)
    arrays = load((victim / ARRAYS_NAME).read_bytes())
    assert set(arrays) == array_names(changed(golden))
    tried = [name for name, array in arrays.items() if mutate not in (_nan, _infinite) or array.dtype.kind == "f"]
    # Token ids alone are no floats.
    assert len(arrays) - len(tried) in (0, 3)
    for name in tried:
        array = arrays[name]
        put(victim, save({**arrays, name: np.ascontiguousarray(mutate(array))}), signed=True)
        message = refusal(victim, JSON_NAME)
        # The width of the top entries is told by the reference's ids: there, another array is the first that differs.
        assert f"the array {name} " in message or (name == "reference.top_ids" and "top_logits" in message)


def array_names(golden):
    """Name of every array that is stored."""
    floats = ("logsumexp", "logp", "entropy", "projections", "top_logits", "top_ids")
    moments = [field.name for field in dataclasses.fields(Moments)]
    assert len(moments) == 13
    return {
        "reference.argmax",
        *(f"reference.{name}" for name in floats),
        *(f"centre.{precision}.{name}" for precision in golden.centres for name in floats),
        *(f"floor.{precision}.{name}" for precision in golden.floors for name in ("sigma", "pair", *moments)),
        *(f"direction.{name}" for name in golden.directions),
    }


def test_arrays_are_of_the_dtypes_that_are_said(golden, tmp_path):
    """Ids are int32, directions half as wide as all other floats, and a replica's axis comes first."""
    write_golden(changed(golden), tmp_path)
    arrays = load((tmp_path / ARRAYS_NAME).read_bytes())
    for name, array in arrays.items():
        expected = "int32" if name.endswith(("ids", "argmax")) else "float16" if "direction." in name else "float32"
        assert str(array.dtype) == expected, name
    prompts, two = len(golden.requests), len(changed(golden).directions)
    assert arrays["floor.bfloat16/tp2.along"].shape == (3, prompts, 2, two)
    assert arrays["floor.bfloat16.square"].shape == (len(golden.floors["bfloat16"].families), prompts, 2)


def test_arrays_that_are_missing_are_refused_by_name(victim, golden):
    """A golden without one of its arrays names that array."""
    write_golden(changed(golden), victim)
    arrays = load((victim / ARRAYS_NAME).read_bytes())
    for name in arrays:
        put(victim, save({key: array for key, array in arrays.items() if key != name}), signed=True)
        assert f"the array {name} is missing" in refusal(victim, JSON_NAME)


def test_arrays_that_agree_on_a_wrong_size_are_refused(victim):
    """No top entry at all and no replica at all would leave nothing to compare: neither gets in."""
    arrays = load((victim / ARRAYS_NAME).read_bytes())
    put(victim, save({name: array[:, :0] if "top" in name else array for name, array in arrays.items()}), signed=True)
    assert "top_ids" in refusal(victim, JSON_NAME)
    kept = {name: array[:0] if is_moment(name) else array for name, array in arrays.items()}
    put(victim, save(kept), signed=False)
    sign(victim, lambda document: [words.update(replicas=0, families=[]) for words in document["floors"].values()])
    assert "0 replicas" in refusal(victim, JSON_NAME)


def is_moment(name):
    """Whether an array has an entry for each replica."""
    return name.startswith("floor.") and not name.endswith((".sigma", ".pair"))


@pytest.mark.parametrize("cut", [slice(None, -1), slice(1)], ids=["one replica less", "one replica alone"])
def test_replicas_that_are_fewer_than_their_families_are_refused(victim, cut):
    """Moments of fewer replicas than the JSON names, all of them alike, leave a floor that is not what it says."""
    arrays = load((victim / ARRAYS_NAME).read_bytes())
    kept = {name: np.ascontiguousarray(array[cut]) if is_moment(name) else array for name, array in arrays.items()}
    put(victim, save(kept), signed=True)
    assert "the array floor.float32.square is" in refusal(victim, JSON_NAME)
    count = len(kept["floor.float32.square"])
    sign(victim, lambda document: [words.update(replicas=count) for words in document["floors"].values()])
    assert f"24 families for {count} replicas" in refusal(victim, JSON_NAME)
    sign(victim, lambda document: [words.update(families=["x"] * count) for words in document["floors"].values()])
    assert {floor.replicas for floor in read_golden(victim).floors.values()} == {count}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["int8"], "along"),
        (["int8", "int4", "int2"], "along"),
        ([], "along"),
        (["int8", "int2"], "the array direction.int2 is missing"),
        (["int8", ""], "the array direction. is missing"),
        (["int8", 4], "direction"),
        (["int8", None], "direction"),
        (["int8", ["int4"]], "direction"),
        (None, "NoneType"),
        (7, "int"),
    ],
    ids=str,
)
def test_directions_that_do_not_match_the_arrays_are_refused(victim, names, words):
    """The list of directions names each of the arrays, once, and the replicas have a number for each."""
    assert read_json(victim / JSON_NAME)["directions"] == ["int8", "int4"]
    sign(victim, lambda document: document.update(directions=names))
    assert words in refusal(victim, JSON_NAME)


def test_a_direction_that_is_named_twice_is_refused(victim):
    """Two columns of the replicas cannot belong to one direction."""
    sign(victim, lambda document: document.update(directions=["int8", "int8"]))
    refusal(victim, JSON_NAME)


HOSTILE_VALUES = (None, True, -1, 10**400, 1e308, "", "x\ny", [], [[]], {}, ["a"], [None], {"a": 1})


def test_hostile_json_is_read_or_refused_never_a_crash(victim):
    """Each value of golden.json, replaced by values of other kinds, with right digests: GoldenError or a golden."""
    document = read_json(victim / JSON_NAME)
    refusals = []
    for path in places(document):
        for value in HOSTILE_VALUES:
            holder = edited = json.loads(json.dumps(document))
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            edited["digest"] = content_digest(edited)
            (victim / JSON_NAME).write_text(json.dumps(edited), encoding="utf-8")
            try:
                read_golden(victim)
            except GoldenError as error:
                refusals.append(str(error))
    assert len(refusals) > 500
    assert all(len(line.splitlines()) == 1 for line in refusals)


def places(value, path=()):
    """The key paths of every value that decides something, of a list only the first."""
    keys = value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ()
    for key in keys:
        if (*path, key) != ("digest",) and path[:1] != ("provenance",):
            yield (*path, key)
            yield from places(value[key], (*path, key))


HOSTILE_EDITS = {
    "a token outside the vocabulary": lambda document: document["prompts"][0]["tokens"].__setitem__(0, 301),
    "a prompt id outside the vocabulary": lambda document: document["prompts"][1]["prompt_ids"].__setitem__(0, 2**31),
    "no prompts": lambda document: document.update(prompts=[]),
    "one token more than rows": lambda document: document["prompts"][2]["tokens"].append(1),
    "another random projection": lambda document: document.update(projections="something else"),
    "a number too large for a float": lambda document: document["floors"]["float32"].update(effective=10**400),
    "a suite with an unknown key": lambda document: document["suite"].update(surprise=1),
    "no arrays named": lambda document: document.update(arrays=None),
    "a digest that is a number": lambda document: document["arrays"].update(sha256=1),
    "a digest that is a path": lambda document: document["arrays"].update(sha256="../../../../etc/passwd"),
    "fewer families than replicas": lambda document: document["floors"]["float32"]["families"].pop(),
    "more families than replicas": lambda document: document["floors"]["bfloat16"]["families"].append("x"),
    "no families": lambda document: document["floors"]["float32"].pop("families"),
    "families that are a number": lambda document: document["floors"]["float32"].update(families=24),
    "replicas that are a fraction": lambda document: document["floors"]["float32"].update(replicas=24.0),
    "no directions": lambda document: document.pop("directions"),
    "directions that are a word": lambda document: document.update(directions="int8"),
    "an undefined precision": lambda document: document["floors"].update(float8=document["floors"]["float32"]),
    "a finish of its own": lambda document: document["prompts"][0].update(finish="tired"),
}


@pytest.mark.parametrize("edit", HOSTILE_EDITS.values(), ids=HOSTILE_EDITS)
def test_values_that_contradict_each_other_are_refused(victim, edit):
    """What no recording writes is refused even when every digest is right."""
    sign(victim, edit)
    refusal(victim)


# --- killed ------------------------------------------------------------------------------------


def before_each_step(monkeypatch, action):
    """Call ``action()`` before each step of the file system; steps that ``action`` takes itself do not count."""
    inside = False

    def watched(original):
        def step(*arguments, **options):
            nonlocal inside
            if not inside:
                inside = True
                try:
                    action()
                finally:
                    inside = False
            return original(*arguments, **options)

        return step

    for holder, name in STEPS:
        monkeypatch.setattr(holder, name, watched(getattr(holder, name)))


def states_of_a_write(monkeypatch, golden, directory, snapshots):
    """The directory as a kill before each step of ``write_golden`` would leave it, and at the end."""
    states = []

    def keep():
        states.append(Path(shutil.copytree(directory, snapshots / str(len(states)))))

    with monkeypatch.context() as patched:
        before_each_step(patched, keep)
        write_golden(golden, directory)
    keep()
    return states


@pytest.mark.parametrize("make", [reworded, changed])
def test_a_kill_before_any_step_leaves_the_old_golden_or_the_new_one(monkeypatch, victim, golden, tmp_path, make):
    """At each step of a write the directory reads as the old golden, then as the new one, and never as a mixture."""
    old, new = content(golden), content(make(golden))
    states = states_of_a_write(monkeypatch, make(golden), victim, tmp_path / "states")
    seen = [content(read_golden(state)) for state in states]
    assert all(one in (old, new) for one in seen)
    switched = seen.index(new)
    assert 4 <= switched < len(seen) - 2  # there are steps before the commit, and after it
    assert all(one == new for one in seen[switched:])


def test_whatever_a_kill_left_the_next_write_cleans_up(monkeypatch, victim, golden, tmp_path):
    """Leftovers of a killed write neither break the next one nor stay behind it."""
    states = states_of_a_write(monkeypatch, changed(golden), victim, tmp_path / "states")
    assert any(len(files(state)) > 2 for state in states)
    for state in states:
        for last in (golden, changed(golden)):
            write_golden(last, state)
            assert sorted(files(state)) == [JSON_NAME, ARRAYS_NAME]
            assert content(read_golden(state)) == content(last)


def test_a_kill_while_a_killed_write_is_followed_up_breaks_nothing(monkeypatch, victim, golden, tmp_path):
    """Over each kind of leftovers the next write may be killed at each of its steps too."""
    states = states_of_a_write(monkeypatch, changed(golden), victim, tmp_path / "states")
    kinds = {(frozenset(path.suffix for path in one.iterdir()), read_golden(one).stop_ids): one for one in states}
    assert len(kinds) >= 5
    for number, state in enumerate(kinds.values()):
        allowed = (content(read_golden(state)), content(reworded(golden)))
        later = states_of_a_write(monkeypatch, reworded(golden), state, tmp_path / f"later-{number}")
        assert all(content(read_golden(one)) in allowed for one in later)


def test_a_first_write_that_is_killed_leaves_no_golden_or_the_whole_one(monkeypatch, golden, tmp_path):
    """Where there was no golden, half a one is said to be none."""
    (tmp_path / "new").mkdir()
    states = states_of_a_write(monkeypatch, golden, tmp_path / "new", tmp_path / "states")
    whole = [state for state in states if (state / JSON_NAME).exists()]
    assert 2 < len(whole) < len(states)
    assert all(content(read_golden(state)) == content(golden) for state in whole)
    assert all("there is no golden at" in refusal(state, "") for state in states if state not in whole)


@pytest.mark.parametrize("make", [reworded, changed])
def test_a_step_that_fails_leaves_the_old_golden_or_the_new_one(monkeypatch, victim, golden, make):
    """A full disk at any step raises, leaves a sound golden, and the next write succeeds."""
    old, new = content(golden), content(make(golden))
    for failing in range(100):
        write_golden(golden, victim)
        count = 0

        def fail(failing=failing):
            nonlocal count
            count += 1
            if count == failing + 1:
                raise OSError(errno.ENOSPC, "no space left on device")

        with monkeypatch.context() as patched:
            before_each_step(patched, fail)
            try:
                write_golden(make(golden), victim)
            except OSError:
                assert content(read_golden(victim)) in (old, new)
                continue
        break
    assert 8 <= failing == count
    assert content(read_golden(victim)) == new
    assert sorted(files(victim)) == [JSON_NAME, ARRAYS_NAME]


WRITER = """
from pathlib import Path
from harness.store import read_golden, write_golden

assert "torch" not in sys.modules, "a round must cost milliseconds"
first, second = (read_golden(Path(name)) for name in ("first", "second"))

def work(line):
    for number in range(1000):
        if number == int(line):
            Path("ready").touch()
        write_golden(first if number % 2 else second, Path("victim"))
"""


def test_a_killed_writer_leaves_the_old_golden_or_the_new_one(golden, tmp_path):
    """SIGKILL at 39 random moments while two goldens are written in turn: one of the two is there, whole."""
    directory = tmp_path / "work"
    write_golden(golden, directory / "first")
    write_golden(changed(golden), directory / "second")
    started = time.monotonic()
    write_golden(golden, directory / "victim")
    seconds = time.monotonic() - started
    known = [content(golden), content(changed(golden))]
    draw = random.Random(7)
    found, inside = [], 0
    with Forks(WRITER, directory) as forks:
        for number in range(39):
            pid = forks.start(str(number % 3))  # complete writes before the one that is killed, or the next
            wait_for(directory / "ready")
            time.sleep(draw.uniform(0, 1.5 * seconds))
            assert forks.signal(pid, signal.SIGKILL) == -signal.SIGKILL
            (directory / "ready").unlink()
            found.append(known.index(content(read_golden(directory / "victim"))))
            inside += len(files(directory / "victim")) > 2
    print(f"{inside} of 39 kills left a write half done; the golden then was the first {found.count(0)} times")
    assert inside > 0
    assert 0 < found.count(0) < 39
    write_golden(golden, directory / "victim")
    assert sorted(files(directory / "victim")) == [JSON_NAME, ARRAYS_NAME]


def wait_for(path, seconds=60):
    """Wait until a file is there."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"{path} does not appear"
        time.sleep(0.001)


def test_a_writer_waits_for_another(victim, golden):
    """While one process holds the directory, another writer changes nothing in it; then it goes on."""
    before = files(victim)
    holder = os.open(victim, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write_golden, changed(golden), victim)
        time.sleep(0.3)
        assert files(victim) == before
        os.close(holder)
        writer.result(60)
    assert content(read_golden(victim)) == content(changed(golden))


def test_writers_at_once_do_not_mix(golden, tmp_path):
    """None of three writers disturbs another, and what stays is the golden of one of them."""
    goldens = [golden, changed(golden), reworded(golden)]
    with ThreadPoolExecutor(len(goldens)) as pool:
        for done in [pool.submit(write_golden, one, tmp_path) for _ in range(8) for one in goldens]:
            done.result(60)
    assert content(read_golden(tmp_path)) in [content(one) for one in goldens]
    assert sorted(files(tmp_path)) == [JSON_NAME, ARRAYS_NAME]
