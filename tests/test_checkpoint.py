"""A checkpoint's identity follows its tensors: every bit, name, shape and dtype, and nothing of how files hold them."""

import os
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from harness import checkpoint
from harness.checkpoint import identify
from harness.errors import ModelError


def tensors():
    """Three tensors of two dtypes; the bfloat16 ones hold most elements."""
    return {
        "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "b.bias": torch.tensor([0.5, -0.0, float("nan")], dtype=torch.float32),
        "c.weight": torch.ones(2, 1, 3, dtype=torch.bfloat16),
    }


def identity(directory, *shards):
    """Write the shards, each a dict of tensors, and identify the directory."""
    directory.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, directory / f"model-{number}.safetensors")
    return identify(directory)


@pytest.fixture
def base(tmp_path):
    """The identity of `tensors()` in one file."""
    return identity(tmp_path / "base", tensors())


def refusal(directory):
    """The one line that refuses a model directory."""
    with pytest.raises(ModelError) as caught:
        identify(directory)
    assert len(str(caught.value).splitlines()) == 1
    assert str(directory) in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


def test_what_it_says(base):
    """Parameters are counted over all tensors, and the dtype is the one of most elements."""
    assert base.parameters == 12 + 3 + 6
    assert base.dtype == "bfloat16"
    assert len(base.digest) == len(base.signature) == 64
    assert base.digest != base.signature


def test_shards_order_and_file_names_do_not_matter(base, tmp_path):
    """The same tensors in two files, in another order, under other names, with metadata, are the same checkpoint."""
    names = sorted(tensors(), reverse=True)
    assert identity(tmp_path / "two", {names[0]: tensors()[names[0]]}, {n: tensors()[n] for n in names[1:]}) == base
    assert identity(tmp_path / "three", *({name: tensors()[name]} for name in names)) == base
    (tmp_path / "renamed").mkdir()
    save_file(tensors(), tmp_path / "renamed" / "weights.safetensors", metadata={"format": "pt", "by": "somebody"})
    (tmp_path / "renamed" / "config.json").write_text("{}", encoding="utf-8")
    assert identify(tmp_path / "renamed") == base


@pytest.mark.parametrize("bit", [0, 7, 15])
@pytest.mark.parametrize("element", [0, 5, 11])
def test_one_bit_of_a_weight_changes_the_digest_alone(base, tmp_path, element, bit):
    """Any flipped bit of any weight is another checkpoint of the same model."""
    flipped = tensors()
    raw = flipped["a.weight"].reshape(-1).view(torch.int16)
    raw[element] ^= 1 << bit if bit < 15 else -(1 << 15)
    other = identity(tmp_path / "flipped", flipped)
    assert other.digest != base.digest
    assert replace(other, digest=base.digest) == base


def test_the_sign_of_zero_and_the_payload_of_nan_count(base, tmp_path):
    """Bits are compared, not values: -0.0 is not 0.0, and one NaN is not another."""
    positive, quiet = tensors(), tensors()
    positive["b.bias"][1] = 0.0
    quiet["b.bias"].view(torch.int32)[2] += 1
    digests = {base.digest, identity(tmp_path / "zero", positive).digest, identity(tmp_path / "nan", quiet).digest}
    assert len(digests) == 3


def test_a_name_changes_both(base, tmp_path):
    """A renamed tensor is another model."""
    renamed = {name.replace("c.", "d."): tensor for name, tensor in tensors().items()}
    other = identity(tmp_path / "renamed", renamed)
    assert other.digest != base.digest
    assert other.signature != base.signature


def test_two_tensors_that_swap_names_change_the_digest(tmp_path):
    """Contents belong to names: two weights of one shape exchanged are seen, and the signature stays."""
    one, two = torch.zeros(4), torch.ones(4)
    straight = identity(tmp_path / "straight", {"q": one, "k": two})
    crossed = identity(tmp_path / "crossed", {"q": two, "k": one})
    assert straight.digest != crossed.digest
    assert straight.signature == crossed.signature


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (3, 2, 2)])
def test_a_shape_changes_both(base, tmp_path, shape):
    """The same bytes in another shape are another model."""
    other = identity(tmp_path / "other", {**tensors(), "a.weight": tensors()["a.weight"].reshape(shape)})
    assert other.digest != base.digest
    assert other.signature != base.signature
    assert other.parameters == base.parameters


