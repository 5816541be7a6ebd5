"""Train the small published recipe on a text, from left to right and with masks, beside this project's own recipe.

    python -m benchmarks.anchors tinyshakespeare.txt                    # four trainings of five minutes on two cores
    python -m benchmarks.anchors tinyshakespeare.txt --tokenizer bpe    # the same with a vocabulary of words

The sizes and the plain recipe are those of nanoGPT's `train_shakespeare_char.py` as its README runs it on a processor.
Runs lie in a store, so that the command goes on where it was when it is run again.
"""

from typing import Any, Literal

import tyro

from benchmarks.runs import build, shorten
from nanodlm.config import PRESETS, Config
from nanodlm.diffusion.kinds import KindName
from nanodlm.stages.run import default_store
from nanodlm.store import Store

KINDS: tuple[KindName, ...] = ("autoregressive", "absorbing")
SIZES = {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_ff": 512, "seq_len": 64}
_DECAY = {"lr_schedule": "warmup_stable_decay", "warmup_steps": 50, "cooldown_steps": 1000}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"train": {"beta2": 0.99}},
    "own": {
        "train": {"optimizer": "muon", "lr": 8e-3, "min_lr": 0.0, "weight_decay": 0.0, **_DECAY},
        "model": {"conv_width": 5, "qk_norm": False},
    },
}


def recipe(name: str, kind: KindName, source: str, tokenizer: str = "chars", updates: int = 2000) -> Config:
    """Return a training by one of `RECIPES`, whose last tenth of text is held out; fewer updates decay as they did.

    >>> recipe("own", "absorbing", "plays.txt", updates=200).train.cooldown_steps
    100
    """
    config = PRESETS["shakespeare"].replace(
        data={"source": source, "tokenizer": tokenizer, "val_share": 0.1},
        model=SIZES,
        train={"batch_size": 12, "max_steps": 2000},
        objective={"kind": kind},
        exp={"save_every": 2000, "val_rows": 0},
    )
    return shorten(config.replace(**RECIPES[name]), updates)


def anchors(
    source: tyro.conf.Positional[str],
    tokenizer: Literal["chars", "bpe"] = "chars",
    store: str = default_store(),
    updates: int = 2000,
    recipes: tuple[str, ...] = ("plain", "own"),
) -> list[dict[str, Any]]:
    """Train and score them, and print a table in Markdown.

    Args:
        source: A text.
        tokenizer: Characters, or words of BPE, 4,096 entries.
        store: Where runs lie: a folder or an fsspec URL.
        updates: Of each run.
        recipes: `plain`, `own` or both.

    Returns:
        Rows with `objective`, `recipe`, and what `evaluate` says.
    """
    found = []
    print("| objective | recipe | nats per token | bits per byte | unigram | minutes of training |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        for name in recipes:
            artifacts = build(recipe(name, kind, source, tokenizer, updates), Store(store), "evaluate")
            m, trained = artifacts["evaluate"].metrics, artifacts["train"].metrics
            found.append({"objective": kind, "recipe": name, **m})
            minutes = trained["trained_tokens"] / trained["train_tokens_per_second"] / 60
            units = "val_nats_per_token", "val_bits_per_byte"
            nats, bits = (f"{m[of]:.3f} ± {m[f'{of}_stderr']:.3f}" for of in units)
            print(f"| {kind} | {name} | {nats} | {bits} | {m['val_unigram_bits_per_byte']:.3f} | {minutes:.1f} |")
    return found


if __name__ == "__main__":
    tyro.cli(anchors, use_underscores=True)
