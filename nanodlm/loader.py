"""Batches of training rows: step k's rows are a pure function of the seed and k, on any number of hosts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grain.python as grain
import numpy as np
from jaxtyping import Int


def train_batches(
    folder: Path,
    *,
    dtype: str,
    rows_per_step: int,
    seed: int,
    first_step: int = 0,
    shift: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Int[np.ndarray, "R L"]]:
    """Endless batches of whole rows, reshuffled every epoch, from step `first_step` on.

    Args:
        folder: Where the `train-*.arrayrecord` files lie.
        dtype: Their token type.
        rows_per_step: Rows of one update over all processes (micro-batches included).
        seed: Seed of the order.
        first_step: Updates already done.
        shift: Rows that those took beyond `rows_per_step` each, when they were of another size.
        process: Which process this is; it gets every `processes`-th row of each step.
        processes: How many there are; must divide `rows_per_step`.

    Yields:
        int32 rows, (rows_per_step / processes, L).
    """
    source = grain.ArrayRecordDataSource([str(p) for p in sorted(folder.glob("train-*.arrayrecord"))])
    rows = grain.MapDataset.source(cast(Any, source)).seed(seed).shuffle().repeat()
    batches = (
        rows[first_step * rows_per_step + shift :][process::processes]
        .map(lambda record: np.frombuffer(record, dtype).astype(np.int32))
        .batch(rows_per_step // processes, drop_remainder=True)  # endless; rounding up would overflow at 1
    )
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)))
