"""Figures for pages, drawn by matplotlib as SVG whose colours are those of the page's style.

A picture is about as wide as a phone, and pages set two beside each other where there is room: so its letters have the
size of the text around it. Its colours are variables with a value for light grounds, so that the one text is right
within a page of either scheme, and, as an address, where no page gives them a value. Equal data gives equal bytes.
"""

import base64
import html
import io
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanodlm.store.cache import cache_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = list[dict[str, Any]]  # of a training, as `logs.json` holds them
COLOURS = {  # for light grounds, and for dark ones; each can be read as text on both of its scheme's
    "ground": ("#ffffff", "#12161d"),
    "card": ("#f4f6f9", "#1b212b"),
    "line": ("#d5dbe3", "#343d4b"),
    "soft": ("#566173", "#a3afc0"),
    "ink": ("#17202c", "#e8edf4"),
    "blue": ("#1f5fb4", "#7ab0ff"),
    "green": ("#17734a", "#5bd09a"),
    "orange": ("#a84a08", "#f2a65a"),
    "violet": ("#7a3aa8", "#cb9bf2"),
    "rose": ("#b0285c", "#f58fb4"),
    "teal": ("#0f6f7d", "#5cc8d6"),
}
SERIES = ("blue", "orange", "green", "violet", "rose", "teal")  # of runs, in their order
FONT = "system-ui, sans-serif"
MEANS = 60  # points of a smoothed line
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True,
    "axes.axisbelow": True, "axes.xmargin": 0.01, "legend.frameon": False, "legend.handlelength": 1.4,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip
STYLE |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), COLOURS["ground"][0])
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color"), COLOURS["line"][0])
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), COLOURS["soft"][0])


