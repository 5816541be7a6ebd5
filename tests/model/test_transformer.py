from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanodlm.model.layers import ShortConvolution, rope
from nanodlm.model.transformer import Transformer, count_parameters

VOCAB, LENGTH = 11, 8
SMALL = {"vocab_size": VOCAB, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 24}
TIMES = jnp.float32([0.3, 0.9])
ROWS, NOISED = jax.random.randint(jax.random.key(0), (2, 2, LENGTH), 0, VOCAB)
SLOW = partial(pytest.param, marks=pytest.mark.slow)


def randomised(**options: Any) -> Transformer:
    """A network all of whose parameters matter: at the start its output layers are zero."""
    model = nnx.eval_shape(lambda: Transformer(**{**SMALL, **options}, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    rng = np.random.default_rng(3)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_scale = path[-1].key == "scale"
        return jnp.asarray(rng.normal(scale=0.5, size=leaf.shape) + is_scale, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(abstract)))


@nnx.jit
def logits(model: Transformer, x_t: jax.Array, t: jax.Array = TIMES, segment_ids: jax.Array | None = None) -> jax.Array:
    return model(x_t, t, segment_ids)


def changed(x_t: jax.Array, positions: list[int]) -> jax.Array:
    where = jnp.asarray(positions)
    return x_t.at[:, where].set((x_t[:, where] + 3) % VOCAB)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_width": 3, "time_conditioning": True, "tie_embeddings": True},
        {"qk_norm": False, "zero_init": False, "dtype": "bfloat16"},
    ],
)
def test_logits_are_float32_with_one_score_per_id(options: dict[str, Any]) -> None:
    out = logits(randomised(**options), ROWS)
    assert (out.shape, out.dtype) == ((2, LENGTH, VOCAB), jnp.float32)
    assert bool(jnp.isfinite(out).all())
    assert float(out.std()) > 0.1


def test_sines_of_the_positions_of_a_row_are_taken_when_it_is_compiled() -> None:
    program = jax.jit(logits).lower(randomised(), ROWS).compile().as_text()
    assert program
    assert "sine(" not in program


def test_rotations_are_the_same_where_positions_are_known_only_when_it_runs() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 8192, 1, 64))
    known, told = jax.jit(lambda: rope(x, np.arange(8192)))(), jax.jit(lambda at: rope(x, at))(jnp.arange(8192))
    np.testing.assert_allclose(told, known, atol=1e-6)


def test_what_is_no_number_in_a_layer_reaches_the_logits() -> None:
    for layer in ("qkv", "attention_out", "mlp_in", "mlp_out"):
        model = randomised()
        kernel = getattr(model.blocks, layer).kernel
        kernel[...] = kernel[...].at[0, 0, 0].set(jnp.nan)
        assert bool(jnp.isnan(logits(model, ROWS)).any()), layer


def test_bfloat16_rounds_products_but_keeps_float32_parameters() -> None:
    half, full = randomised(dtype="bfloat16", conv_width=3), randomised(conv_width=3)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {np.dtype("float32")}
    exact, rounded = logits(full, ROWS), logits(half, ROWS)
    error = float(jnp.abs(exact - rounded).max() / jnp.abs(exact).max())
    assert 1e-5 < error < 0.1


def test_every_position_reads_tokens_on_both_sides() -> None:
    model = randomised(conv_width=5)
    before = logits(model, ROWS)
    for position in (0, LENGTH - 1):
        moved = jnp.abs(logits(model, changed(ROWS, [position])) - before).max(axis=(0, 2))
        assert float(moved.min()) > 1e-3


def test_rows_of_a_batch_do_not_mix() -> None:
    model = randomised(conv_width=5)
    other = ROWS.at[1].set((ROWS[1] + 1) % VOCAB)
    np.testing.assert_array_equal(logits(model, ROWS)[0], logits(model, other)[0])


def test_segments_keep_documents_apart() -> None:
    model = randomised(conv_width=5)
    # The last document has the first one's id but for one: neighbours of the middle one on both sides.
    segment_ids = jnp.tile(jnp.asarray([0, 0, 0, 1, 1, 2, 2, 2]), (2, 1))
    middle, apart = changed(ROWS, [3, 4]), partial(logits, model, t=TIMES, segment_ids=segment_ids)
    assert moved_positions(apart(ROWS), apart(middle)) == [3, 4]
    assert moved_positions(logits(model, ROWS), logits(model, middle)) == list(range(LENGTH))


