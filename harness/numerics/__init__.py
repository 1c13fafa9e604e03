"""Arrays in, numbers out: sketches, metrics, bounds with their derivation, and the constants of the rule."""
