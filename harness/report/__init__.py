"""Render verdicts: terminal text and JSON."""
