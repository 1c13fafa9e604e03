"""record, run, check, compare, locate, gate, bench: the only place where engines, goldens and verdicts are wired."""

from __future__ import annotations

from harness.flow.benching import bench
from harness.flow.candidates import candidates, check_all
from harness.flow.checking import check
from harness.flow.comparing import compare
from harness.flow.gating import gate
from harness.flow.locating import locate, proposed_map
from harness.flow.matrix import Cell, cells, kept_ranks
from harness.flow.recording import record, rerecord
from harness.flow.references import reference_directory, reference_model
from harness.flow.reproducing import reproduce
from harness.flow.running import run
from harness.flow.verifying import REPLICAS as VERIFY_REPLICAS
from harness.flow.verifying import verify

__all__ = [
    "VERIFY_REPLICAS",
    "Cell",
    "bench",
    "candidates",
    "cells",
    "check",
    "check_all",
    "compare",
    "gate",
    "kept_ranks",
    "locate",
    "proposed_map",
    "record",
    "reference_directory",
    "reference_model",
    "reproduce",
    "rerecord",
    "run",
    "verify",
]