def test_a_document_scores_as_it_would_in_a_row_of_its_own() -> None:
    model = randomised(conv_width=5)
    segment_ids = jnp.tile(jnp.asarray([0, 0, 0, 1, 1, 1, 1, 1]), (2, 1))
    packed = logits(model, ROWS, TIMES, segment_ids)
    for document in (slice(3), slice(3, None)):  # RoPE is relative, so the place in the row does not matter
        np.testing.assert_allclose(packed[:, document], logits(model, ROWS[:, document]), rtol=1e-3, atol=1e-3)


def test_the_convolution_is_the_sum_over_offsets_in_its_docstring() -> None:
    model = randomised(conv_width=5)
    conv = ShortConvolution(5, 16, nnx.Rngs(0))
    assert model.blocks.conv is not None
    conv.kernel[...] = model.blocks.conv.kernel[0]
    x = np.random.default_rng(0).normal(size=(1, LENGTH, 16)).astype(np.float32)
    kernel = np.asarray(conv.kernel[...])
    expected = np.zeros_like(x)
    for i in range(LENGTH):
        for offset in range(-2, 3):
            if 0 <= i + offset < LENGTH:
                expected[:, i] += kernel[offset + 2] * x[:, i + offset]
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def without_conditioning(model: Transformer) -> Transformer:
    """The plain network with the same weights."""
    params = nnx.to_pure_dict(nnx.split(model)[1])
    params.pop("time_in")
    params["blocks"].pop("modulation")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Transformer(**SMALL, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, params)


def test_time_conditioning_begins_as_the_plain_network() -> None:
    model = randomised(time_conditioning=True)
    fresh = Transformer(**SMALL, time_conditioning=True, rngs=nnx.Rngs(0))
    assert model.blocks.modulation is not None and fresh.blocks.modulation is not None
    model.blocks.modulation.kernel[...] = fresh.blocks.modulation.kernel[...]
    plain = logits(without_conditioning(model), ROWS)
    np.testing.assert_allclose(logits(model, ROWS), plain, rtol=1e-5, atol=1e-5)
    assert float(plain.std()) > 0.1


def test_time_matters_with_trained_conditioning_and_never_without() -> None:
    later = jnp.float32([0.4, 0.9])
    conditioned, plain = randomised(time_conditioning=True), randomised()
    moved = jnp.abs(logits(conditioned, ROWS, later) - logits(conditioned, ROWS, TIMES)).max(axis=(1, 2))
    assert float(moved[0]) > 1e-2
    assert float(moved[1]) == 0
    np.testing.assert_array_equal(logits(plain, ROWS, later), logits(plain, ROWS, TIMES))


def test_attention_scores_depend_on_relative_positions_only() -> None:
    (q, k), length = jax.random.normal(jax.random.key(1), (2, 1, 1, 2, 8)), 12
    rotated = [rope(jnp.broadcast_to(x, (1, length, 2, 8)), jnp.arange(length)) for x in (q, k)]
    scores = np.asarray(jnp.einsum("bqhd,bkhd->hqk", *rotated))
    for offset in range(-length + 1, length):
        diagonal = np.diagonal(scores, offset, axis1=1, axis2=2)
        np.testing.assert_allclose(diagonal, diagonal[:, :1] + np.zeros_like(diagonal), atol=1e-5)
    assert np.abs(scores[:, 0, 1:] - scores[:, 0, :1]).min(axis=0).max() > 0.1


def names(**options: Any) -> set[str]:
    """Paths of the parameters."""
    model = nnx.eval_shape(lambda: Transformer(**{**SMALL, **options}, rngs=nnx.Rngs(0)))
    flat = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}


def test_an_option_that_is_off_has_no_parameters_a_block_size_never_has_and_tied_embeddings_have_no_head() -> None:
    plain = names()
    assert names(block_size=3) == plain
    assert not [name for name in plain if "conv" in name or "modulation" in name or "time" in name]
    assert names(conv_width=3) - plain == {"blocks/conv/kernel", "blocks/conv_norm/scale"}
    assert plain - names(qk_norm=False) == {"blocks/query_norm/scale", "blocks/key_norm/scale"}
    of_time = {"blocks/modulation/kernel", "time_in/kernel", "time_in/bias"}
    assert names(time_conditioning=True) - plain == of_time
    assert plain - names(tie_embeddings=True) == {"head/embedding"}


