"""Measure how much sooner the demo reaches the bound that a plain recipe reaches in so many minutes.

    python -m benchmarks.race --minutes 10                       # two CPU cores: a quarter of an hour
    python -m benchmarks.race --minutes 1 --train.lr 4e-3 --plain.model.n_layers 2

Both recipes are configurations whose runs lie in a store, so what is finished is not trained again. They have the same
training documents and tokenizer, and are scored on the same held-out tokens, each in rows of its own length.

The plain recipe is a textbook's: AdamW at 3e-4 with a cosine to 0, float32, independent continuous times, rows of 128
tokens, 32 to an update. What a configuration cannot say makes the opponent stronger than a textbook's: its output layer
and loss are this project's fused ones, which never hold all logits at once; matrices start at the scales of this
project rather than N(0, 0.02); weight decay is on matrices alone.
"""

from typing import Annotated, Any

import tyro

from benchmarks.runs import measure, shorten
from nanodlm.config import PRESETS, Config
from nanodlm.errors import UsageError
from nanodlm.stages.run import default_store
from nanodlm.store import Store

PACE_UPDATES = 20  # of a first run of the plain recipe, which tells how many updates there are in the minutes
PLAIN = Config().replace(
    model={"seq_len": 128, "n_layers": 4, "n_heads": 4, "d_model": 128, "d_ff": 512, "qk_norm": False,
           "zero_init": False},
    objective={"estimator": "continuous", "times": "independent"},
    train={"batch_size": 32, "lr": 3e-4, "lr_schedule": "warmup_cosine", "warmup_steps": 0, "beta2": 0.95,
           "clip_grad_norm": 0.0},
)  # fmt: skip


def race(
    config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"],
    plain: Config = PLAIN,
    store: str = default_store(),
    minutes: float = 10.0,
    updates: tuple[int, ...] = (100, 150, 200, 300, 400),
) -> dict[str, Any]:
    """Train the plain recipe for so many minutes, then the other in ever longer runs until one is at least as good.

    Args:
        config: The recipe that is to be faster; the plain one takes its data.
        plain: The plain recipe.
        store: Where runs lie: a folder or an fsspec URL.
        minutes: Training of the plain recipe.
        updates: Numbers of updates to try, each a whole run with a schedule of its own.

    Returns:
        `plain` and, in a list, `ours`, each as `benchmarks.runs.measure` returns it; `ratio` of the training seconds of
        both, and `stage_ratio`, of whole stages, None when the plain bound was never reached.
    """
    if config.eval.max_rows is not None:  # rows of another length would be of other text
        raise UsageError("a race scores the same held-out tokens, which are all of them: leave out --eval.max_rows")
    opened, plain = Store(store), plain.replace(data=config.data.model_dump(), eval=config.eval.model_dump())
    pace = measure(shorten(plain, PACE_UPDATES), opened)
    number = max(2, round(60 * minutes / (pace["seconds"] / PACE_UPDATES)))
    print("| recipe | updates | tokens | training, s | whole stage, s | bits per byte |\n|---|---|---|---|---|---|")
    slow = measure(shorten(plain, number), opened)
    _print_row("plain", slow)
    ours: list[dict[str, Any]] = []
    for number in sorted(updates):
        ours.append(measure(shorten(config, number), opened))
        _print_row("ours", ours[-1])
        if ours[-1]["bits_per_byte"] <= slow["bits_per_byte"]:
            ratios = {name: slow[name] / ours[-1][name] for name in ("seconds", "stage_seconds")}
            print(f"{ratios['seconds']:.1f} times sooner, {ratios['stage_seconds']:.1f} by whole stages")
            return {"plain": slow, "ours": ours, "ratio": ratios["seconds"], "stage_ratio": ratios["stage_seconds"]}
    print("the plain bound was not reached: try more --updates")
    return {"plain": slow, "ours": ours, "ratio": None, "stage_ratio": None}


def _print_row(name: str, row: dict[str, Any]) -> None:
    print(
        f"| {name} | {row['updates']:,} | {row['tokens']:,} | {row['seconds']:.1f} | {row['stage_seconds']:.1f} "
        f"| {row['bits_per_byte']:.4f} ± {row['stderr']:.4f} |"
    )


if __name__ == "__main__":
    tyro.cli(race, use_underscores=True)
