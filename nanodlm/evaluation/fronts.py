"""The points of a frontier, as `evaluation/frontier.py` measures them: which are on a front, as tables and pictures.

Nothing here imports JAX, so that a report can show them.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from nanodlm.evaluation import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = dict[str, Any]  # what `frontier` returns
LEAST = 0.95  # of the entropy of real text
LEFT_TO_RIGHT = "autoregressive"
FEW = 16  # texts, below which errors are themselves uncertain
HEAD = ("sampler", "steps", "temperature", "calls per token", "s per text", "nats per token", "perplexity", "entropy")
COSTS = {"calls_per_token": "network calls per token", "seconds_per_text": "seconds per text"}


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


def table(found: Found) -> list[list[str]]:
    """Return the rows, below `HEAD`, of a table of the points, and last of real text; costs on a front end with `*`."""
    rows = []
    for point in (*found["points"], {**found["held_out"], "sampler": "real text"}):
        cells = [str(point.get(name, "")) for name in ("sampler", "num_steps", "temperature")]
        for cost in COSTS:
            mark = "*" * point.get(f"on_front_of_{cost}", False)
            cells.append(f"{point[cost]:.3g}{mark}" if cost in point else "")
        nats, spread = (f"{point[name]:.2f} ± {point[f'{name}_stderr']:.2f}" for name in ("nats_per_token", "entropy"))
        rows.append([*cells, nats, f"{point['perplexity']:.1f}", spread])
    return rows


def described(found: Found) -> list[str]:
    """Return an aligned table of the points, held against real text, and what it says."""
    rows = [HEAD, *table(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[name.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for name, *others in rows]
    return ["  ".join(cells).rstrip() for cells in lines] + said(found)


def said(found: Found) -> list[str]:
    """Return what people should know of the table, a line each."""
    least = f"{found['least_entropy']:.2f} nats or more, {LEAST:.0%} of real text's"
    told = f"* on the front: of all with an entropy of {least}, nothing that costs as much or less is as likely"
    if not any(point[f"on_front_of_{cost}"] for point in found["points"] for cost in COSTS):
        told = f"no point is on the front: none has an entropy of {least}"
    told = f"{told}; {found['num']} texts of each, judged by {found['judge']}"
    few = [f"{found['num']} texts each are few: take points apart by several errors, or draw more with --num"]
    return [told, *few * (found["num"] < FEW)]


def shown(found: Found) -> dict[str, Any]:
    """Return what a page shows: a picture of each cost, the table, and the rows of it that are on a front."""
    rows = table(found)
    front = [row for row in rows if any(cell.endswith("*") for cell in row)]
    pictures = [
        figures.draw(f"Perplexity over {label}.", partial(_paint, found, cost), height=4.2)
        for cost, label in COSTS.items()
    ]
    return {"pictures": pictures, "head": HEAD, "points": rows, "front": [*front, rows[-1]], "said": said(found)}


def _paint(found: Found, cost: str, axes: "Axes") -> None:
    """Draw points and the front, perplexity over a cost; those with too little entropy are hollow."""
    from matplotlib.ticker import LogLocator

    points, real, soft = found["points"], found["held_out"]["perplexity"], figures.COLOURS["soft"][0]
    for i, name in enumerate(dict.fromkeys(point["sampler"] for point in points)):
        colour, marker = figures.COLOURS[(figures.SERIES * 3)[i]][0], "os^"[i // len(figures.SERIES)]
        mine = [point for point in points if point["sampler"] == name]
        for is_hollow in (False, True):
            some = [point for point in mine if is_hollow == (point["entropy"] < found["least_entropy"])]
            x, y = ([point[of] for point in some] for of in (cost, "perplexity"))
            how: dict[str, Any] = {"fillstyle": "none"} if is_hollow else {"label": name}
            axes.plot(x, y, color=colour, marker=marker, linestyle="", markersize=4.5, **how)
    front = sorted((p[cost], p["perplexity"]) for p in points if p[f"on_front_of_{cost}"])
    axes.step(*zip(*front, strict=True), where="post", color=soft, lw=1, zorder=0) if front else None
    axes.axhline(real, color=soft, ls="--", lw=1)
    axes.set(xscale="log", yscale="log", xlabel=COSTS[cost], ylabel="perplexity under the judge, a token")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")
    axes.text(1, real, "real text ", transform=axes.get_yaxis_transform(), ha="right", va="bottom")


def write(found: Found, folder: Path) -> None:
    """Write the numbers as `frontier.json`, and both pictures, one beside the other, as `frontier.svg`."""
    (folder / "frontier.json").write_text(json.dumps(found, indent=1))
    left, right = (
        picture.replace("<svg", f'<svg x="{440 * i}"', 1) for i, picture in enumerate(shown(found)["pictures"])
    )
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="880" height="404">'
    (folder / "frontier.svg").write_text(f"{frame}{left}{right}</svg>\n")