@pytest.mark.parametrize(("n_layers", "n_heads", "d_model", "millions"), [(12, 12, 768, 124), (24, 16, 1024, 354)])
def test_gpt2_sizes_have_gpt2_parameter_counts(n_layers: int, n_heads: int, d_model: int, millions: int) -> None:
    shape = {"vocab_size": 50304, "n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "d_ff": 4 * d_model}
    model = nnx.eval_shape(lambda: Transformer(**shape, tie_embeddings=True, rngs=nnx.Rngs(0)))
    assert count_parameters(model) == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize("remat", ["dots", SLOW("full")])
def test_what_the_backward_pass_computes_again_changes_no_gradient(remat: str) -> None:
    def gradient(remat: str) -> Any:
        graphdef, params = nnx.split(randomised(remat=remat, conv_width=3))
        return jax.jit(jax.grad(lambda params: jnp.square(nnx.merge(graphdef, params)(ROWS, TIMES)).mean()))(params)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient(remat), gradient("none"))


def test_an_untrained_network_scores_all_tokens_alike_only_if_its_outputs_start_at_zero() -> None:
    zero, drawn, again = (Transformer(**SMALL, zero_init=flag, rngs=nnx.Rngs(0)) for flag in (True, False, False))
    assert float(jnp.abs(logits(zero, ROWS)).max()) == 0
    np.testing.assert_array_equal(logits(drawn, ROWS), logits(again, ROWS))  # the seed fixes them
    assert float(logits(drawn, ROWS).std()) > 0
    outputs = [drawn.blocks.attention_out.kernel, drawn.blocks.mlp_out.kernel, drawn.head.embedding]  # type: ignore[union-attr]
    assert all(float(kernel[...].std()) == pytest.approx(0.02, rel=0.1) for kernel in outputs)


def test_logits_are_the_features_times_the_table_which_is_the_embedding_where_tied() -> None:
    for tied in (True, False):
        model = randomised(tie_embeddings=tied)
        scores = model.features(ROWS, TIMES) @ model.table.T
        np.testing.assert_allclose(scores, logits(model, ROWS), rtol=1e-4, atol=1e-4)
        assert (model.head is None) == tied
        assert np.array_equal(model.table, model.embedding.embedding[...]) == tied


@nnx.jit
def beside(
    model: Transformer, x_t: jax.Array, context: jax.Array, t: jax.Array = TIMES, segment_ids: jax.Array | None = None
) -> jax.Array:
    return model(x_t, t, segment_ids, context=context)


extend = nnx.jit(lambda model, cache, ids: model.extend(cache, ids))
denoise = nnx.jit(lambda model, cache, x_t, t: model.denoise_block(cache, x_t, t))
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)

BLOCKED: list[dict[str, Any]] = [
    {"block_size": 3, "conv_width": 5, "time_conditioning": True},  # the last block is shorter
    {"block_size": 1, "conv_width": 5},
]


def blocks(size: int, length: int = LENGTH) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def moved_positions(before: jax.Array, after: jax.Array) -> list[int]:
    return np.flatnonzero(np.asarray(before != after).any(axis=(0, 2))).tolist()


def test_a_noisy_block_reads_itself_and_the_context_before_it() -> None:
    model = randomised(**BLOCKED[0])
    before = beside(model, NOISED, ROWS)
    for block in blocks(3):
        inside, after = list(range(LENGTH)[block]), list(range(block.stop, LENGTH))
        for position in {inside[0], inside[-1]}:
            assert moved_positions(before, beside(model, changed(NOISED, [position]), ROWS)) == inside
            assert moved_positions(before, beside(model, NOISED, changed(ROWS, [position]))) == after


