"""Fixtures that tests share. Nothing here touches the network: hubs are switched off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("GITHUB_STEP_SUMMARY", None)  # the checks that tests run are no part of the summary of CI's own step
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Idle OpenMP threads that spin take the core from the test on the other worker, which then spins too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does

# How long an example takes on a busy machine says nothing about the code.
settings.register_profile("harness", deadline=None)
settings.load_profile("harness")

ROOT = Path(__file__).parent

pytest_plugins = ["pytester"]  # tests of the plugin run pytest inside pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread in every process: workers of pytest-xdist share the cores, and the last bits stay the same."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The shipped goldens."""
    return ROOT / "golden"


@pytest.fixture(scope="session")
def small_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `golden/small/{model,small}` and `prompts/small.toml`, recorded once (read only)."""
    from harness import flow
    from tests.support import write_model, write_suite

    home = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(home)
    try:
        write_model(Path("golden/small/model"))
        suite = write_suite(Path("prompts/small.toml"))
        flow.record("golden/small/model", suite, out="golden/small/small", replicas=24)
    finally:
        os.chdir(before)
    return home


@pytest.fixture(scope="session")
def idle_ranks() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Lends one team of four ranks, started once, to tests that kill none: called and entered by `with`."""
    from harness.engines.ranks import spawned

    idle: list[spawned.SpawnedTeam] = []

    @contextmanager
    def lent() -> Iterator[None]:
        with spawned.kept():
            spawned.release(idle.pop() if idle and idle[0].alive else spawned.team_of(4, None))
            yield
            # Outside this block engines have ranks of their own again, which end with them.
            if spawned._Kept.team is not None and spawned._Kept.team.size == 4:
                idle[:], spawned._Kept.team = [spawned._Kept.team], None

    yield lent
    for team in idle:
        team.close()


@pytest.fixture
def home(small_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `small_home` to break, as the working directory."""
    target = tmp_path / "home"
    shutil.copytree(small_home, target)
    monkeypatch.chdir(target)
    return target
