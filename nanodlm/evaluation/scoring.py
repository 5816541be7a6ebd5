"""The bound of rows under a model, token by token: what evaluation reports, and what ranks checkpoints in training."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.config import ScoreConfig
from nanodlm.devices.mesh import batch_sharding, constrain, cut, logit_chunks, make_mesh
from nanodlm.diffusion.cross_entropy import linear_cross_entropy
from nanodlm.diffusion.mixed import shares
from nanodlm.diffusion.objective import Objective
from nanodlm.errors import Emit, silent
from nanodlm.evaluation.profile import Profile
from nanodlm.model.transformer import Ids, Transformer, segments

MOST_DRAWS = 200  # of noise, however precise a bound is to be


class Scored(NamedTuple):
    """What rows cost by token, in nats, and the share of each row, or of each of its blocks, that was noise."""

    nats: Float[Array, "B L"]
    noise: Float[Array, "B K"]


Scorer = Callable[[Any, Int[Array, "B L"], Int[np.ndarray, "B"], Key[Array, ""]], Scored]


class Drawn(NamedTuple):
    """What each scored token costs, in nats: the mean over draws of noise; and the standard error of that of the sum.

    The tokens' shares of the bound add up to it. Without noise the error is 0, and after one draw nothing tells it.
    """

    nats: Float[np.ndarray, "T"]
    by_row: Float[np.ndarray, "D N"]  # of each draw
    noise_stderr: float | None
    profile: dict[str, Any]  # by position and by noise, see `Profile`

    def stderr_of(self, rows: Bool[np.ndarray, "N"]) -> float | None:
        """Return the standard error of the noise in the sum of some rows, in nats, for draws are independent."""
        if len(self.by_row) < 2:
            return self.noise_stderr
        return float(np.std(self.by_row[:, rows].sum(axis=1), ddof=1)) / math.sqrt(len(self.by_row))


def make_scorer(network: Transformer, group: int = 1) -> Scorer:
    """Return a function of (parameters, rows, given, key): the bound by token, whatever the trained weights.

    So many first tokens of each row are given: the bound is on -log p of the others after them, and they cost nothing.
    Noise takes the count form, which has the least variance and no schedule in it; the autoregressive likelihood has no
    noise. A network that was told in training where documents end is told so from left to right only, where a mark that
    was read ends a document. Edges would tell others where masked end-of-text marks are. Padding is never read or
    scored: the bound of a padded row is that of its tokens alone, given how many there are. With a `group` it is
    the bound for telling so many tokens at once, none of which knows the others.
    """
    objective, kind = network.objective, network.objective.traits
    padding = objective.mask_id if kind.random_tokens and not kind.masks else network.padding  # it never saw a mask
    document_end = network.document_end if kind.edges_known else None
    objective = replace(objective, estimator="count", times="systematic", weighting="bound", group=group)
    return _scorer(nnx.graphdef(network), objective, padding, document_end)


@lru_cache(8)  # or every text would be compiled for, and not once the rows of one length
def _scorer(graphdef: Any, objective: Objective, padding: int | None, document_end: int | None) -> Scorer:
    @jax.jit
    def nats_per_token(params: Any, x_0: Ids, given: Int[Array, "B"], key: Key[Array, ""]) -> Scored:
        segment_ids = segments(x_0, document_end, padding)
        is_given = jnp.arange(x_0.shape[1]) < given[:, None]
        target = jnp.where(is_given, objective.mask_id + 1, x_0)  # as padding, which is neither noised nor scored
        if objective.traits.reads == "before":
            noised = objective.corrupt(x_0, key, segment_ids)
        else:
            noised = objective.corrupt(target, key, segment_ids)
            noised = noised._replace(x_t=jnp.where(is_given, x_0, noised.x_t))
        model, noise = nnx.merge(graphdef, params), noised.mask_rate
        if objective.mixed:
            noise = 1 - shares(noise, objective.noise_share).kept
            weight, nats = objective.mixed_terms(objective.logits(model, x_0, noised, segment_ids), target, noised)
            nats = weight[:, None] * nats
        else:
            features = objective.logits(model.features, x_0, noised, segment_ids)
            most, options = _most_scored(objective, x_0), {"mask_id": objective.mask_id}
            options["chunks"] = logit_chunks(most, objective.mask_id, scored=True)
            if most == x_0.size:
                nats = objective.fused_nats(features, model.table, target, noised, chunks=options["chunks"])[1]
            else:
                scored, (_, weight) = objective._position_weights(target, noised)
                places = jnp.flatnonzero(scored, size=most, fill_value=x_0.size)[None]
                values = (of.reshape(x_0.size, *of.shape[2:]) for of in (features, target, weight))
                x, ids, weight = (of.at[places].get(mode="clip") for of in values)
                nats = weight * linear_cross_entropy(x, model.table, ids, weight, **options)[1]
                nats = jnp.zeros(x_0.size).at[places].set(nats, mode="drop").reshape(x_0.shape)
                nats = jnp.where(scored.sum() > most, jnp.nan, nats)  # rather than a bound with something left out
        return Scored(constrain(nats, None), constrain(noise.reshape(len(x_0), -1), None))  # for every process to read

    return nats_per_token


def _most_scored(objective: Objective, x_0: Ids) -> int:
    """Return how many positions of a batch can be masked at most, which the even spread of its counts tells.

    Devices that share the batch score all of theirs, or they would wait for each other's.
    """
    size = min(objective.block_size, x_0.shape[1]) if objective.traits.reads == "block" else x_0.shape[1]
    units = len(x_0) * -(-x_0.shape[1] // size)
    if not objective.traits.masks or jax.device_count() > 1:
        return x_0.size
    counts = sum(-(-size * i // units) + objective.group - 1 for i in range(1, units + 1))
    return min(x_0.size, counts + min(size, units))  # as many may be next to a whole number, and rounded up beyond it


def score_rows(
    scorer: Scorer,
    params: Any,
    rows: list[np.ndarray],
    key: Key[Array, ""],
    *,
    mesh: Mesh,
    batch_size: int,
    given: Int[np.ndarray, "N"] | None = None,
) -> Iterator[tuple[Float[np.ndarray, "B L"], Float[np.ndarray, "B K"]]]:
    """Yield the nats of each row by token, and the noise, as in `Scored`, a batch at a time: equal keys, equal noise.

    All rows are of one length but for the last, which may be shorter and then is a batch of its own.
    """
    given = np.zeros(len(rows), int) if given is None else given
    whole = len(rows) - (len(rows[-1]) != len(rows[0]))
    starts = [*range(0, whole, batch_size), *range(whole, len(rows))]
    before: tuple[Scored, int] | None = None  # it is fetched while the next batch is computed
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        # A short batch is filled up by repeating its rows; the copies' results are not used.
        filled = np.resize(np.stack(rows[start:end]), (batch_size, len(rows[start])))
        sent = jax.make_array_from_callback(filled.shape, batch_sharding(mesh), filled.__getitem__)
        scored = scorer(params, sent, np.resize(given[start:end], batch_size), jax.random.fold_in(key, start))
        if before:
            yield _fetched(*before)
        before = scored, end - start
    if before:
        yield _fetched(*before)


def _fetched(scored: Scored, rows: int) -> tuple[Float[np.ndarray, "B L"], Float[np.ndarray, "B K"]]:
    return np.asarray(scored.nats)[:rows], np.asarray(scored.noise)[:rows]


def draw(
    network: Transformer,
    rows: list[np.ndarray],
    given: Int[np.ndarray, "N"],
    options: ScoreConfig,
    *,
    within: float | None = None,
    emit: Emit = silent,
) -> Drawn:
    """Return the bound of rows, of each of which so many tokens are given, by scored token.

    There are `options.repeats` draws of noise, or as many as bring its standard error within so many nats, of all rows
    together; at most `MOST_DRAWS`. Batches have noise of their own, so their spread over draws tells how many.
    """
    scorer, mesh = make_scorer(network), make_mesh(options.batch_size)
    params = jax.device_put(nnx.state(network), jax.NamedSharding(mesh, cut()))
    kind = network.objective.traits
    noisy, length = kind.reads != "before", len(rows[0])
    profile = Profile(length, network.objective.block_size if kind.reads == "block" else length)
    nats, by_row, wanted, error = np.zeros(1), [], options.repeats if noisy else 1, None if noisy else 0.0
    while len(by_row) < wanted:
        key, done, tokens, sums = jax.random.fold_in(jax.random.key(options.seed), len(by_row)), 0, [], []
        for of, noise in score_rows(scorer, params, rows, key, mesh=mesh, batch_size=options.batch_size, given=given):
            end = done + len(of)
            asked = np.arange(of.shape[1]) >= given[done:end, None]
            asked &= np.stack(rows[done:end]) < network.objective.mask_id  # and no padding
            profile.add(of, asked, noise)
            tokens.append(of[asked])
            sums.append(of.sum(axis=1, dtype=np.float64))
            done = end
            if len(sums) % 20 == 0 or done == len(rows):
                emit("progress", done=done + len(by_row) * len(rows), total=len(rows) * wanted, unit="rows")
        nats, starts = nats + np.concatenate(tokens, dtype=np.float64), np.cumsum([0, *map(len, sums)])[:-1]
        by_row.append(np.concatenate(sums))
        batches = np.add.reduceat(by_row, starts, axis=1)
        spread = np.var(batches, axis=0, ddof=1).sum() if len(by_row) > 1 else math.inf
        error = math.sqrt(spread / len(by_row)) if noisy and len(by_row) > 1 else error
        if noisy and within and len(by_row) == wanted:
            enough = math.ceil(min(spread / within**2, MOST_DRAWS)) if len(by_row) > 1 else 0
            wanted = max(2 + 8 // len(starts), enough)  # a spread of few numbers is no measure
    return Drawn(nats / len(by_row), np.stack(by_row), error, profile.described(noisy=noisy))
