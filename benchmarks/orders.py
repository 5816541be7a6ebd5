"""Measure how tight the bound is: beside it, exact likelihoods in orders, and the bound of several orders together.

    python -m benchmarks.orders                                    # two CPU cores: minutes, and the demo before it
    python -m benchmarks.orders --objective.kind autoregressive    # its twin from left to right, on the same tokens

Any order in which the tokens of a row are told gives a likelihood, by the chain rule. The mean of -log p over random
orders is the bound; -log of the mean of p over K of them is a tighter one (Burda et al., arXiv:1509.00519, equation 8).
"""

import math
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.runs import build
from nanodlm.checkpoints.loading import load_artifact
from nanodlm.config import PRESETS, Config
from nanodlm.data.rows import evenly_spaced, read
from nanodlm.data.tokenizer import token_sizes
from nanodlm.evaluation.orders import bound_nats, random_order, walk
from nanodlm.evaluation.uncertainty import documents_in, ratio_stderr
from nanodlm.stages.run import default_store
from nanodlm.store import Store


def orders(
    config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"],
    store: str = default_store(),
    rows: int = 64,
    most: int = 16,
) -> list[dict[str, Any]]:
    """Score the same held-out rows in several orders, and by the bound.

    Args:
        config: The run whose network and data are used; not of uniform or hybrid noise.
        store: Where it lies: a folder or an fsspec URL.
        rows: Rows to score, evenly spaced over those of full length.
        most: Random orders that are drawn for each row, a power of 4.

    Returns:
        Rows with `order`; `calls` of the network for each row; `nats_per_token`, `bits_per_byte` and the latter's
        `stderr`, by document.
    """
    artifacts = build(config, Store(store), "train")
    (model, encoding), length = load_artifact(artifacts["train"]), config.model.seq_len
    held_out = read(artifacts["shard"].file("validation.arrayrecord"), artifacts["shard"].metrics["dtype"])
    whole = [row for row in held_out if len(row) == length]
    places = evenly_spaced(len(whole), rows)
    x_0, documents = np.stack([whole[i] for i in places]), documents_in(whole, encoding.eot_token)[places]
    sizes, table = token_sizes(encoding)[x_0, 0].sum(axis=1), []
    kind = model.objective.traits

    def add(order: str, calls: int, nats: np.ndarray) -> None:
        bits = nats.sum() / sizes.sum() / math.log(2)
        stderr = ratio_stderr(nats, sizes, documents) / math.log(2)
        table.append({"order": order, "calls": calls, "nats_per_token": float(nats.sum()) / x_0.size})
        table[-1] |= {"bits_per_byte": float(bits), "stderr": stderr}
        print(f"| {order} | {calls:,} | {nats.sum() / x_0.size:.4f} | {bits:.4f} ± {stderr:.4f} |")

    def of_rows(tokens: np.ndarray, order: Any) -> np.ndarray:
        told = tokens.ravel()
        nats = walk(model, len(told), lambda places, log_p: told[places], order)[1]
        return nats.reshape(-1, *x_0.shape).sum(axis=2)

    print("| order | network calls a row | nats per token | bits per byte |")
    print("|---|---|---|---|")
    if kind.reads == "before":
        add("left to right, which is all there is", 1, bound_nats(model, x_0.ravel(), group=1, draws=1, seed=0))
        return table
    for draws in (1, 16):
        bound = bound_nats(model, x_0.ravel(), group=1, draws=draws, seed=0)
        add(f"none: the bound, {draws} draw{'s' * (draws > 1)} of noise", draws, bound)
    drawn = of_rows(np.tile(x_0, (most, 1)), random_order(model, 0))
    for k in (4**i for i in range(most.bit_length() // 2 + 1) if 4**i <= most):
        mean = np.exp(drawn.min(axis=0) - drawn).reshape(-1, k, len(x_0)).mean(axis=1)
        add(f"{k} random: -log of the mean of p", k * length, (drawn.min(axis=0) - np.log(mean)).mean(axis=0))
    add("left to right", length, of_rows(x_0, lambda shape: np.tile(np.arange(length), (shape[0], 1)))[0])
    add("surest first", length, of_rows(x_0, None)[0])
    return table


if __name__ == "__main__":
    tyro.cli(orders, use_underscores=True)
