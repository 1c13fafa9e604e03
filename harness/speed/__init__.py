"""How fast a candidate is beside a base: what is timed, where it runs, and when the samples are enough."""
