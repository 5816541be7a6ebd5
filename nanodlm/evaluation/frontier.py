"""The frontier of samplers: how good texts are against what they cost, in network calls and in seconds.

Each sampler, number of steps and temperature is a point. Its quality is the likelihood of its texts under a judge, an
autoregressive network, beside their entropy. Sharper draws are always likelier, and say less and less: so the front is
taken among points whose texts have at least `LEAST` of the entropy of as much real text (evaluation/judge.py). How
points are told and drawn is in evaluation/fronts.py.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from types import MethodType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from nanodlm.diffusion.kinds import Sampler
from nanodlm.diffusion.sampling import sample
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.evaluation.fronts import COSTS, LEAST, LEFT_TO_RIGHT, pareto
from nanodlm.evaluation.judge import Texts, entropy, likelihood, nats_of, with_error
from nanodlm.model.transformer import Transformer

Choice = dict[str, Any]  # `sampler`, `num_steps` and `temperature`
CALLS = ("features", "extend", "denoise_block", "read_row", "denoise_within")  # which run a network


class Counted:
    """A network that says each of its calls, whatever compiled program they are made in."""

    def __init__(self, network: Transformer, calls: list[int]):
        self._network, self._calls = network, calls

    def __call__(self, *arguments: Any) -> Any:
        return self._counted(self._network, *arguments)

    def __getattr__(self, name: str) -> Any:  # also what it was trained on, and how it is shaped
        found = getattr(self._network, name)
        return MethodType(lambda self, *of: self._counted(found, *of), self) if name in CALLS else found

    def _counted(self, function: Any, *arguments: Any) -> Any:
        jax.debug.callback(lambda: self._calls.append(1))
        return function(*arguments)


def choices(
    network: Transformer, samplers: Iterable[Sampler], steps: Iterable[int], temperatures: Iterable[float]
) -> Iterator[Choice]:
    """Yield what to try of a network: by default all of its samplers, of an eighth and a half as many steps as tokens.

    Those that have no steps are tried once for each temperature. A sampler that it does not have is a UsageError.
    """
    kind = network.objective.traits
    longest = network.objective.block_size if kind.reads == "block" else network.seq_len
    if unknown := sorted(set(samplers) - set(kind.samplers)):
        raise UsageError(f"{network.objective.kind} models have no {unknown[0]} sampler: leave it out of --samplers")
    numbers = sorted(set(steps)) or sorted({max(1, longest // share) for share in (8, 2)})
    for sampler, temperature in product(tuple(samplers) or kind.samplers, temperatures):
        name = LEFT_TO_RIGHT if kind.reads == "before" else sampler
        for number in [longest] if sampler == "first_hitting" or kind.reads == "before" else numbers:
            yield {"sampler": name, "num_steps": number, "temperature": temperature}


def drawn(
    network: Transformer, choice: Choice, shape: tuple[int, int], seed: int
) -> tuple[Int[np.ndarray, "B L"], Choice]:
    """Return texts that a choice draws, and what they cost: calls of the network per token, and seconds per text.

    All texts are one batch, in which a call counts once; a batch makes as many as its slowest text. Compilation is no
    part of the seconds.
    """
    graphdef, params = nnx.split(network)
    calls: list[int] = []
    how = {name: value for name, value in choice.items() if value != LEFT_TO_RIGHT}

    def draw(params: Any, key: Key[Array, ""]) -> Int[Array, "B L"]:
        return sample(Counted(nnx.merge(graphdef, params), calls), key, shape=shape, **how)

    key = jax.random.key(seed)
    compiled = jax.jit(draw).lower(params, key).compile()
    began = time.perf_counter()
    tokens = np.asarray(compiled(params, key))
    seconds = time.perf_counter() - began
    jax.effects_barrier()
    return tokens, {**choice, "calls_per_token": len(calls) / shape[1], "seconds_per_text": seconds / shape[0]}


def frontier(
    networks: list[tuple[Transformer, list[Choice]]],
    judge: Transformer,
    real: Texts,
    *,
    shape: tuple[int, int],
    cut: Callable[[Texts], Texts],
    batch_size: int,
    seed: int = 0,
    emit: Emit = silent,
) -> dict[str, Any]:
    """Return the points of networks, each with what to try of it, and the same of real text, `held_out`.

    Texts of a shape are drawn, as many as there are real ones, and `cut` where they end. A point is on the front of a
    cost where nothing that costs as much or less is as likely, of all with `LEAST` of the entropy of real text.
    """
    todo = [(network, choice) for network, chosen in networks for choice in chosen]
    held_out: dict[str, Any] = {}
    points, texts = [], [real]
    for done, (network, choice) in enumerate(todo):
        tokens, point = drawn(network, choice, shape, seed)
        points, texts = [*points, point], [*texts, cut(list(tokens))]
        emit("progress", done=done + 1, total=len(todo), unit="settings")
    nats = iter(nats_of(judge, [text for of in texts for text in of], batch_size))  # together: compiled once
    for found, of in zip([held_out, *points], texts, strict=True):
        found |= likelihood([next(nats) for _ in of])
        found["entropy"], found["entropy_stderr"] = with_error(entropy, of)
    allowed = np.array([point["entropy"] >= LEAST * held_out["entropy"] for point in points])
    loss = np.array([point["nats_per_token"] for point in points])
    for cost in COSTS:
        front = pareto(np.array([point[cost] for point in points]), loss, allowed)
        for point, is_on in zip(points, front.tolist(), strict=True):
            point[f"on_front_of_{cost}"] = is_on
    return {"points": points, "held_out": held_out, "least_entropy": LEAST * held_out["entropy"], "num": len(real)}
