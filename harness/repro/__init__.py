"""The smallest case that shows a failure, and a script and a test of it that need no harness."""