def test_a_dtype_changes_the_digest_alone(base, tmp_path):
    """The same bytes as another dtype are other numbers in the same names and shapes."""
    other = identity(tmp_path / "other", {**tensors(), "a.weight": tensors()["a.weight"].view(torch.float16)})
    assert other.digest != base.digest
    assert other.signature == base.signature


def test_one_tensor_more_or_less_changes_both(base, tmp_path):
    """A tensor without any element counts too."""
    more = identity(tmp_path / "more", {**tensors(), "d": torch.zeros(0)})
    less = identity(tmp_path / "less", {name: tensor for name, tensor in tensors().items() if name != "b.bias"})
    assert len({base.digest, more.digest, less.digest}) == 3
    assert len({base.signature, more.signature, less.signature}) == 3
    assert more.parameters == base.parameters


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn]
)
def test_any_dtype_of_torch_is_read(tmp_path, dtype):
    """Buffers and quantised weights have identities as well."""
    one = identity(tmp_path / "one", {"x": torch.ones(3).to(dtype)})
    zero = identity(tmp_path / "zero", {"x": torch.zeros(3).to(dtype)})
    assert one.dtype == str(dtype).removeprefix("torch.")
    assert one.digest != zero.digest


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "config.json", None])
def test_a_directory_without_safetensors_is_refused(tmp_path, name):
    """Pickled weights are never opened, and the line says so."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    if name is not None:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    message = refusal(tmp_path)
    assert "holds no .safetensors file" in message
    assert "never loaded" in message
    assert not (tmp_path / "marker").exists()


def test_a_missing_directory_is_refused(tmp_path):
    """A wrong path gives the line of a directory without weights."""
    assert "holds no .safetensors file" in refusal(tmp_path / "nowhere")


def test_a_repeated_tensor_is_refused_with_its_file(tmp_path):
    """A stale shard beside the new one makes two tensors of one name: nobody could say which one counts."""
    with pytest.raises(ModelError, match=r"model-1\.safetensors repeats the tensor b\.bias.*Remove stale shards"):
        identity(tmp_path / "stale", tensors(), {"b.bias": tensors()["b.bias"]})


@pytest.mark.parametrize("kept", [0, 4, 100, "half", -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    """A file cut anywhere is refused by its name, though the one before it is whole."""
    save_file({"a": torch.zeros(2)}, tmp_path / "first.safetensors")
    path = tmp_path / "second.safetensors"
    save_file(tensors(), path)
    payload = path.read_bytes()
    path.write_bytes(payload[: len(payload) // 2 if kept == "half" else kept])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "Copy or download it again" in message


DAMAGED = {
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "zeros": bytes(64),
    "a pickle": pickle.dumps({"a": 1}),
    "no tensor": struct.pack("<Q", 2) + b"{}",
    "a dtype that torch lacks": b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}',
    "a shape that torch lacks": b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}',
    "a shape of 2^64 elements": b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("payload", DAMAGED.values(), ids=DAMAGED)
def test_a_hostile_file_is_refused(tmp_path, payload):
    """Headers that lie, dtypes and shapes that torch does not have, no tensor at all: one line each."""
    if payload.startswith(b"{"):
        payload = struct.pack("<Q", len(payload)) + payload + (b"\0\0\0" if b"F6" in payload else b"")
    (tmp_path / "model.safetensors").write_bytes(payload)
    refusal(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "dangling link"])
def test_what_only_looks_like_a_file_is_refused(tmp_path, kind):
    """A directory or a broken link named like weights is refused."""
    path = tmp_path / "model.safetensors"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    refusal(tmp_path)


def test_a_large_tensor_is_hashed_in_pieces_to_the_same_digest(tmp_path, monkeypatch):
    """However few elements are in memory at once, the digest is that of the whole tensor."""
    tensors = {"a": torch.arange(35.0).reshape(7, 5), "b": torch.ones(3), "c": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    whole = identify(tmp_path)
    monkeypatch.setattr(checkpoint, "_ELEMENTS", 6)
    assert identify(tmp_path) == whole
