"""Samplers: from an all-masked (or random) sequence to text, as time runs from 1 to 0.

    sampler         which positions unmask                                         calls of the network
    ancestral       each in the grid step drawn for it                             num_steps
    ancestral_skip  the same, but no row waits for a step of its own               at most num_steps, and L
    first_hitting   each at a continuous time drawn for it, one by one             L
    spread          many at a time, far apart from each other                      at most num_steps, and L
    confidence      where the drawn token is likeliest; as many as the schedule    at most num_steps
    margin          where the best token leads by most; as many                    at most num_steps
    entropy         as many as are nearly independent of each other                at most num_steps
    threshold       where the drawn token is likelier than a threshold             at most num_steps
    remdm_cap, ...  as in ancestral, and tokens are masked again; see `_remask`    num_steps

The first three have one law, that of the reverse process, which `spread` is nearer to in few steps. The next four go
where the model is sure, and the `remdm` ones correct themselves. `sample_blocks` fills a row block by block.
"""

from inspect import signature
from typing import Any

from nanodlm.diffusion.blocks import decoder_of, reverse_blocks, reverse_tokens, row_decoder
from nanodlm.diffusion.checks import Rows, Seed, finite_tokens, random_key, require, require_whole
from nanodlm.diffusion.noise import Denoise, Tokens
from nanodlm.diffusion.objective import own_objective, settle
from nanodlm.diffusion.schedules import Schedule
from nanodlm.diffusion.steps import reverse_rows
from nanodlm.diffusion.tokens import _start
from nanodlm.diffusion.walks import Walk, to_end


def sample(
    denoise: Denoise,
    key: Seed,
    *,
    shape: tuple[int, int],
    mask_id: int | None = None,
    schedule: Schedule | str | None = None,
    num_steps: int | None = None,
    prompt: Rows | None = None,
    uniform_share: float | None = None,
    guidance: float = 0.0,
    **options: Any,
) -> Tokens:
    """Draw sequences. No mask is left, tokens of the prompt are never altered, and a key fixes the result.

    Called as it is, it is compiled anew each time. To compile once per shape, keep a jitted function, such as
    `draw = jax.jit(partial(sample, model, shape=(8, 64)))`.

    A loaded network carries what it was trained on, and is sampled so: one of blocks by `sample_blocks`, one from left
    to right by `sample_autoregressive`, which leave out options that they have no use for.

    Args:
        denoise: Maps x_t (B, L) and t (B,) to logits (B, L, V).
        key: Randomness, or a seed.
        shape: (B, L) of the result.
        mask_id: The id of a masked token; it and larger ids are never drawn. A loaded network carries its own, and its
            own `schedule` and `uniform_share`; what is passed must not contradict them.
        schedule: The noise schedule or its name.
        num_steps: Number of steps, at least 1, of each block for a network of blocks; by default one for each position.
            `first_hitting` has its own.
        cache_block: For networks that read whole rows with masks: tokens that are filled in before the next ones, while
            what the network made of all others is kept, an approximation (`blocks.row_decoder`); 0 computes all. The
            blocks share the `num_steps`.
        **options: Those of `steps.reverse_rows`, which follow but for the prompt.
        sampler: One of `kinds.SAMPLERS`; see the module's table.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens only; 0 is off.
        top_p: Then from the smallest set of tokens with at least this probability; 1 is off.
        prompt: Token ids placed at the front of each row; `mask_id` in it marks positions to fill in, so a
            prompt as long as the row is an infilling pattern.
        grid: Times at which the schedule is read: `uniform`, t_i = 1 - i/n, or `cosine`, t_i = cos(pi/2 i/n), whose
            steps are shorter while little is known (MD4, arXiv:2406.04329; MaskGIT, arXiv:2202.04200).
        guidance: w in logits = (1 + w) cond - w uncond, where uncond is what the model predicts with the prompt's
            tokens masked (LLaDA, arXiv:2502.09992, appendix; arXiv:2410.18514). 0 makes no second call.
        uniform_share: That of the process the model was trained on (`mixed.shares`). Above 0, `ancestral` takes
            the reverse steps of that process; see `_denoise_mixed`.
        entropy_bound: For `entropy`, in nats: how dependent tokens that appear together may be.
        threshold: For `threshold`: tokens likelier than that are kept, and the likeliest one; 1 keeps one per call.
        remask: For `remdm_cap`, `_rescale` and `_loop`: how often a token is masked again, in [0, 1].
        loop_time: For `remdm_loop`: where time stands still, in (0, 1).

    Returns:
        Token ids below `mask_id`, int32; -1 under `jax.jit` where the network gave logits that are not finite.

    Raises:
        ValueError: For options that make no sense, a prompt that does not fit, logits of another shape or not finite.

    >>> from nanodlm.diffusion.schedules import make_schedule
    >>> import jax, jax.numpy as jnp
    >>> always_1 = lambda x_t, t: jax.nn.one_hot(jnp.ones_like(x_t), 3) * 50
    >>> sample(always_1, jax.random.key(0), shape=(1, 4), mask_id=2, schedule=make_schedule("linear"),
    ...        num_steps=2, prompt=jnp.array([0])).tolist()
    [[0, 1, 1, 1]]
    """
    options |= {"mask_id": mask_id, "schedule": schedule, "num_steps": num_steps, "prompt": prompt}
    options |= {"uniform_share": uniform_share, "guidance": guidance}
    return finite_tokens(to_end(reverse_process(denoise, key, shape=shape, **options)).tokens)


