"""Settings and derived tables of a live candidate against the reference's configuration."""

from harness.locate.tables.reading import tables

__all__ = ["tables"]