class Line(NamedTuple):
    """What is drawn of some points: a line, points, or with a `low` and a `high` the band between them."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "blue"
    mark: str = "-"  # as matplotlib has it: "-" a line, "--" a dashed one, "o" points
    band: tuple[Sequence[float], Sequence[float]] | None = None


def draw(alt: str, paint: Callable[["Axes"], None], *, height: float = 2.6) -> str:
    """Return an SVG, 4.4 inches wide, of what `paint` draws; `alt` says in words what it shows."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # a list of fonts: a home may be read-only
    from matplotlib import style
    from matplotlib.figure import Figure

    salt = {"svg.hashsalt": alt}  # of ids, which must differ between the figures of one page
    with style.context(["default", STYLE | salt]):  # whatever the user has set for own figures
        figure, svg = Figure(figsize=(4.4, height), layout="constrained"), io.StringIO()
        axes = figure.add_subplot()
        paint(axes)
        handles = axes.get_legend_handles_labels()
        if len(handles[1]) > 1:
            widths = [len(label) + 6 for label in handles[1]]  # of letters: a line has room for some 58
            columns = len(widths) if sum(widths) < 58 else max(1, min(3, 58 // max(widths)))
            figure.legend(*handles, loc="outside upper left", ncols=columns, columnspacing=1.2, borderaxespad=0.1)
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(
        r' (xmlns|xmlns:xlink|version)="[^"]*"|<defs>\s*<style.*?</style>\s*</defs>', "", text, flags=re.DOTALL
    )
    text = re.sub(r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}")[^"]*"', "", text)  # all but markers and clips
    text = re.sub(r"font-family: [^;]*", f"font-family: {FONT}", text)
    for name, (light, _) in COLOURS.items():
        text = text.replace(f": {light}", f": var(--{name}, {light})")
    drawn = f'<svg role="img" aria-label="{html.escape(alt)}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return text.replace("<svg", drawn, 1)


def as_url(svg: str) -> str:
    """Return an address that holds a picture, for pages that cannot hold the picture itself."""
    svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def lines(alt: str, drawn: Sequence[Line], x: str, y: str, levels: dict[str, float] | None = None) -> str:
    """Return a picture of lines over `x`, with dashed horizontal ones at named levels."""

    def paint(axes: "Axes") -> None:
        for one in drawn:
            colour = COLOURS[one.colour][0]
            if one.band:
                axes.fill_between(one.x, *one.band, color=colour, alpha=0.18, linewidth=0)
            axes.plot(one.x, one.y, one.mark, color=colour, label=one.label.lstrip("_"), markersize=4.5)
        for name, value in (levels or {}).items():
            axes.axhline(value, color=COLOURS["orange"][0], linestyle=(0, (5, 3)), linewidth=1.3, label=name)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.locator_params(axis="x", nbins=6)

    return draw(alt, paint)


def bars(alt: str, values: dict[str, float], x: str, colour: str = "blue", shown: str = "{:,.1f}") -> str:
    """Return a picture of a horizontal bar a name, the first at the top, with its value beside it as it is `shown`."""

    def paint(axes: "Axes") -> None:
        drawn = axes.barh(list(values), list(values.values()), color=COLOURS[colour][0], height=0.62)
        axes.bar_label(drawn, fmt=shown, padding=4, color=COLOURS["ink"][0])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.locator_params(axis="x", nbins=5)

    return draw(alt, paint, height=0.8 + 0.27 * len(values))


def smoothed(records: Records, name: str, over: str = "step", **how: Any) -> Line | None:
    """Return the line of a number of each record: means of about 1/60 of the records, and 80% of them as a band."""
    points = [(r[over], r[name]) for r in records if r.get(name) is not None and r.get(over) is not None]
    if not points:
        return None
    parts = np.array_split(np.array(points, float), min(len(points), MEANS))
    x, y = np.array([part.mean(axis=0) for part in parts]).T
    low, high = np.array([np.quantile(part[:, 1], (0.1, 0.9)) for part in parts]).T
    return Line(how.pop("label", name), x.tolist(), y.tolist(), band=(low.tolist(), high.tolist()), **how)


def curve(runs: dict[str, Records], over: str = "step", unigram: float | None = None) -> str:
    """Return the bounds of trainings, over updates (`step`) or `seconds`; empty without a record that has them.

    Of one run, the training bound is smoothed and has its spread around it, and points are the validation bound at each
    save. Of several, each has a colour.
    """
    drawn: list[Line] = []
    said: list[str] = []
    for (name, records), colour in zip(runs.items(), SERIES * len(runs), strict=False):
        one = len(runs) == 1
        line = smoothed(records, "nats_per_token", over, colour=colour, label="training" if one else name)
        if line is None:
            continue
        drawn.append(line if one else line._replace(band=None))
        said.append(f"{name}: {line.y[0]:.2f} to {line.y[-1]:.2f}")
        scored = [r for r in records if r.get("val_nats_per_token") is not None and r.get(over) is not None]
        if scored:
            x, y = [r[over] for r in scored], [r["val_nats_per_token"] for r in scored]
            drawn.append(Line("validation" if one else "", x, y, "green" if one else colour, "o-" if one else "o"))
            said[-1] += f", on validation text {y[-1]:.2f}"
    if not drawn:
        return ""
    unit = {"step": "updates", "seconds": "seconds of updates"}[over]
    alt = f"The bound in nats per token over {unit}; {'; '.join(said)}."
    return lines(alt, drawn, unit, "nats per token", {} if unigram is None else {"unigram entropy": unigram})


def lineage(made: dict[str, tuple[str, tuple[str, ...]]]) -> str:
    """Return a picture of which stage's artifact was made from which: of each name its label, and those it reads.

    They are in order, so that each reads from those above it: from the last one straight, from others around.
    """
    names = list(made)
    alt = "; ".join(f"{name} is made from {' and '.join(reads)}" for name, (_, reads) in made.items() if reads)

    def paint(axes: "Axes") -> None:
        from matplotlib.patches import FancyBboxPatch

        ink, soft, card, line = (COLOURS[name][0] for name in ("ink", "soft", "card", "line"))
        for row, (name, (label, reads)) in enumerate(made.items()):
            box: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.012", "mutation_aspect": 9}
            axes.add_patch(FancyBboxPatch((0.2, -row - 0.28), 0.6, 0.56, fc=card, ec=line, **box))
            axes.text(0.225, -row, name, va="center", color=ink, weight="bold")
            axes.text(0.775, -row, label, va="center", ha="right", color=soft)
            for read in reads:
                above = names.index(read)
                side = 0 if row == above + 1 else (-1) ** (row - above + 1)
                edge, at = 0 if side else 0.28, 0.5 + 0.3 * side
                start, end = (at, -above - edge), (at, -row + edge)
                bend = {"connectionstyle": f"arc3,rad={-side * 0.4}"}
                arrow = {"arrowstyle": "-|>,head_width=.2,head_length=.4", "color": soft, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", end, start, arrowprops={**arrow, **bend})
        axes.set(xlim=(0, 1), ylim=(0.5 - len(names), 0.5))
        axes.axis("off")

    return draw(f"{alt}.", paint, height=0.46 * len(names))
