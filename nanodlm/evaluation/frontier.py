"""The frontier of samplers: how good texts are against what they cost, in network calls and in seconds.

Each sampler, number of steps and temperature is a point. Its quality is the likelihood of its texts under a judge, an
autoregressive network, beside their entropy. Sharper draws are always likelier, and say less and less: so the front is
taken among points whose texts have at least `LEAST` of the entropy of as much real text (evaluation/judge.py).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from types import MethodType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.diffusion.kinds import Sampler
from nanodlm.diffusion.sampling import sample
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.evaluation.judge import Texts, entropy, likelihood, nats_of, with_error
from nanodlm.model.transformer import Transformer

Choice = dict[str, Any]  # `sampler`, `num_steps` and `temperature`
LEAST = 0.95  # of the entropy of real text
LEFT_TO_RIGHT = "autoregressive"
CALLS = ("features", "extend", "denoise_block", "read_row", "denoise_within")  # which run a network
FEW = 16  # texts, below which errors are themselves uncertain
HEAD = (
    "sampler",
    "steps",
    "temperature",
    "calls per token",
    "s per text",
    "nats per token",
    "perplexity",
    "entropy, nats",
)
COSTS = {"calls_per_token": "network calls per token", "seconds_per_text": "seconds per text"}


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
    return {"points": points, "held_out": held_out, "least_entropy": LEAST * held_out["entropy"]}


def pareto(
    cost: Float[np.ndarray, "N"], loss: Float[np.ndarray, "N"], allowed: Bool[np.ndarray, "N"]
) -> Bool[np.ndarray, "N"]:
    """Say which of the allowed points have a lower loss than every allowed one that costs as much or less.

    >>> pareto(np.array([1.0, 2.0, 3.0, 1.0]), np.array([5.0, 6.0, 4.0, 7.0]), np.array([True] * 4)).tolist()
    [True, False, True, False]
    """
    front, least = np.zeros(len(cost), bool), math.inf
    for i in np.lexsort((loss, cost)):
        if allowed[i] and loss[i] < least:
            front[i], least = True, loss[i]
    return front


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table of the points, and last of real text; costs on a front end with `*`."""
    rows = []
    for point in (*found["points"], {**found["held_out"], "sampler": "real text"}):
        cells = [str(point.get(name, "")) for name in ("sampler", "num_steps", "temperature")]
        for cost in COSTS:
            mark = "*" * point.get(f"on_front_of_{cost}", False)
            cells.append(f"{point[cost]:.3g}{mark}" if cost in point else "")
        nats, spread = (f"{point[name]:.2f} ± {point[f'{name}_stderr']:.2f}" for name in ("nats_per_token", "entropy"))
        rows.append([*cells, nats, f"{point['perplexity']:.1f}", spread])
    return [*HEAD], rows


def described(found: dict[str, Any], num: int) -> list[str]:
    """Return an aligned table of the points, held against real text with so many texts each, and what it says."""
    head, rows = table(found)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[name.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for name, *others in (head, *rows)]
    least = f"{found['least_entropy']:.2f} nats or more, {LEAST:.0%} of real text's"
    if any(point[f"on_front_of_{cost}"] for point in found["points"] for cost in COSTS):
        said = [f"* on the front: of all with an entropy of {least}, nothing that costs as much or less is as likely"]
    else:
        said = [f"no point is on the front: none has an entropy of {least}"]
    few = [f"{num} texts each are few: take points apart by several errors, or draw more with --num"]
    return ["  ".join(cells).rstrip() for cells in lines] + said + few * (num < FEW)


def figure(found: dict[str, Any], path: Path) -> None:
    """Draw points and fronts as SVG, perplexity over each cost; those with too little entropy are hollow."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    drawing, points = Figure((12, 5), layout="constrained"), found["points"]
    names = list(dict.fromkeys(point["sampler"] for point in points))
    for axes, (cost, label) in zip(drawing.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        for i, name in enumerate(names):
            mine = [point for point in points if point["sampler"] == name]
            colors = [colormaps["tab20"](i)] * len(mine)
            solid = [point["entropy"] >= found["least_entropy"] for point in mine]
            faces = [color if is_solid else "none" for color, is_solid in zip(colors, solid, strict=True)]
            x, y = ([point[of] for point in mine] for of in (cost, "perplexity"))
            axes.scatter(x, y, s=28, facecolors=faces, edgecolors=colors, label=name)
        front = sorted((p[cost], p["perplexity"]) for p in points if p[f"on_front_of_{cost}"])
        axes.step(*zip(*front, strict=True), where="post", color="0.4", lw=1, zorder=0) if front else None
        axes.axhline(found["held_out"]["perplexity"], color="0.4", ls="--", lw=1)
        axes.set(xscale="log", yscale="log", xlabel=label)
    axes = drawing.axes[0]
    axes.set_ylabel("perplexity under the judge, a token")
    axes.text(
        1, found["held_out"]["perplexity"], "real text ", transform=axes.get_yaxis_transform(), ha="right", va="bottom"
    )
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    drawing.suptitle(f"The front is of points with {LEAST:.0%} of the entropy of real text; hollow ones have less")
    with rc_context({"svg.hashsalt": "nanodlm", "svg.fonttype": "none"}):
        drawing.savefig(path, format="svg", metadata={"Date": None})
