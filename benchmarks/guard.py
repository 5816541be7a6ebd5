"""Tell whether updates, bounds or sampler steps have become slower since a former commit, on a machine that others use.

    python -m benchmarks.guard            # exits with 1, and says which, where one fell by more than the noise
    python -m benchmarks.guard --keep     # appends its numbers to the table in docs/benchmarks.md

Each is done in turn with what a plain network of the same sizes needs for it, in one process, and the seconds are those
of the processors, of all threads: other work on the machine changes the ratio of these two least. What only the clock
shows, such as a part that runs on one core alone, is not seen: `benchmarks.plain` goes by the clock.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.plain import ADAMW, _updates, plain_step
from nanodlm.bench.flops import synthetic_encoding
from nanodlm.build import make_model
from nanodlm.config import PRESETS, Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.evaluation.scoring import make_scorer
from nanodlm.generation.generate import make_draw
from nanodlm.model.transformer import Transformer
from nanodlm.training.step import make_program

Call = Callable[[], Any]
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = "| commit | date | processor |"  # with which the table's first line begins
FEW = {"model": {"d_model": 64, "d_ff": 256}, "train": {"batch_size": 4}, "data": {"tokenizer": "gpt2"}}
SIZES = {"demo": PRESETS["demo"].replace(train={"batch_size": 8}), "wide": PRESETS["demo"].replace(**FEW)}
STEPS = 2  # of a draw: one with everything masked, one with half of it
LEAST = 0.1  # a fall that is told: processes differ by 2 to 5% on their own
KINDS = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2"}  # the best first


def pairs(config: Config) -> Iterator[tuple[str, Call, Call]]:
    """Yield the name of each thing to time, ours, and the plain one: an update, and what a forward pass is done for."""
    encoding, key = synthetic_encoding(config), jax.random.key(0)
    vocabulary, program = Vocabulary.of(encoding), make_program(config, Vocabulary.of(encoding))
    rows = np.random.default_rng(0).integers(0, encoding.n_vocab, program.rows.shape, np.int32)[0]
    sizes = config.model.model_dump(include={"n_layers", "n_heads", "d_model", "d_ff"})
    usual = Transformer(vocab_size=vocabulary.padded_size, **sizes, qk_norm=False, zero_init=False, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(usual)
    step = jax.jit(partial(plain_step, graphdef=graphdef, mask_id=vocabulary.mask_id), donate_argnums=0)
    moved, compiled = jax.tree.map(jnp.copy, nnx.to_pure_dict(params)), program.compile(0)
    with jax.set_mesh(program.mesh):
        start = program.initialise()
    ours = _updates(lambda state: compiled(state, jax.device_put(rows[None], program.rows.sharding), key), start)
    theirs = _updates(lambda state: step(state, rows, key), (moved, ADAMW.init(moved)))
    yield "update", partial(next, ours), partial(next, theirs)

    model, given, times = make_model(config, vocabulary), np.zeros(len(rows), int), jnp.ones(len(rows))
    own, scorer = nnx.state(model), make_scorer(model)
    forward = jax.jit(lambda params: nnx.merge(graphdef, params)(rows, times))
    yield "bound", lambda: scorer(own, rows, given, key), lambda: forward(params)

    options = config.sample.model_copy(update={"num_samples": len(rows), "num_steps": STEPS})
    draw = make_draw(options, encoding, model, model.objective.schedule)
    yield "step", lambda: draw(own, key), lambda: [forward(params) for _ in range(STEPS)]


def in_turn(calls: Sequence[Call], rounds: int, clock: Callable[[], float] = time.process_time) -> list[list[float]]:
    """Do each in every round, in alternating order, and return its seconds; a first round is left out."""
    spent = [[0.0] * (rounds + 1) for _ in calls]
    for number in range(rounds + 1):
        for i in range(len(calls))[:: 1 if number % 2 else -1]:
            began = clock()
            jax.block_until_ready(calls[i]())
            spent[i][number] = clock() - began
    return [one[1:] for one in spent]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return how many times as fast ours is, the median over rounds, and the standard error of that.

    A few disturbed rounds change neither: the spread is told by the median distance from the middle.

    >>> compare([2, 2, 2, 2], [2, 3, 3.2, 4])
    '1.55 ± 0.2'
    """
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    error = 1.86 * median(abs(ratio - median(ratios)) for ratio in ratios) / len(ratios) ** 0.5
    return f"{median(ratios):.3g} ± {error:.1g}"


def table(page: Path = PAGE) -> list[dict[str, str]]:
    """Return the rows of the table in a page, by the names of its columns; the first is the oldest."""
    lines = (HEAD + page.read_text().partition(HEAD)[2].partition("\n\n")[0]).splitlines()
    names, _, *rows = (line.strip("| ").split(" | ") for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def append(row: dict[str, str], page: Path = PAGE) -> None:
    """Put a row below the last one of the table in a page, whose columns are in the same order."""
    before, head, after = page.read_text().partition(HEAD)
    rows, gap, after = after.partition("\n\n")
    page.write_text(f"{before}{head}{rows.rstrip()}\n| {' | '.join(row.values())} |{gap or chr(10)}{after}")


def fallen(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return what became slower, by `LEAST`, and by three errors of the difference."""
    found = []
    for name in [name for name in now if "±" in now[name] and name in before]:
        (old, old_error), (new, error) = (map(float, cells[name].split(" ± ")) for cells in (before, now))
        if old - new > max(LEAST * old, 3 * (old_error**2 + error**2) ** 0.5):
            found.append(f"{name} fell from {before[name]} to {now[name]}")
    return found


def processor() -> str:
    """Return the instructions that decide how fast products are, and the number of cores."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else ()
    return (
        f"{next((kind for flag, kind in KINDS.items() if flag in flags), platform.machine())}, {os.cpu_count()} cores"
    )


def guard(keep: bool = False, rounds: int = 24) -> list[str]:
    """Measure all pairs, compare them with the last row of the same kind of processor, and return what fell.

    Args:
        keep: Append a row to the table.
        rounds: In which both of a pair are done, beside the first.
    """
    jax.config.update("jax_platforms", "cpu")  # a processor's seconds tell nothing of a device
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty=+"], cwd=PAGE.parent, text=True).strip()
    row = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "processor": processor()}
    former = [one for one in table() if one["processor"] == row["processor"]]
    for size, config in SIZES.items():
        for name, ours, theirs in pairs(config):
            row[f"{name}, {size}"] = compare(*in_turn((ours, theirs), rounds))
            print(f"{name}, {size}: {row[f'{name}, {size}']} times as fast as the plain one", flush=True)
    found = fallen(former[-1], row) if former else []
    if keep:
        append(row)
    unchanged = f"none fell since {former[-1]['commit']}" if former else f"no former row for {row['processor']}"
    print("\n".join(found) or unchanged)
    return found


if __name__ == "__main__":
    sys.exit(bool(tyro.cli(guard, use_underscores=True)))