def test_each_block_scores_as_if_it_alone_followed_its_context() -> None:
    model, t = randomised(**BLOCKED[0]), jnp.zeros(2)  # times of 0, as the context always has
    together = beside(model, NOISED, ROWS, t)
    for block in blocks(3):
        row = ROWS.at[:, block].set(NOISED[:, block])
        # One row is cut after its block; the rest spare a compilation each: as the next test shows, none reads on.
        alone = logits(model, row[:, :6] if block.stop == 6 else row, t)
        close(together[:, block], alone[:, block])


@pytest.mark.parametrize("options", BLOCKED)
def test_one_stream_reads_no_later_block(options: dict[str, Any]) -> None:
    model = randomised(**options)
    before = logits(model, ROWS)
    for block in blocks(options["block_size"]):
        for position in {block.start, block.stop - 1}:
            reading = list(range(block.start, LENGTH))
            assert moved_positions(before, logits(model, changed(ROWS, [position]))) == reading


def test_a_block_as_long_as_the_row_makes_the_bidirectional_network() -> None:
    model = randomised(conv_width=5, block_size=LENGTH)
    expected = logits(randomised(conv_width=5), NOISED)
    close(logits(model, NOISED), expected)
    close(beside(model, NOISED, ROWS), expected)


def test_segments_keep_documents_apart_in_blocks() -> None:
    model = randomised(**BLOCKED[0])
    segment_ids = jnp.tile(jnp.asarray([0, 0, 1, 1, 1, 2, 2, 2]), (2, 1))
    inside, outside = [2, 3, 4], [0, 1, 5, 6, 7]
    one = partial(logits, model, t=TIMES, segment_ids=segment_ids)
    two = partial(beside, model, NOISED, t=TIMES, segment_ids=segment_ids)
    for score in (one, two):
        own = moved_positions(score(ROWS), score(changed(ROWS, inside)))
        assert own and set(own) <= set(inside)
        other = moved_positions(score(ROWS), score(changed(ROWS, outside)))
        assert other and set(other) <= set(outside)
    other = beside(model, changed(NOISED, inside), ROWS, TIMES, segment_ids)
    assert moved_positions(two(ROWS), other) == inside


@pytest.mark.parametrize("options", [{"conv_width": 5, "time_conditioning": True}, *BLOCKED])
def test_padding_in_a_segment_of_its_own_changes_nothing_for_the_others(options: dict[str, Any]) -> None:
    model, segment_ids = randomised(**options), jnp.tile(jnp.asarray([0, 0, 0, 0, 0, 9, 9, 9]), (2, 1))
    other = changed(ROWS, [5, 6, 7])
    padded = logits(model, ROWS, TIMES, segment_ids)
    close(padded[:, :5], logits(model, ROWS[:, :5]))
    assert moved_positions(padded, logits(model, other, TIMES, segment_ids)) == [5, 6, 7]
    if model.block_size:
        padded = beside(model, NOISED, ROWS, TIMES, segment_ids)
        close(padded[:, :5], beside(model, NOISED[:, :5], ROWS[:, :5]))
        assert set(moved_positions(padded, beside(model, NOISED, other, TIMES, segment_ids))) <= {5, 6, 7}


def test_a_time_per_block_reaches_its_block_only() -> None:
    model = randomised(**BLOCKED[0])
    times = jnp.float32([[0.1, 0.5, 0.9], [0.3, 0.3, 0.3]])
    before = beside(model, NOISED, ROWS, times)
    close(before[1], beside(model, NOISED, ROWS, jnp.full(2, 0.3))[1])
    for k, block in enumerate(blocks(3)):
        later = beside(model, NOISED, ROWS, times.at[:, k].add(0.05))
        assert moved_positions(before, later) == list(range(LENGTH)[block])


