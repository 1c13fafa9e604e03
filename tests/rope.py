"""RoPE frequencies derived from a config by hand, in Python's own float64."""

import math


def inv_freq_by_hand(head_dim, theta, scaling=None):
    """theta^(-2i/d); with llama3 scaling long wavelengths are divided by `factor`, those in between are blended.

    Source: Llama 3.1, `apply_scaling` of meta-llama/llama-models.
    """
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return frequencies
    assert scaling["rope_type"] == "llama3"
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < high:
            scaled.append(frequency)
        elif wavelength > low:
            scaled.append(frequency / scaling["factor"])
        else:
            share = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            scaled.append((1 - share) * frequency / scaling["factor"] + share * frequency)
    return scaled
