"""A directory appears whole or not at all, and nothing is overwritten."""

from collections import namedtuple

import pytest

from harness.conversion import directories
from harness.conversion.directories import appearing, must_be_free
from harness.errors import UsageError


def test_it_appears_at_the_end(tmp_path):
    """Under a hidden name until then; readable for all afterwards."""
    out = tmp_path / "out"
    with appearing(out) as made:
        (made / "a").write_text("1")
        assert not out.exists()
        assert made.parent == tmp_path
        assert made.name.startswith(".out.")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "a").read_text() == "1"
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_or_interrupt_leaves_nothing(tmp_path, error):
    """Neither the directory nor what was written for it."""
    with pytest.raises(error), appearing(tmp_path / "out") as made:  # noqa: PT012
        (made / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path):
    """Also behind a link."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with appearing(tmp_path / "link") as made:
        (made / "a").write_text("1")
    assert (tmp_path / "out/a").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


@pytest.mark.parametrize("there", ["file", "directory"])
def test_what_is_there_is_kept(tmp_path, there):
    """A file, and a directory with anything in it."""
    out = tmp_path / "out"
    if there == "file":
        out.write_text("old")
    else:
        out.mkdir()
        (out / "a").write_text("old")
    with pytest.raises(UsageError, match="is there already"), appearing(out):
        raise AssertionError("must not be entered")
    assert (out if there == "file" else out / "a").read_text() == "old"


def test_what_appears_meanwhile_is_kept(tmp_path):
    """Another's result under this name is no reason to remove it."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="appeared meanwhile"), appearing(out) as made:  # noqa: PT012
        (made / "a").write_text("new")
        out.mkdir()
        (out / "a").write_text("old")
    assert (out / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_must_be_there(tmp_path):
    """It is not made from a mistyped path."""
    with pytest.raises(UsageError, match=r"does not exist\. Make it first"):
        must_be_free(tmp_path / "no" / "out")


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    """A disk that is too small is told before the work."""
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda _path: Usage(free=1000))
    must_be_free(tmp_path / "out", 1000)
    with pytest.raises(UsageError, match="needs 1,001 bytes"):
        must_be_free(tmp_path / "out", 1001)
