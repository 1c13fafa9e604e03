"""The sensitivity certificate: which bugs of the catalogue the gate of a model and suite sees, and what others need."""

from __future__ import annotations

from harness.power.certificate.making import make, refuse_unknown, write
from harness.power.certificate.value import Bug, Certificate, Column, Sight

__all__ = ["Bug", "Certificate", "Column", "Sight", "make", "refuse_unknown", "write"]
