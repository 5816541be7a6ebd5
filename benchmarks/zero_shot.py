"""Score texts that nobody trained on under a model and its autoregressive twin, of the same sizes and tokens.

    python -m benchmarks.zero_shot demo --eval.sets lambada=test.jsonl wikitext2=wiki.txt --eval.max_rows 2048

Texts are read by recipe (nanodlm/data/sets.py). The models are trained where the store lacks them: the demo's on
two CPU cores in two minutes each.
"""

import sys

from benchmarks.runs import build
from nanodlm.cli.arguments import Settings, parse
from nanodlm.cli.store import OpenStore
from nanodlm.diffusion.kinds import KindName

KINDS: tuple[KindName, ...] = ("absorbing", "autoregressive")


def zero_shot(config: Settings, *, store: OpenStore) -> None:
    """Print a table in Markdown: for each text and model the bound in three units, beside the unigram entropy."""
    print("| text | objective | bits per byte | nats per token | perplexity | unigram, bits per byte |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        metrics = build(config.replace(objective={"kind": kind}), store, "evaluate")["evaluate"].metrics
        held_out = {name.removeprefix("val_"): value for name, value in metrics.items()}
        for m in ({**held_out, "file": "held out"}, *metrics["sets"]):
            bits = f"{m['bits_per_byte']:.3f} ± {m['bits_per_byte_stderr']:.3f} | {m['nats_per_token']:.3f}"
            print(f"| {m['file']} | {kind} | {bits} | {m['perplexity']:.1f} | {m['unigram_bits_per_byte']:.3f} |")


if __name__ == "__main__":
    parse("zero_shot", zero_shot, sys.argv[1:])()
