"""Measure what each part of the demo's recipe is worth: variants of it, trained on the same tokens with several seeds.

    python -m benchmarks.ablation --seeds 3 --eval.max_rows 2048                       # two CPU cores: two hours
    python -m benchmarks.ablation --seeds 3 --updates 400 --only no-conv untied        # a quarter of an hour

Runs lie in a store, so that the command goes on where it was when it is run again. A run that diverged is none, and is
tried again.
"""

import math
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.runs import build, measure, shorten
from nanodlm.config import PRESETS, Config
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages.run import default_store
from nanodlm.store import Store

PRESET = "preset"


def variants(updates: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what is changed, by name: the groups for `Config.replace`, in runs of so many updates.

    >>> variants(100)["decay-20"]
    {'train': {'lr_schedule': 'warmup_stable_decay', 'cooldown_steps': 20}}
    """

    def decay(share: float) -> dict[str, dict[str, Any]]:
        return {"train": {"lr_schedule": "warmup_stable_decay", "cooldown_steps": round(share * updates)}}

    return {
        PRESET: {},
        "adamw-4e-3": {"train": {"optimizer": "adamw", "lr": 4e-3}},
        "adamw-8e-3": {"train": {"optimizer": "adamw", "lr": 8e-3}},
        "qk-norm": {"model": {"qk_norm": True}},
        "no-qk-norm": {"model": {"qk_norm": False}},
        "no-zero-init": {"model": {"zero_init": False}},
        "no-conv": {"model": {"conv_width": 0}},
        "untied": {"model": {"tie_embeddings": False}},
        "cosine": {"train": {"lr_schedule": "warmup_cosine"}},
        "decay-20": decay(0.2),
        "decay-50": decay(0.5),
        "decay-all": decay(1.0),
        "ema-0.99": {"train": {"ema_decay": 0.99}},
        "ema-0.999": {"train": {"ema_decay": 0.999}},
        "weights-bound": {"objective": {"weighting": "bound"}},
        "weights-uniform": {"objective": {"weighting": "uniform"}},
        "continuous": {"objective": {"estimator": "continuous"}},
        "count": {"objective": {"estimator": "count"}},
        "constant-count": {"objective": {"estimator": "constant_count"}},
        "independent-times": {"objective": {"times": "independent"}},
        "bfloat16": {"model": {"dtype": "bfloat16"}},
    }


def ablation(
    config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"],
    store: str = default_store(),
    seeds: int = 3,
    updates: int | None = None,
    only: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Train and score every variant with every seed, and compare each with the preset seed by seed.

    A seed is that of the noise, of the initial parameters and of the order of the rows at once. Variants that equal the
    configuration itself are left out.

    Args:
        config: The preset; `eval.max_rows` held-out rows are scored.
        store: Where runs lie: a folder or an fsspec URL.
        seeds: Runs of each variant.
        updates: Of each run; by default `train.max_steps`.
        only: Names of variants; none is all. The preset is always there.

    Returns:
        Rows from the best to the worst, as `compare` returns them.

    Raises:
        UsageError: For an unknown variant.
    """
    config = shorten(config, updates or config.train.max_steps)
    table = variants(config.train.max_steps)
    if unknown := set(only) - set(table):
        raise UsageError(f"no variant {unknown.pop()!r}: choose from {', '.join(table)}")
    chosen = {name: config.replace(**table[name]) for name in table if name in (PRESET, *(only or table))}
    chosen = {name: variant for name, variant in chosen.items() if name == PRESET or variant != config}
    opened = Store(store)
    runs: dict[str, list[dict[str, Any] | None]] = {name: [] for name in chosen}
    for name, variant in chosen.items():
        for seed in range(seeds):
            seeded = variant.replace(
                train={"seed": config.train.seed + seed},
                model={"init_seed": config.model.init_seed + seed},
                data={"shuffle_seed": config.data.shuffle_seed + seed},
            )
            build(seeded, opened, "shard")  # what fails here is no divergence
            try:
                runs[name].append(measure(seeded, opened))
            except NanodlmError as error:
                print(f"{name}, seed {seed}: {error}")
                runs[name].append(None)
    rows = [compare(name, runs[name], runs[PRESET]) for name in chosen]
    rows.sort(key=lambda row: math.inf if row["bits_per_byte"] is None else row["bits_per_byte"])
    _print_table(rows)
    return rows


def compare(name: str, runs: list[dict[str, Any] | None], preset: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Compare a variant's runs with the preset's, seed by seed; None is a run that diverged.

    Returns:
        `variant`; `bits_per_byte` and `seconds` of training, means; `sd` over seeds; `difference` to the preset and its
        standard error `difference_stderr`. What a single seed does not tell is None, as are all numbers of a variant
        of which a run diverged.
    """
    row = {"variant": name, **dict.fromkeys(("bits_per_byte", "sd", "difference", "difference_stderr", "seconds"))}
    if None in runs:
        return row
    bits = np.array([run["bits_per_byte"] for run in runs if run])
    row |= {"bits_per_byte": bits.mean(), "seconds": np.mean([run["seconds"] for run in runs if run])}
    row["sd"] = bits.std(ddof=1) if len(bits) > 1 else None
    if name != PRESET and None not in preset:
        differences = bits - [run["bits_per_byte"] for run in preset if run]
        row["difference"] = differences.mean()
        row["difference_stderr"] = differences.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else None
    return row


def _print_table(rows: list[dict[str, Any]]) -> None:
    print("| variant | bits per byte | sd over seeds | difference | standard error | training, s |")
    print("|---|---|---|---|---|---|")
    forms = {"bits_per_byte": ".4f", "sd": ".4f", "difference": "+.4f", "difference_stderr": ".4f", "seconds": ".1f"}
    for row in rows:
        cells = ["" if row[name] is None else format(row[name], form) for name, form in forms.items()]
        print(f"| {row['variant']} | {' | '.join(cells)} |{' diverged' if row['bits_per_byte'] is None else ''}")


if __name__ == "__main__":
    tyro.cli(ablation, use_underscores=True)
