"""Tell what updates of large presets cost on this machine, by the rate at which it computes a few rows of them.

    python -m benchmarks.cost                                   # two CPU cores: minutes
    python -m benchmarks.cost --rows 64 --dtype bfloat16        # an accelerator
    python -m benchmarks.cost --flops_per_second 495e12         # arithmetic, nothing measured

An update of a preset may be hours here; one of a few rows is seconds, and by the formula of `nanodlm/bench/flops.py`
costs as many FLOPs for each token.
"""

from typing import Any, Literal

import tyro

from nanodlm.bench.flops import flops_per_update
from nanodlm.bench.speed import train
from nanodlm.config import PRESETS


def cost(
    presets: tyro.conf.Positional[tuple[str, ...]] = ("text8", "owt"),
    rows: int = 2,
    steps: int = 3,
    updates: tuple[int, ...] = (1000, 100_000, 500_000),
    dtype: Literal["float32", "bfloat16"] = "float32",
    flops_per_second: float | None = None,
) -> list[dict[str, Any]]:
    """Time updates of a few rows, and print what updates of the preset's own size would take.

    Args:
        presets: Names of presets.
        rows: Of an update that is timed, an even number.
        steps: Updates that are timed, after one that is not.
        updates: How many are told the time of.
        dtype: Precision of matrix products.
        flops_per_second: A rate to be taken for that of this machine, so that nothing is timed.

    Returns:
        Rows with `preset`, `tokens` and `flops` of its update, `flops_per_second`, and `seconds` of so many `updates`.
    """
    found = []
    print(f"| preset | tokens an update | TFLOP | GFLOP/s | {' | '.join(f'{n:,} updates' for n in updates)} |")
    print("|---" * (4 + len(updates)) + "|")
    for name in presets:
        config, few = PRESETS[name], {"batch_size": rows, "grad_acc_steps": 1}
        flops, rate = flops_per_update(config), flops_per_second
        if rate is None:
            rate = train(config.replace(train=few, model={"dtype": dtype}), steps=steps)["flops_per_second"]
        tokens = config.train.batch_size * config.train.grad_acc_steps * config.model.seq_len
        seconds = [flops * n / rate for n in updates]
        found.append({"preset": name, "tokens": tokens, "flops": flops, "flops_per_second": rate, "seconds": seconds})
        times = " | ".join(_told(each) for each in seconds)
        print(f"| {name} | {tokens:,} | {flops / 1e12:,.1f} | {rate / 1e9:,.1f} | {times} |")
    return found


def _told(seconds: float) -> str:
    """Return a time in the largest unit of which it is two or more, or in minutes.

    >>> _told(5.4e6), _told(7000)
    ('62 days', '117 min')
    """
    units = (("years", 365.25 * 86400), ("days", 86400), ("h", 3600))
    unit, length = next(((unit, length) for unit, length in units if seconds >= 2 * length), ("min", 60))
    return f"{seconds / length:,.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"


if __name__ == "__main__":
    tyro.cli(cost, use_underscores=True)
