"""Changes to a live model: those that a check must let pass."""
