import logging
import os
import warnings

import pytest
import torch
from transformers.utils import logging as transformers_logging

from harness import environment
from harness.environment import Quiet, pinned_threads, thread_count


class BrokenError(Exception):
    """Raised inside a block."""


# --- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_restored(fails):
    """The number of threads holds inside the block alone, also where the block fails."""
    before = torch.get_num_threads()
    try:
        with thread_count(before + 1):
            assert torch.get_num_threads() == before + 1
            if fails:
                raise BrokenError
    except BrokenError:
        assert fails
    assert torch.get_num_threads() == before


def test_no_thread_count_leaves_them():
    """None changes nothing, and undoes what the block itself did."""
    before = torch.get_num_threads()
    with thread_count(None):
        assert torch.get_num_threads() == before
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("mode", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("fails", [False, True])
def test_pinned_threads_are_deterministic(mode, fails):
    """Deterministic kernels are on inside, and as they were, warnings only or not, afterwards."""
    enabled, warn_only = mode
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    before = torch.get_num_threads()
    try:
        with pinned_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            if fails:
                raise BrokenError
    except BrokenError:
        assert fails
    try:
        assert torch.get_num_threads() == before
        assert torch.are_deterministic_algorithms_enabled() is enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    finally:
        torch.use_deterministic_algorithms(False)


# --- quiet -----------------------------------------------------------------------------------------


def state():
    """What `Quiet` touches."""
    return (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        logging.getLogger("torch._dynamo").level,
        list(warnings.filters),
        warnings.showwarning,
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("bars", [False, True])
def test_quiet_is_undone(bars, fails):
    """Verbosity, progress bars, the log level of dynamo and the warning filters are put back."""
    enabled = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    transformers_logging.set_verbosity(logging.INFO)
    try:
        before = state()
        try:
            with Quiet():
                assert transformers_logging.get_verbosity() == logging.CRITICAL
                assert not transformers_logging.is_progress_bar_enabled()
                if fails:
                    raise BrokenError
        except BrokenError:
            assert fails
        assert state() == before
    finally:
        transformers_logging.set_verbosity_warning()
        (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()


def test_quiet_lets_no_warning_out():
    """A warning inside the block is not seen, one after it is."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Quiet():
            warnings.warn("inside", UserWarning, stacklevel=1)
        warnings.warn("after", UserWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["after"]


def test_quiet_can_be_nested():
    """Two engines that are open at once, the second closed first, leave the state of before."""
    before = state()
    with Quiet():
        inside = state()
        with Quiet():
            pass
        assert state() == inside
    assert state() == before


# --- what is observed ------------------------------------------------------------------------------


def test_versions_name_what_moves_numbers():
    """The versions of Python, torch and transformers are those in use; a missing package says so."""
    import transformers

    found = environment.versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert set(found) >= {"python", "numpy", "tokenizers", "safetensors", "golden-harness"}


def test_a_missing_package_is_named(monkeypatch):
    """A package that is not installed is no crash."""
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package",))
    assert environment.versions()["no-such-package"] == "not installed"


def test_the_machine_has_no_name():
    """Provenance says what computes, not whose machine it is: no host name, user or path."""
    found = environment.machine()
    assert found["threads"] == torch.get_num_threads()
    text = repr(found)
    assert os.uname().nodename not in text
    assert os.path.expanduser("~") not in text


def test_devices_are_those_of_torch():
    """The CPU is always there; CUDA is a device or a reason why not."""
    found = environment.devices()
    assert "threads" in found["cpu"]
    assert ("cuda:0" in found) == torch.cuda.is_available()
    assert ("cuda" in found) != torch.cuda.is_available()


def test_the_compiler_is_a_program_or_none(monkeypatch, tmp_path):
    """The compiler named by CXX is taken first; without any there is None."""
    program = tmp_path / "my-compiler"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert environment.compiler() == str(program)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.compiler() is None