def reverse_process(
    denoise: Denoise,
    key: Seed,
    *,
    shape: tuple[int, int],
    mask_id: int | None = None,
    schedule: Schedule | str | None = None,
    num_steps: int | None = None,
    prompt: Rows | None = None,
    uniform_share: float | None = None,
    guidance: float = 0.0,
    cache_block: int = 0,
    **options: Any,
) -> Walk:
    """Return the walk from noise to text that `sample` takes to its end, of the same arguments, for every kind.

    Each step is one call of the network (two when guided), besides those that read blocks which are done. Only samplers
    that mask again, and uniform and hybrid noise, change a token that is decided; the prompt never changes. To watch
    the walk of a network, compiled once for all parameters, keys and prompts, with masks where to fill in:

        def walk_of(params, key, prompt):
            return reverse_process(nnx.merge(graphdef, params), key, shape=prompt.shape, prompt=prompt)

        for state in step_by_step(walk_of)(params, key, prompt): ...
    """
    own, key = own_objective(denoise), random_key(key)
    blocks = own is None and getattr(denoise, "block_size", 0)
    require(not blocks, "this network writes left to right: choose sample_blocks, or sample_autoregressive as trained")
    unknown = sorted(options.keys() - signature(reverse_rows).parameters.keys())
    require(not unknown, f"sample has no option {' and '.join(unknown)}")
    require_whole("num_steps", 1 if num_steps is None else num_steps)
    require(len(shape) == 2, f"the shape must be (rows, length), not {shape}")
    for name, size in zip(("rows", "length"), shape, strict=True):
        require_whole(f"the {name} of the shape", size)
    if own and own.traits.reads != "row":
        require(guidance == 0 and not uniform_share, "a network of blocks is sampled without guidance or uniform noise")
        require(cache_block == 0, "a network of blocks has a cache of its own: leave cache_block out")
        given = {"mask_id": mask_id, "prompt": prompt}
        if own.traits.reads == "before":
            given |= {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
            given["document_end"] = getattr(denoise, "document_end", None)
            return reverse_tokens(decoder_of(denoise), key, shape=shape, **given)
        options |= {"schedule": schedule, "num_steps": own.block_size if num_steps is None else num_steps}
        return reverse_blocks(decoder_of(denoise), key, shape=shape, **given, **options)
    known = settle(denoise, schedule=schedule, mask_id=mask_id, noise_share=uniform_share)
    options |= {"num_steps": shape[1] if num_steps is None else num_steps, "guidance": guidance, "prompt": prompt}
    share = known.pop("noise_share") or 0.0
    options |= known
    if cache_block:
        return _reverse_cached(denoise, key, shape, cache_block, mixed=share > 0, **options)
    options["uniform_share"] = share
    return reverse_rows(denoise, key, shape=shape, **options)


def _reverse_cached(
    network: Any, key: Any, shape: tuple[int, int], size: int, *, guidance: float, mixed: bool, **options: Any
) -> Walk:
    """Return the walk of a network of whole rows that computes one block at a time; see `blocks.row_decoder`."""
    require_whole("cache_block", size)
    require(not mixed and guidance == 0, "the cache is for masks alone, and without guidance: choose cache_block 0")
    require(hasattr(network, "read_row"), "only a network of nanodlm.load has a cache: choose cache_block 0")
    whole = shape[1] % size == 0
    require(whole, f"the length {shape[1]} is no multiple of cache_block {size}: choose one that divides it")
    options["num_steps"] = -(-options["num_steps"] * size // shape[1])
    text = _start(options["prompt"], shape, options["mask_id"])
    decoder = row_decoder(network, text, size, options["mask_id"], options["schedule"])
    walk = reverse_blocks(decoder, key, shape=shape, block_size=size, **options)
    return walk._replace(start=walk.start._replace(calls=walk.start.calls + 1))  # which has read the whole
