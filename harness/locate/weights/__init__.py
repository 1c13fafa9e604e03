"""A candidate's tensors against those of the checkpoint: which is different, and what makes it so."""

from harness.locate.weights.auditing import audit
from harness.locate.weights.proposing import proposed

__all__ = ["audit", "proposed"]
