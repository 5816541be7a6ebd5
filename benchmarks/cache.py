"""Measure how far the sampler with a cache is from the network's own law, and what it saves.

    python -m benchmarks.cache data/store/train/3f2a     # a trained absorbing model

Texts are drawn with a cache of each block size. Before each step, the distributions of the block's masked tokens are
computed from the cache and from the whole row, and compared. A block as long as the text has nothing outside: that row
is the plain sampler, at one token per step like all others.
"""

import time
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Key

import nanodlm
from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.sampling import reverse_process
from nanodlm.diffusion.walks import State, Walk, step_by_step, to_end
from nanodlm.errors import UsageError


def cache(
    model: Annotated[str, tyro.conf.Positional],
    blocks: tuple[int, ...] = (4, 8, 16, 32, 64),
    rows: int = 32,
    sampler: str = "ancestral_skip",
) -> list[dict[str, Any]]:
    """Compare what a cache gives with what the whole row does, by block size.

    Args:
        model: Address of a trained model, as `nanodlm.load` takes it.
        blocks: Block sizes; they divide the model's rows.
        rows: Texts to draw.
        sampler: One that decides tokens for good.

    Returns:
        Rows with `cache_block`; `kl`, the mean of KL(whole || cache) in nats per masked token and step; `entropy`, the
        mean entropy of these tokens; `agree`, the share of them whose likeliest token is the same; `calls` of the
        network for the texts; `seconds` to draw them, compiled.

    Raises:
        UsageError: For a model that has no such cache.
    """
    network, _ = nanodlm.load(model)
    if not network.objective.traits.row_cache:
        raise UsageError(f"{network.objective.kind} models have no cache for parts of a row")
    graphdef, params = nnx.split(network)
    shape, mask_id = (rows, network.seq_len), network.objective.mask_id

    def walk_of(size: int, params: Any, key: Key[Array, ""]) -> Walk:
        whole = nnx.merge(graphdef, params)
        return reverse_process(whole, key, shape=shape, num_steps=shape[1], sampler=sampler, cache_block=size)

    @jax.jit
    def compare(params: Any, state: State) -> Float[Array, "4"]:
        """Sum, over masked tokens of the block: 1, KL, entropy, agreement."""
        whole, ((row, past, index), _, block) = nnx.merge(graphdef, params), state.memory
        size = block.tokens.shape[1]
        row = jax.lax.dynamic_update_slice(row, block.tokens, (0, index * size))
        t = network.objective.schedule.time_of((row == mask_id).mean(axis=1))
        exact = jax.lax.dynamic_slice_in_dim(whole(row, t), index * size, size, axis=1)
        near = whole.denoise_within(past, block.tokens, t, index * size)
        p, q = (jax.nn.log_softmax(predictable(logits, mask_id=mask_id)[..., :mask_id]) for logits in (exact, near))
        each = (
            jnp.ones(p.shape[:2]),
            (jnp.exp(p) * (p - q)).sum(-1),
            -(jnp.exp(p) * p).sum(-1),
            p.argmax(-1) == q.argmax(-1),
        )
        return jnp.stack([jnp.where(block.tokens == mask_id, value, 0.0).sum() for value in each])

    table = []
    print("| cache_block | KL, nats | entropy, nats | same best token | calls | seconds |\n|---|---|---|---|---|---|")
    for size in blocks:
        *states, end = step_by_step(partial(walk_of, size))(params, jax.random.key(0))
        count, *sums = np.sum([np.asarray(compare(params, state)) for state in states], axis=0).tolist()
        draw = jax.jit(lambda params, key, size=size: to_end(walk_of(size, params, key)).tokens)
        draw(params, jax.random.key(0)).block_until_ready()
        start = time.perf_counter()
        draw(params, jax.random.key(1)).block_until_ready()
        kl, entropy, agree = (value / count for value in sums)
        row = {"cache_block": size, "kl": kl, "entropy": entropy, "agree": agree, "calls": int(end.calls)}
        table.append(row | {"seconds": time.perf_counter() - start})
        print(f"| {size} | {kl:.4f} | {entropy:.3f} | {agree:.1%} | {row['calls']} | {table[-1]['seconds']:.2f} |")
    return table


if __name__ == "__main__":
    tyro.cli(cache, use_underscores=True)
