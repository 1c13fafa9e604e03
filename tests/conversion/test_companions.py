"""The tokenizer goes along, and nothing else."""

from harness.conversion import companions


def test_files_of_a_tokenizer_are_copied(tmp_path):
    """Those that are there, byte for byte; never weights or code."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "merges.txt", "model.safetensors", "modeling_bloom.py", "config.json"):
        (source / name).write_text(name)
    (source / "vocab.json").mkdir()
    assert companions.copy(source, target) == ("tokenizer.json", "merges.txt")
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "tokenizer.json": "tokenizer.json",
        "merges.txt": "merges.txt",
    }
