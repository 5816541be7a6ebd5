"""Small probability laws over token sequences whose every conditional is known exactly.

Tokens are 0, 1 and 2; 3 is the mask and 4 is padding, so `VOCAB` has one id of each kind that is never predicted.
"""

from itertools import combinations
from math import comb

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.diffusion.mixed import shares
from nanodlm.diffusion.noise import Denoise
from nanodlm.diffusion.schedules import Schedule

TOKENS, MASK_ID, VOCAB = 3, 3, 5
INITIAL = np.array([0.5, 0.3, 0.2])
TRANSITION = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.35, 0.05, 0.6]])
FORBIDDEN_LOGIT = 7.0  # what denoisers here claim for mask and padding: far above every real logit


def markov_table(length: int) -> np.ndarray:
    """Probability of every sequence of the chain, shape (3,) * length."""
    table = INITIAL
    for _ in range(length - 1):
        table = table[..., None] * TRANSITION
    return table


def chain_rows(key: jax.Array, rows: int, length: int) -> jax.Array:
    """Rows drawn from the chain, int32 (rows, length)."""
    first_key, *keys = jax.random.split(key, length)
    log_p, log_step = jnp.log(jnp.asarray(INITIAL, jnp.float32)), jnp.log(jnp.asarray(TRANSITION, jnp.float32))
    first = jax.random.categorical(first_key, log_p, shape=(rows,))

    def step(token: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = jax.random.categorical(key, log_step[token])
        return after, after

    _, rest = jax.lax.scan(step, first, jnp.stack(keys))
    return jnp.concatenate([first[None], rest]).T.astype(jnp.int32)


def chain_log_p(rows: jax.Array) -> jax.Array:
    """Log probability of each row under the chain."""
    steps = jnp.log(jnp.asarray(TRANSITION, jnp.float32))[rows[:, :-1], rows[:, 1:]]
    return jnp.log(jnp.asarray(INITIAL, jnp.float32))[rows[:, 0]] + steps.sum(axis=1)


def rough_table(length: int, seed: int = 0) -> np.ndarray:
    """A law without any structure, positive everywhere."""
    weights = np.exp(1.5 * np.random.default_rng(seed).normal(size=(TOKENS,) * length))
    return weights / weights.sum()


def sequences(length: int) -> np.ndarray:
    """All sequences in the order of a table's entries, (3^length, length)."""
    return np.stack(np.unravel_index(np.arange(TOKENS**length), (TOKENS,) * length), axis=1).astype(np.int32)


def entropy(table: np.ndarray) -> float:
    """Entropy in nats."""
    return float(-(table * np.log(table)).sum())


def residuals(table: np.ndarray) -> np.ndarray:
    """Entry n: the sum over n masked positions of H(token | unmasked tokens), averaged over all n-subsets."""
    length = table.ndim
    everything = frozenset(range(length))
    subsets = [frozenset(s) for n in range(length + 1) for s in combinations(range(length), n)]
    of = {kept: entropy(table.sum(axis=tuple(everything - kept))) for kept in subsets}
    total = np.zeros(length + 1)
    for masked in subsets:
        kept = everything - masked
        total[len(masked)] += sum(of[kept | {i}] - of[kept] for i in masked)
    return total / [comb(length, n) for n in range(length + 1)]


def mean_residual(table: np.ndarray, mask_rate: np.ndarray) -> np.ndarray:
    """The same sum when each position is masked by itself with the given probabilities."""
    length = table.ndim
    n = np.arange(length + 1)
    ways = np.array([comb(length, k) for k in n])
    m = np.asarray(mask_rate, np.float64)[:, None]
    return (ways * m**n * (1 - m) ** (length - n)) @ residuals(table)


def exact_denoiser(table: np.ndarray) -> Denoise:
    """The law's own p(x_0[i] | unmasked tokens) at masked positions i."""
    length = table.ndim
    # Entry 3 of each axis is the sum over its tokens: the probability of any pattern of tokens and masks.
    marginals = table
    for axis in range(length):
        marginals = np.concatenate([marginals, marginals.sum(axis=axis, keepdims=True)], axis=axis)
    log_p = jnp.asarray(np.log(marginals).reshape(-1), jnp.float32)
    power = jnp.asarray((MASK_ID + 1) ** np.arange(length)[::-1], jnp.int32)

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        others = (x_t * power).sum(axis=-1, keepdims=True) - x_t * power
        logits = log_p[others[..., None] + power[:, None] * jnp.arange(TOKENS)]
        forbidden = jnp.full((*x_t.shape, VOCAB - TOKENS), FORBIDDEN_LOGIT)
        return jnp.concatenate([logits, forbidden], axis=-1)

    return denoise


def exact_mixed_denoiser(table: np.ndarray, schedule: Schedule, uniform_share: float) -> Denoise:
    """The law's p(x_0[i] | x_t at the other positions) under mixed noise; those reveal nothing of noise at i itself."""
    length = table.ndim
    every = jnp.asarray(sequences(length))
    is_token = jax.nn.one_hot(every, TOKENS)  # (S, L, 3)
    log_p = jnp.asarray(np.log(table.reshape(-1)), jnp.float32)

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        kept, masked, uniform = (v[:, None, None] for v in shares(schedule.mask_rate(t), uniform_share))
        same = kept * (x_t[:, None] == every) + uniform / TOKENS
        likelihood = jnp.where(x_t[:, None] == MASK_ID, masked, same)
        likelihood = jnp.log(jnp.maximum(likelihood, 1e-37))  # (B, S, L)
        others = log_p[:, None] + likelihood.sum(axis=-1, keepdims=True) - likelihood
        p = jnp.einsum("bsl,slv->blv", jax.nn.softmax(others, axis=1), is_token)
        forbidden = jnp.full((*x_t.shape, VOCAB - TOKENS), FORBIDDEN_LOGIT)
        return jnp.concatenate([jnp.log(p), forbidden], axis=-1)

    return denoise


def assert_drawn_from(law: np.ndarray, rows: np.ndarray, slack: float = 1.3) -> None:
    """The rows' frequencies are as near to the law as those of as many draws from it are on average, times `slack`."""
    assert total_variation(frequencies(rows), law) < slack * sampling_error(law, len(rows))


def frequencies(rows: np.ndarray) -> np.ndarray:
    """Share of each sequence among rows, in the shape of a table."""
    flat = np.ravel_multi_index(tuple(rows.T), (TOKENS,) * rows.shape[1])
    return np.bincount(flat, minlength=TOKENS ** rows.shape[1]).reshape((TOKENS,) * rows.shape[1]) / len(rows)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def sampling_error(law: np.ndarray, draws: int) -> float:
    """Expected total variation between a law and the frequencies of that many draws from it."""
    return 0.5 * float(np.sqrt(2 * law * (1 - law) / (np.pi * draws)).sum())


class Watched:
    """A denoiser that keeps what it was called with."""

    def __init__(self, denoise: Denoise):
        self.denoise, self.x, self.t = denoise, [], []

    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(self.keep, x_t, t, ordered=True)
        return self.denoise(x_t, t)

    def keep(self, x_t: jax.Array, t: jax.Array) -> None:
        self.x.append(np.array(x_t))
        self.t.append(np.array(t))
