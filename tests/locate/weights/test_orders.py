"""Orders in words."""

from harness.locate.weights.layouts import layout_of
from harness.locate.weights.orders import in_words


def test_rotary_pairs_for_the_wrong_number_of_heads_are_told_by_both_numbers() -> None:
    """Rows of K, turned for H/K heads and back for K: 12 heads of queries, 6 of keys."""
    config = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96}
    layout = layout_of("layers.0.self_attn.k_proj.weight", (48, 96), config)
    paired = [head * 24 + half * 12 + lane for head in range(2) for lane in range(12) for half in range(2)]
    halved = [head * 8 + lane * 2 + half for head in range(6) for half in range(2) for lane in range(4)]
    said = in_words(tuple(paired[index] for index in halved), "rows", layout)
    assert said == "rows turned into rotary pairs for 2 heads, and back for 6"
