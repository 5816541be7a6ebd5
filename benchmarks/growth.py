"""Measure how costs grow with sizes, beside what was promised of them: a figure, its numbers, and their exponents.

    python -m benchmarks.growth FOLDER      # growth.svg and growth.json there, beside stores that the next run reuses

One size is doubled at a time, the others are those of `BASE`. Seconds are those of the processors, of all threads.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import tyro

from benchmarks.guard import in_turn, pairs
from benchmarks.scale import _make_store
from nanodlm.bench.data import ROW, ROWS, _alone, data
from nanodlm.bench.flops import flops_per_update
from nanodlm.bench.memory import plan
from nanodlm.config import PRESETS, Config
from nanodlm.evaluation.figures import COLOURS, SERIES, STYLE
from nanodlm.stages.lookup import look_up, of_stage, why
from nanodlm.store import Store

BASE = Config().replace(model={"n_layers": 4, "seq_len": 128}, train={"batch_size": 16})  # and d = 128, V = 4,096
SIZES = {"d": (64, 128, 256, 512), "L": (128, 256, 512, 1024), "V": (4096, 8192, 16384, 32768), "B": (16, 32, 64, 128)}
CHANGES: dict[str, Callable[[int], dict[str, Any]]] = {
    "d": lambda d: {"model": {"d_model": d, "d_ff": 4 * d}},
    "L": lambda length: {"model": {"seq_len": length}},
    "V": lambda size: {"data": {"vocab_size": size - 1}},
    "B": lambda rows: {"train": {"batch_size": rows}},
}
OTHER = PRESETS["demo"].replace(train={"lr": 0.5})
LOOK_UPS: dict[str, Callable[[Store], Any]] = {
    "a run": lambda store: [*look_up(PRESETS["demo"], store)],
    "why not another": lambda store: [why(one, partial(of_stage, store=store)) for one in look_up(OTHER, store)],
    "all": lambda store: sum(1 for _ in store.artifacts(store)),
}


class Sweep(NamedTuple):
    """What is measured at sizes, of each series, and what was promised of it, but for a factor."""

    unit: str
    x: Sequence[float]
    y: dict[str, list[float]]
    promised: Mapping[str, Sequence[float]]

    def exponents(self) -> dict[str, list[float]]:
        """Return of each series the exponent of the power law nearest to it, that of its last step, and the promise's.

        >>> Sweep("s", [1, 2, 4], {"update": [2, 4, 16]}, {"update": [1, 2, 4]}).exponents()
        {'update': [1.5, 2.0, 1.0]}
        """

        def slope(y: Sequence[float], last: int = 0) -> float:
            return round(float(np.polyfit(np.log(self.x[-last:]), np.log(y[-last:]), 1)[0]), 2)

        return {name: [slope(y), slope(y, 2), slope(self.promised[name])] for name, y in self.y.items()}


def updates(of: str, sizes: Sequence[int], repeats: int, base: Config = BASE) -> Sweep:
    """Time updates while one size grows, those of d with Muon as well, and count their FLOPs."""
    spent, flops = {}, {}
    for name in ("adamw", "muon")[: 2 if of == "d" else 1]:
        configs = [base.replace(train={"optimizer": name}).replace(**CHANGES[of](size)) for size in sizes]
        spent[name] = [median(*in_turn([next(pairs(config))[1]], repeats)) for config in configs]
        flops[name] = [*map(flops_per_update, configs)]
    return Sweep("s", sizes, spent, flops)


def preparation(batches: Sequence[int]) -> Sweep:
    """Prepare growing corpora, of ids and of text, and return what all stages take together."""
    tokens = [ROWS * ROW * number for number in batches]
    found = [data(BASE, tokens=number) for number in tokens]
    rates = {kind: [one[kind]["end to end"]["tokens_per_second_per_core"] for one in found] for kind in ("ids", "text")}
    spent = {kind: [*np.divide(tokens, rate)] for kind, rate in rates.items()}
    return Sweep("s", tokens, spent, dict.fromkeys(spent, tokens))


def look_ups(folder: str, counts: Sequence[int], repeats: int) -> Sweep:
    """Time finding a run, saying why another is not there, and reading all records, in stores of growing size."""
    stores = [Store(Store(folder).uri(f"scale-{count}")) for count in counts]
    for store, count in zip(stores, counts, strict=True):
        _make_store(store.uri(), count)
    calls = {name: [partial(call, store) for store in stores] for name, call in LOOK_UPS.items()}
    spent = {name: [*map(median, in_turn(one, repeats))] for name, one in calls.items()}
    return Sweep("s", counts, spent, dict.fromkeys(spent, counts) | {"a run": [1] * len(counts)})


def memory(sizes: Sequence[int]) -> Sweep:
    """Compile updates of networks of growing width, and return what they hold, over their parameters."""
    found = [_alone(plan, BASE.replace(**CHANGES["d"](size)), 1) for size in sizes]
    held = {name: [one["bytes"][name] / 2**20 for one in found] for name in ("total", "temporaries", "parameters")}
    counts = [one["parameters"] for one in found]
    return Sweep("MiB", counts, held, dict.fromkeys(held, counts))


def draw(sweeps: dict[str, Sweep], path: Path) -> None:
    """Draw each sweep's points and, dashed through the last of them, what was promised."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with style.context(["default", STYLE | {"svg.hashsalt": "growth"}]):
        figure = Figure(figsize=(13, 6.4), layout="constrained")
        for axes, (of, sweep) in zip(figure.subplots(2, 4).flat, sweeps.items(), strict=False):
            for (name, (fitted, _, promised)), colour in zip(sweep.exponents().items(), SERIES, strict=False):
                y, line = sweep.y[name], np.array(sweep.promised[name])
                axes.plot(sweep.x, y, "o", c=COLOURS[colour][0], label=f"{name}: {fitted:.2f} ({promised:.2f})")
                axes.plot(sweep.x, line * y[-1] / line[-1], "--", c=COLOURS[colour][0], linewidth=1.2)
            axes.set(xscale="log", yscale="log", title=f"{of}, {sweep.unit}")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks(sweep.x, [f"{x:,}" if x < 1e5 else f"{x / 1e6:.2g}M" for x in sweep.x])
            axes.minorticks_off()
            axes.margins(x=0.08, y=0.25)
            axes.legend(loc="upper left", borderaxespad=0)
        figure.axes[-1].axis("off")
        figure.suptitle("Measured, and dashed what was promised; exponents measured (promised)")
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def growth(folder: tyro.conf.Positional[str], repeats: int = 3) -> dict[str, Sweep]:
    """Measure everything, ten minutes on two cores that little else uses, and print a table in Markdown.

    Args:
        folder: Where the figure, the numbers and the stores are put.
        repeats: Updates and look-ups of each size, of which medians are taken.
    """
    sweeps = {f"update over {of}": updates(of, sizes, repeats) for of, sizes in SIZES.items()}
    sweeps["preparation over tokens"] = preparation((4, 16, 64))
    sweeps["look-ups over artifacts"] = look_ups(folder, (100, 400, 1600), repeats)
    sweeps["memory over parameters"] = memory(SIZES["d"])
    print("| | | exponent | of the last step | promised |\n|---|---|---|---|---|")
    for of, sweep in sweeps.items():
        for name, numbers in sweep.exponents().items():
            print(f"| {of} | {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    Path(folder, "growth.json").write_text(json.dumps({of: sweep._asdict() for of, sweep in sweeps.items()}, indent=1))
    draw(sweeps, Path(folder, "growth.svg"))
    return sweeps


if __name__ == "__main__":
    tyro.cli(growth, use_underscores=True)
