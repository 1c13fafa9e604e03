"""Ports to read and to copy: models written from scratch, as `py:harness.models.ports.bloom:build` names them."""
