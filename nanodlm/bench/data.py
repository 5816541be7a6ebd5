"""Speed and memory of preparing data, on a corpus made up for it: each stage in a process of its own.

    nanodlm bench data owt                        # ten million tokens in rows of 1,024 ids, and as many as texts
    nanodlm bench data owt --tokens 100000000

Speeds are in tokens per second of CPU time, of all threads. In its process each stage prepares a small corpus before,
so that loading code is not measured.
"""

import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanodlm.config import Config, DataConfig
from nanodlm.data.sources import source_files
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.stages.run import run_stage
from nanodlm.store import Json, Store

ROWS, ROW = 250, 1024  # rows or texts that are written together, and tokens in each: a text has about as many
STAGES = ("download", "tokenizer", "split", "shard")
WHOLE = ("download", "split", "shard")  # a tokenizer is trained on a sample, however large the corpus is
KINDS = {"ids": pa.list_(pa.uint16()), "text": pa.string()}


def data(config: Config, *, tokens: int = 10_000_000, emit: Emit = silent) -> dict[str, dict[str, Json]]:
    """Prepare about so many tokens as `ids` and as `text`, with the settings of a configuration but for its source.

    Returns by kind, and by stage or `end to end`: `tokens_per_second_per_core`, and of stages `seconds` by the clock
    and `peak_bytes`, the process's largest memory.
    """
    if tokens <= ROWS * ROW:
        raise UsageError(f"too little is measured in {tokens} tokens: raise --tokens to a million or more")
    return {kind: _measure(config, kind, -(-tokens // (ROWS * ROW)), emit) for kind in KINDS}


def _measure(config: Config, kind: str, batches: int, emit: Emit) -> dict[str, Json]:
    spent, found, made = {}, {}, {}
    apart = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as folder, apart:
        # Apart as well, for the largest memory of a process is at first that of the one that starts it.
        small, large = (apart.submit(_corpus, config, kind, size, folder).result() for size in (1, batches))
        for done, stage in enumerate(STAGES, 1):
            made, spent[stage], found[stage] = apart.submit(_run, stage, small, large, folder).result()
            emit("progress", done=done, total=len(STAGES), unit=f"stages, {kind}")
    tokens = made["train_tokens"] + made["val_tokens"] + made["dropped_tokens"]
    spent["end to end"] = sum(spent[stage] for stage in WHOLE)
    return {name: {"tokens_per_second_per_core": tokens / cpu, **found.get(name, {})} for name, cpu in spent.items()}


def _corpus(config: Config, kind: str, batches: int, folder: str) -> Config:
    """Write a file of random ids, or of paragraphs of the built-in corpus in any order; return what prepares it."""
    tokenizer = config.data.tokenizer if kind == "text" or config.data.tokenizer == "bytes" else "gpt2"
    speeches = fsspec.filesystem("file").cat(source_files(DataConfig())).values()
    paragraphs = np.array(b"\n\n".join(speeches).decode().split("\n\n"), object)
    rng, path = np.random.default_rng(0), f"{folder}/{batches}.parquet"
    with pq.ParquetWriter(path, pa.schema([(kind, KINDS[kind])])) as writer:
        for _ in range(batches):
            if kind == "ids":
                values = list(rng.integers(0, 256 if tokenizer == "bytes" else 50_257, (ROWS, ROW), np.uint16))
            else:
                values = ["\n\n".join(chosen) for chosen in rng.choice(paragraphs, (ROWS, 10))]
            writer.write_table(pa.table({kind: pa.array(values, KINDS[kind])}))
    source = {"source": (path,), "revision": "", "column": kind, "pretokenized": kind == "ids"}
    return config.replace(data={**source, "tokenizer": tokenizer, "val_tokens": None})


def _run(stage: str, small: Config, large: Config, folder: str) -> tuple[Json, float, Json]:
    """Run a stage on both corpora; return of the large one its metrics, its CPU time, and what else was measured."""
    os.environ["NANODLM_CACHE"] = f"{folder}/cache"  # which remembers sources
    store = Store(f"{folder}/store")
    run_stage(stage, small, store)
    began, cpu_began = time.perf_counter(), time.process_time()
    artifact, _ = run_stage(stage, large, store)
    cpu, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return artifact.metrics, cpu, {"seconds": seconds, "peak_bytes": peak}
