"""SimTP and SimPP are the same function; with a bug of sharding in them they are not, and nothing is left behind."""

import pytest
import torch

from harness.mutations import pipeline_parallel as pp
from harness.mutations import tensor_parallel as tp
from harness.mutations.mutation import attention_of, blocks, catalogue
from tests.mutations.applied import REQUESTS, VIEWS, Opened, relative, same_bits, shown, unharmed

HOSTS = ("bloom-tiny", "gpt2-tiny", "llama-tiny")
BUGS = catalogue(*tp.MUTATIONS, *pp.MUTATIONS)
#: Those that change the logits of forced passes, in every precision.
FORCED = [
    (id, host)
    for id, bug in BUGS.items()
    for host in sorted(bug.hosts)
    if id not in ("tp-argmax-rows", "tp-bf16-reduce")
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Engines of the hosts, opened once each."""
    with Opened(tmp_path_factory.mktemp("hosts")) as found:
        yield found


# --- the same function -------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_simtp_is_the_same_function(opened, host, ranks):
    """On 2 ranks and on 4, which 6 heads do not divide over, float64 logits agree to 1e-12, and are other sums."""
    engine = opened.engine(host)
    with tp.tensor_parallel(engine.model, ranks):
        sharded = shown(engine)
    assert 0 < relative(sharded, opened.plain(host)) < 1e-12


@pytest.mark.parametrize("host", HOSTS)
def test_simtp_generates_the_same(opened, host):
    """Free continuations are those of the whole model."""
    engine = opened.engine(host)
    before = engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
    with tp.tensor_parallel(engine.model, 3):
        assert engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset()) == before


def test_simtp_computes_every_layer_over_the_ranks(opened):
    """Embedding and head, and every matrix of each block, has a forward of its own."""
    for host, layers in (("bloom-tiny", 4), ("gpt2-tiny", 4), ("llama-tiny", 7)):
        model = opened.engine(host).model
        with tp.tensor_parallel(model, 2):
            changed = [path for path, module in model.named_modules() if "forward" in vars(module)]
        assert len(changed) == 2 + layers * len(blocks(model)), host


def test_a_row_parallel_layer_sums_its_ranks_and_adds_the_bias_once(opened):
    """Over 4 ranks Llama's 12 heads go as 4, 4, 2, 2, with the KV heads that they read."""
    model = opened.engine("llama-tiny").model
    layer = attention_of(blocks(model)[0]).o_proj
    x = torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = [slice(0, 64), slice(64, 128), slice(128, 160), slice(160, 192)]
    total = sum(x[..., own] @ layer.weight[:, own].T for own in columns) + layer.bias
    with tp.tensor_parallel(model, 4):
        torch.testing.assert_close(layer(x), total, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("stages", "micro_batch"), [(2, None), (3, 1), (2, 2)])
def test_simpp_is_the_same_function(opened, host, stages, micro_batch):
    """Stages change no bit; micro-batches, each with its own cache, leave float64 logits equal to 1e-12."""
    engine = opened.engine(host)
    ranges = pp.stages_of(len(blocks(engine.model)), stages)
    with pp.pipeline_parallel(engine, ranges, micro_batch=micro_batch):
        found = shown(engine)
    assert relative(found, opened.plain(host)) < 1e-12
    assert micro_batch is not None or same_bits(found, opened.plain(host))


def test_stages_are_even_and_whole():
    """Five layers over three stages are 2, 2, 1; all layers are in one of them, in order."""
    assert pp.stages_of(5, 3) == [range(2), range(2, 4), range(4, 5)]
    assert pp.stages_of(4, 2) == [range(2), range(2, 4)]


def test_the_last_stage_holds_a_copy_of_a_tied_head(opened):
    """Its weights are those of the embedding in another place, and are the embedding again afterwards."""
    model = opened.engine("bloom-tiny").model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with pp.pipeline_parallel(opened.engine("bloom-tiny"), pp.stages_of(5, 2)):
        assert head.weight is not embedding.weight
        assert torch.equal(head.weight, embedding.weight)
    assert head.weight is embedding.weight


# --- the bugs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("id", "host"), FORCED)
def test_bugs_change_the_logits_and_are_undone(opened, id, host):
    """Inside the block the float64 logits of each path are others by 1e-6; afterwards nothing is, to the last bit."""
    engine, before = opened.engine(host), opened.plain(host)
    with unharmed(engine), BUGS[id].applied(engine):
        inside = shown(engine)
    # A race is drawn: it need not come up among the ten all-reduces of a single pass.
    for view in VIEWS[:1] if id == "tp-allreduce-race" else VIEWS:
        assert relative(inside, before, [view]) > 1e-6
    assert same_bits(shown(engine), before)


@pytest.mark.parametrize(("id", "host"), [(id, host) for id, host in FORCED if host != "bloom-raw"])
def test_bugs_run_in_the_precision_of_the_checkpoint(opened, id, host):
    """In 16 bits a bug makes finite logits that are others, with prompts fed in pieces, too."""
    engine = opened.engine(host, None, chunk=16)
    before = shown(engine, ["replay"])
    with BUGS[id].applied(engine):
        inside = shown(engine, ["replay"])
    assert torch.stack(list(inside.values())).isfinite().all()
    assert not same_bits(inside, before)


@pytest.mark.parametrize("id", sorted(BUGS))
def test_bugs_are_undone_after_an_error(opened, id):
    """An error inside the block leaves nothing behind either; a static cache is no obstacle."""
    engine = opened.engine(min(BUGS[id].hosts), "float32", static_cache=True)
    shown(engine, ["replay"])

    def fail():
        with unharmed(engine), BUGS[id].applied(engine):
            shown(engine, ["replay"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("id", sorted(BUGS))
def test_bugs_fit_a_widened_copy(opened, id):
    """A copy of a 16-bit engine in float32 takes each bug by itself, and is left as it was."""
    with opened.engine("gpt2-tiny" if "gpt2-tiny" in BUGS[id].hosts else "llama-tiny", None).upcast() as wide:
        before = shown(wide, ["replay"])
        with unharmed(wide), BUGS[id].applied(wide):
            inside = shown(wide, ["replay"])
        assert same_bits(inside, before) == (id in ("tp-bf16-reduce", "tp-argmax-rows"))
        assert same_bits(shown(wide, ["replay"]), before)


@pytest.mark.parametrize("id", ["tp-bias-xN", "pp-tied-head"])
def test_a_weaker_bug_changes_less(opened, id):
    """The strengths of a sweep go from the report's own downwards, and so does the error."""
    engine, plain, errors = opened.engine("bloom-tiny"), opened.plain("bloom-tiny"), []
    for strength in BUGS[id].strengths:
        with BUGS[id].applied(engine, strength):
            errors.append(relative(shown(engine), plain))
    assert errors == sorted(errors, reverse=True)
    assert 1e-6 < errors[-1] < errors[0] / 5


# --- tensor parallel ---------------------------------------------------------------------------


def test_a_bias_on_each_rank_is_twice_the_bias(opened):
    """Two ranks that both add the bias compute what doubled biases of the row-parallel layers do."""
    engine = opened.engine("bloom-tiny")
    with BUGS["tp-bias-xN"].applied(engine):
        inside = shown(engine)
    biases = [
        layer.bias for block in blocks(engine.model) for layer in (block.self_attention.dense, block.mlp.dense_4h_to_h)
    ]
    for bias in biases:
        bias.mul_(2)
    doubled = shown(engine)
    for bias in biases:
        bias.div_(2)
    assert relative(inside, doubled) < 1e-12


def test_chunks_of_fused_rows():
    """Of q, k, v with 4, 2, 2 rows the first rank gets the whole of q, and reads its last rows as k and v."""
    layers = [torch.nn.Linear(3, rows) for rows in (4, 2, 2)]
    parts = tp._chunked(layers, [4, 2, 2])
    assert parts == [
        [slice(0, 2), slice(4, 6)],
        [slice(2, 3), slice(6, 7)],
        [slice(3, 4), slice(7, 8)],
    ]


def test_heads_by_the_count_of_another_model(monkeypatch):
    """The report's own numbers: 12 heads on 4 ranks are 4, 4, 4, 0 with 3 KV heads left over, else 3 each."""
    assert tp._exchanged(12, 4) == [3, 3, 3, 3]
    monkeypatch.setattr(tp._Process, "num_kv_heads", 3)
    assert tp._exchanged(12, 4) == [4, 4, 4, 0]


def test_a_race_is_not_the_same_twice(opened):
    """The same request gives other bits the second time, and so does another run; a strength of 0 is no bug."""
    engine = opened.engine("gpt2-tiny")
    race = BUGS["tp-allreduce-race"]
    with race.applied(engine):
        first, second = shown(engine), shown(engine)
    assert relative(first, second) > 1e-6
    with race.applied(engine):
        assert same_bits(shown(engine), first), "draws are from a seed"
    with race.applied(engine, 0.0), tp.tensor_parallel(engine.model, 2):
        assert relative(shown(engine), opened.plain("gpt2-tiny")) < 1e-12


@pytest.mark.parametrize("host", sorted(BUGS["tp-bf16-reduce"].hosts))
def test_sums_in_bfloat16_are_a_bug_of_16_bits(opened, host):
    """In the checkpoint's own 16 bits the logits are others, and go back; in float32 no bit is."""
    bug, engine = BUGS["tp-bf16-reduce"], opened.engine(host, None)
    before, before_wide = opened.plain(host, None), opened.plain(host, "float32")
    with unharmed(engine):
        for strength in bug.strengths:
            with bug.applied(engine, strength):
                assert relative(shown(engine), before) > 1e-4
    assert same_bits(shown(engine), before)
    wide = opened.engine(host, "float32")
    with bug.applied(wide):
        assert same_bits(shown(wide), before_wide)


@pytest.mark.parametrize("host", sorted(BUGS["tp-argmax-rows"].hosts))
def test_mixed_rows_choose_other_tokens(opened, host):
    """In a batch other tokens are chosen; of one row, and where tokens are forced, nothing changes."""
    engine, bug, none = opened.engine(host), BUGS["tp-argmax-rows"], frozenset()
    together = engine.generate(REQUESTS, batch_size=3, stop_ids=none)
    alone = engine.generate(REQUESTS, batch_size=1, stop_ids=none)
    with unharmed(engine), bug.applied(engine):
        assert engine.generate(REQUESTS, batch_size=3, stop_ids=none) != together
        assert engine.generate(REQUESTS, batch_size=1, stop_ids=none) == alone
        assert same_bits(shown(engine), opened.plain(host))
    assert engine.generate(REQUESTS, batch_size=3, stop_ids=none) == together


def test_mixed_rows_read_the_gathered_table_the_wrong_way():
    """Two rows on two ranks: the first takes the better of both rows' bests on rank 0."""
    logits = torch.tensor([[5.0, 1.0, 6.0, 2.0], [3.0, 4.0, 0.0, 9.0]])
    # Gathered by rank: bests 5, 4 on rank 0 (ids 0, 1) and 6, 9 on rank 1 (ids 2, 3).
    assert tp._mixed_argmax(2, logits, None).argmax(dim=-1).tolist() == [0, 3]
    assert tp._mixed_argmax(2, logits[:1], None).argmax(dim=-1).tolist() == [2]


def test_scales_of_columns_in_order():
    """Columns of falling size keep their scales; of the reverse order each half meets the scales of the other."""
    falling = torch.tensor([[8.0, 4.0, 2.0, 1.0], [4.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
    assert torch.equal(tp._unordered_scales(falling, 2, 2), falling)
    rising = falling.flip(1)
    assert torch.equal(tp._unordered_scales(rising, 2, 2), rising * torch.tensor([4.0, 4.0, 0.25, 0.25]))


# --- pipeline parallel -------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_one_micro_batch_goes_to_its_own_request(opened, host):
    """A batch of one row is handed out rightly, bit for bit."""
    engine = opened.engine(host)
    before = shown(engine, batch_size=1)
    with BUGS["pp-batch-mix"].applied(engine):
        assert same_bits(shown(engine, batch_size=1), before)


@pytest.mark.parametrize(("id", "kept"), [("pp-layers-dropped", [0, 1, 2, 3]), ("pp-last-k", [2, 3, 4])])
def test_the_layers_that_are_left(opened, id, kept):
    """Of five layers the first four are left by halves rounded down, the last three by the last stage alone."""
    engine = opened.engine("llama-tiny")
    before = list(blocks(engine.model))
    with BUGS[id].applied(engine):
        assert list(blocks(engine.model)) == [before[i] for i in kept]
        assert [attention_of(block).layer_idx for block in blocks(engine.model)] == list(range(len(kept)))


def test_an_untied_head_cannot_go_missing(opened):
    """Llama's head is in the checkpoint by itself: the bug has no place there, and says so."""
    with pytest.raises(LookupError, match="tied"), BUGS["pp-tied-head"].applied(opened.engine("llama-tiny")):
        pass


# --- the list ----------------------------------------------------------------------------------


def test_every_entry_says_what_and_where():
    """Each has one line on the wrong maths and the report's number, and its own group."""
    for id, bug in BUGS.items():
        assert bug.group == ("tensor parallel" if id.startswith("tp-") else "pipeline parallel")
        assert 0 < len(bug.wrong) < 120
        assert "\n" not in bug.wrong
        assert bug.reference.partition("#")[0].count("/") == 1
        assert bug.reference.partition("#")[2].isdigit()
        assert bug.strengths[0] == 1.0