@pytest.mark.parametrize("options", BLOCKED)
def test_a_cache_gives_the_logits_of_the_whole_row(options: dict[str, Any]) -> None:
    model = randomised(**options)
    size = options["block_size"]
    cache = model.new_cache(2, LENGTH * size)
    two, one = beside(model, NOISED, ROWS), logits(model, ROWS, jnp.zeros(2))
    for block in blocks(size)[: LENGTH // size]:
        close(denoise(model, cache, NOISED[:, block], TIMES), two[:, block])
        clean, cache = extend(model, cache, ROWS[:, block])
        close(clean, one[:, block])
    assert int(cache.count) == LENGTH // size * size


def test_a_prompt_in_one_piece_is_the_same_as_in_blocks() -> None:
    model, window = randomised(block_size=2, conv_width=5), 2
    prompt = jnp.concatenate([ROWS, NOISED[:, :2]], axis=1)
    whole, at_once = extend(model, model.new_cache(2, window), prompt)

    def step(cache: Any, block: jax.Array) -> tuple[Any, jax.Array]:
        clean, cache = model.extend(cache, block)
        return cache, clean

    pieces = prompt.reshape(2, 5, 2).swapaxes(0, 1)
    carried, parts = jax.jit(lambda cache: jax.lax.scan(step, cache, pieces))(model.new_cache(2, window))
    close(parts.swapaxes(0, 1).reshape(whole.shape), whole)
    for ours, theirs in zip(jax.tree.leaves(carried), jax.tree.leaves(at_once), strict=True):
        assert ours.dtype == theirs.dtype
        close(ours, theirs)


def test_one_layer_reads_the_window_and_no_further() -> None:
    model = randomised(n_layers=1, block_size=2, conv_width=5)

    def score(prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
        clean, cache = extend(model, model.new_cache(2, 4), prompt)
        return clean, denoise(model, cache, NOISED[:, :2], TIMES)

    clean, block = score(ROWS)
    for position in range(LENGTH):
        clean_after, block_after = score(changed(ROWS, [position]))
        first, reached = position // 2 * 2, position + 2  # a key has seen its neighbours
        assert moved_positions(clean, clean_after) == list(range(first, min(reached // 2 * 2 + 6, LENGTH)))
        assert moved_positions(block, block_after) == ([0, 1] if reached >= LENGTH - 4 else [])


def test_a_cache_has_the_precision_of_the_products() -> None:
    model = randomised(block_size=2, conv_width=3, dtype="bfloat16")
    empty = model.new_cache(2, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(empty.layers)} == {np.dtype(jnp.bfloat16)}
    clean, cache = jax.eval_shape(model.extend, empty, ROWS[:, :4])
    assert clean.dtype == jnp.float32
    assert cache == jax.eval_shape(lambda: empty)


@pytest.mark.parametrize("options", [{}, {"conv_width": 5, "time_conditioning": True, "qk_norm": False}])
def test_a_part_of_a_row_scores_as_in_the_whole_while_nothing_changes_outside(options: dict[str, Any]) -> None:
    model = randomised(**options)
    whole, past = nnx.jit(Transformer.read_row)(model, ROWS, TIMES)
    np.testing.assert_array_equal(whole, logits(model, ROWS))
    within = nnx.jit(Transformer.denoise_within)
    for start in (0, 1, 5):  # of three positions; the convolution reaches two beyond them
        part = within(model, past, ROWS[:, start : start + 3], TIMES, jnp.int32(start))
        np.testing.assert_allclose(part, whole[:, start : start + 3], rtol=1e-4, atol=1e-4)
    other = within(model, past, NOISED[:, 5:], TIMES, jnp.int32(5))
    mixed = jnp.concatenate([ROWS[:, :5], NOISED[:, 5:]], axis=1)
    assert float(jnp.abs(other - logits(model, mixed)[:, 5:]).max()) > 1e-3  # the others were read beside the former
    assert float(jnp.abs(other - whole[:, 5:]).max()) > 0.1


def test_misuse_is_refused() -> None:
    plain, blocked = randomised(), randomised(block_size=2)
    with pytest.raises(ValueError, match="block_size above 0"):
        plain(ROWS, TIMES, context=ROWS)
    with pytest.raises(ValueError, match="block_size above 0"):
        plain.new_cache(2, 4)
    with pytest.raises(ValueError, match="window is 3"):
        blocked.new_cache(2, 3)
    with pytest.raises(ValueError, match="number of tokens is 3"):
        blocked.extend(blocked.new_cache(2, 4), ROWS[:, :3])
    with pytest.raises(ValueError, match="2 positions, not 4"):
        blocked.denoise_block(blocked.new_cache(2, 4), ROWS[:, :4], TIMES)
    with pytest.raises(ValueError, match="3 times for 8 positions in blocks of 2"):
        blocked(ROWS, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="block_size is -1"):
        Transformer(**SMALL, block_size=-1, rngs=nnx.Rngs(0))
