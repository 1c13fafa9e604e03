"""Another revision of a repository, beside the one that is checked out."""

import os
import subprocess

import pytest

from harness.errors import UsageError
from harness.speed.revisions import checkout, moved


def git(directory, *arguments):
    """Run git there, without the settings of whoever runs the tests."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    names = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.invalid", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", *names, "-C", str(directory), *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits of a module; the second has one more directory, and a file that git does not track."""
    home = tmp_path / "repository"
    (home / "src").mkdir(parents=True)
    git(home, "init", "-q")
    for number in (1, 2):
        (home / "src/module.py").write_text(f"NUMBER = {number}\n")
        if number == 2:
            (home / "later").mkdir()
            (home / "later/file").write_text("x")
        git(home, "add", "-A")
        git(home, "commit", "-q", "-m", f"commit {number}")
    (home / "src/weights.bin").write_text("not tracked")
    monkeypatch.chdir(home)
    return home


def test_the_files_of_the_other_revision_are_there_and_gone_afterwards(repository):
    """As they were committed, without what is not tracked; the repository stays as it is."""
    before = git(repository, "status", "--porcelain")
    with checkout("HEAD~1") as found:
        assert (found.directory / "src/module.py").read_text() == "NUMBER = 1\n"
        assert not (found.directory / "src/weights.bin").exists()
        assert found.revision == git(repository, "rev-parse", "HEAD~1")
    assert not found.directory.exists()
    assert (repository / "src/module.py").read_text() == "NUMBER = 2\n"
    assert git(repository, "status", "--porcelain") == before
    assert git(repository, "worktree", "list").count("\n") == 0


def test_modules_of_the_repository_come_from_the_revision(repository, monkeypatch):
    """The search path leads there where it led into the repository, and stays where it did not."""
    monkeypatch.syspath_prepend(str(repository / "src"))
    with checkout("HEAD~1") as found:
        assert str(found.directory / "src") in found.path
        assert str(repository / "src") not in found.path
        assert os.path.dirname(os.__file__) in found.path


def test_packages_that_are_not_on_the_path_come_from_the_revision(repository):
    """Installed to be edited, a package may be found by a hook alone, which comes after the path."""
    with checkout("HEAD~1", repository / "src") as found:
        assert found.path[:2] == (str(found.copy), str(found.copy / "src"))


def test_a_file_is_held_where_the_revision_has_its_own(repository, tmp_path):
    """Neither one that git does not track, such as an environment's, nor one outside of the repository."""
    with checkout("HEAD~1") as found:
        assert found.holds(repository / "src/module.py")
        assert not found.holds(repository / "src/weights.bin")
        assert not found.holds(tmp_path / "elsewhere.py")


def test_a_working_directory_below_the_root_is_the_same_one_there(repository):
    """The command may be started anywhere in the repository, where the revision has that directory."""
    with checkout("HEAD~1", repository / "src") as found:
        assert found.directory.name == "src"
    with (
        pytest.raises(UsageError, match="later is no directory of the revision"),
        checkout("HEAD~1", repository / "later"),
    ):
        pass


@pytest.mark.parametrize("revision", ["nothing", "--upload-pack=touch x", "-h", "", "HEAD:src"])
def test_what_is_no_revision_is_refused(repository, revision):
    """In one line; a name that looks like an option is a name."""
    with pytest.raises(UsageError, match="git cannot find the revision"), checkout(revision):
        pass


def test_without_a_repository_there_is_no_revision(tmp_path):
    """Said in one line."""
    with pytest.raises(UsageError, match="git cannot find a repository"), checkout("HEAD", tmp_path):
        pass


def test_what_only_lies_beside_is_not_moved(tmp_path):
    """A virtual environment inside the repository is no part of the revision."""
    root, target = tmp_path / "root", tmp_path / "target"
    for path in (root / "src", root / ".venv", target / "src"):
        path.mkdir(parents=True)
    assert moved([str(root / "src"), str(root / ".venv"), "/usr"], root, target) == (
        str(target / "src"), str(root / ".venv"), "/usr"
    )  # fmt: skip
