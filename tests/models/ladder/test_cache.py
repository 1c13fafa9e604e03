import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.models.ports.ladder.cache import Cache, PreallocatedLayer


def states(tokens, seed=0):
    """Random keys or values of 2 rows, 3 heads of 4."""
    return torch.randn((2, 3, tokens, 4), generator=torch.Generator().manual_seed(seed))


@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=6), capacity=st.integers(0, 20))
def test_both_caches_hold_the_same(pieces, capacity):
    """However the tokens come and however few were announced, both give the same keys and values at each step."""
    growing, written = Cache(1, None), Cache(1, capacity)
    for number, new in enumerate(pieces):
        pair = states(new, 2 * number), states(new, 2 * number + 1)
        for one, other in zip(growing.update(*pair, 0), written.update(*pair, 0), strict=True):
            assert torch.equal(one, other)
        assert growing.get_seq_length() == written.get_seq_length() == sum(pieces[: number + 1])


def test_nothing_is_copied_where_there_is_room():
    """The buffers of a cache that was announced long enough stay where they are."""
    layer = PreallocatedLayer(8)
    layer.update(states(3), states(3, 1))
    places = [buffer.data_ptr() for buffer in layer.buffers]
    layer.update(states(5, 2), states(5, 3))
    assert [buffer.data_ptr() for buffer in layer.buffers] == places


def test_slots_that_nobody_wrote_are_zero():
    """What a mask hides is multiplied with its probability of 0, and must be a number."""
    layer = PreallocatedLayer(8)
    layer.update(states(3), states(3, 1))
    assert all(not buffer[:, :, 3:].any() for buffer in layer.buffers)


def test_rejected_tokens_are_taken_back():
    """Fewer keys and values, as after a rejected draft, are the cache's from then on."""
    layer = PreallocatedLayer(8)
    keys, values = states(5), states(5, 1)
    layer.update(keys, values)
    layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    assert layer.length == 3
    new = states(1, 2)
    found, _ = layer.update(new, new)
    assert torch.equal(found, torch.cat([keys[:, :, :3], new], dim=2))


def test_an_empty_cache_shows_nothing():
    """Before the first token there are no keys, as in a cache of transformers."""
    layer = PreallocatedLayer(4)
    assert layer.keys is None
    assert layer.values is None
    assert layer.length == 0
