"""Speed and memory of preparing data, on a corpus made up for it: each stage in a process of its own.

    nanodlm bench data owt                        # ten million tokens in rows of 1,024 ids, and as many as texts
    nanodlm bench data owt --tokens 100000000

Speeds are in tokens per second of CPU time, of all threads, beside plain references on the same corpus. In its process
each stage prepares a small corpus before, so that loading code is not measured.
"""

import hashlib
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiktoken_ext.openai_public import r50k_pat_str

from nanodlm.bench.memory import peak_memory
from nanodlm.config import Config, DataConfig
from nanodlm.data import rows
from nanodlm.data.sources import PLAIN, SETTLED_SECONDS, format_of, source_files
from nanodlm.data.tokenizer import load, make_encoding
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.stages import table
from nanodlm.stages.run import run_stage
from nanodlm.store import Json, Store

ROWS, ROW = 250, 1024  # rows or texts that are written and read together, and tokens in each: a text has about as many
STAGES = ("download", "tokenizer", "split", "shard")
WHOLE = ("download", "split", "shard")  # a tokenizer is trained on a sample, however large the corpus is
KINDS = {"ids": pa.list_(pa.uint16()), "text": pa.string()}
REFERENCES = {  # what each is compared with
    "ids": {"download": "parquet read", "split": "blake2b", "shard": "ArrayRecord write"},
    "text": {"download": "parquet read", "end to end": "encode_ordinary_batch"},
}


def data(config: Config, *, tokens: int = 10_000_000, emit: Emit = silent) -> dict[str, dict[str, Json]]:
    """Prepare about so many tokens as `ids` and as `text`, with the settings of a configuration but for its source.

    Returns by kind, and by stage, `end to end` or name of a reference: `tokens_per_second_per_core`, `of_reference`
    where `REFERENCES` names one, and of stages `seconds` by the clock and `peak_bytes`, the process's largest memory.
    """
    if tokens <= ROWS * ROW:
        raise UsageError(f"too little is measured in {tokens} tokens: raise --tokens to a million or more")
    return {kind: _measure(config, kind, -(-tokens // (ROWS * ROW)), emit) for kind in KINDS}


def _measure(config: Config, kind: str, batches: int, emit: Emit) -> dict[str, Json]:
    found: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as folder:
        small, large = _alone(_make_corpora, config, kind, (1, batches), Path(folder))
        metrics, spent = {}, {}
        time.sleep(SETTLED_SECONDS)  # a file that has just changed would be hashed three times, and not remembered
        for done, stage in enumerate(STAGES, 1):
            metrics, spent[stage], found[stage] = _alone(_run, stage, small, large, Path(folder))
            emit("progress", done=done, total=len(STAGES), unit=f"stages, {kind}")
        spent["end to end"] = sum(spent[stage] for stage in WHOLE)
        spent |= _alone(_references, kind, large, Path(folder))
    tokens = metrics["train_tokens"] + metrics["val_tokens"] + metrics["dropped_tokens"]
    speeds = {name: tokens / seconds for name, seconds in spent.items()}
    for name, speed in speeds.items():
        found[name] = {"tokens_per_second_per_core": speed, **found.get(name, {})}
        if reference := REFERENCES[kind].get(name):
            found[name] |= {"reference": reference, "of_reference": speed / speeds[reference]}
    return found


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _make_corpora(config: Config, kind: str, sizes: tuple[int, ...], folder: Path) -> list[Config]:
    """Write files of random ids, or of paragraphs of the built-in corpus in any order; return what prepares each."""
    tokenizer = config.data.tokenizer if kind == "text" or config.data.tokenizer == "bytes" else "gpt2"
    data = {"revision": "", "column": kind, "pretokenized": kind == "ids", "tokenizer": tokenizer, "val_tokens": None}
    data |= {"languages": (), "repair": False} if kind == "ids" else {}
    speeches = fsspec.filesystem("file").cat(source_files(DataConfig())).values()
    paragraphs = np.array(b"\n\n".join(speeches).decode().split("\n\n"), object)
    rng, configs = np.random.default_rng(0), []
    for batches in sizes:
        path = folder / f"{batches}.parquet"
        with pq.ParquetWriter(path, pa.schema([(kind, KINDS[kind])])) as writer:
            for _ in range(batches):
                if kind == "ids":
                    values = list(rng.integers(0, 256 if tokenizer == "bytes" else 50_257, (ROWS, ROW), np.uint16))
                else:
                    values = ["\n\n".join(chosen) for chosen in rng.choice(paragraphs, (ROWS, 10))]
                writer.write_table(pa.table({kind: pa.array(values, KINDS[kind])}))
        configs.append(config.replace(data={**data, "source": (str(path),)}))
    return configs


def _run(stage: str, small: Config, large: Config, folder: Path) -> tuple[Json, float, Json]:
    """Run a stage on both corpora; return of the large one its metrics, its CPU time, and what else was measured."""
    os.environ["NANODLM_CACHE"] = str(folder / "cache")  # which remembers sources
    store = Store(str(folder / "store"))
    run_stage(stage, small, store)
    began, cpu_began = time.perf_counter(), time.process_time()
    artifact, _ = run_stage(stage, large, store)
    cpu, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    return artifact.metrics, cpu, {"seconds": seconds, "peak_bytes": peak_memory()}


def _references(kind: str, config: Config, folder: Path) -> dict[str, float]:
    """Return the CPU time that libraries alone take for a corpus."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        began, result = time.process_time(), function(*arguments)
        spent[name] += time.process_time() - began
        return result

    own, threads = load(run_stage("tokenizer", config, Store(str(folder / "store")))[0].local()), os.cpu_count() or 1
    encodings = {"encode_ordinary_batch": make_encoding(own.name, own._mergeable_ranks, r50k_pat_str)}
    encodings["the same, own pattern"] = own  # the first has that of tiktoken itself
    batches = pq.ParquetFile(config.data.source[0]).iter_batches(ROWS)
    while batch := timed("parquet read", next, batches, None):
        if kind == "ids":
            ids = batch.column(0).flatten().to_numpy().reshape(-1, ROW)
            timed("blake2b", lambda ids: [hashlib.blake2b(row, digest_size=16).digest() for row in ids], ids)
            timed("ArrayRecord write", rows.write, folder / "rows", ids)
        else:
            texts = batch.column(0).to_pylist()
            for name, encoding in encodings.items():
                timed(name, lambda one, texts: one.encode_ordinary_batch(texts, num_threads=threads), encoding, texts)
    return spent


def rates(config: Config) -> tuple[dict[str, float], int]:
    """Return the bytes of text, or of ids, that each stage prepares in a second here, and how many it was tried on."""
    kind, sizes, found = "ids" if config.data.pretokenized else "text", [], {}
    spent: dict[str, list[float]] = defaultdict(list)
    tokenizer = "bytes" if kind == "ids" else config.data.tokenizer.replace("gpt2", "bpe")  # which loads sooner
    with tempfile.TemporaryDirectory() as folder:
        batches = (1, 2, 16 if kind == "ids" else 4 + min(8, os.cpu_count() or 1))  # the first loads the code
        for one in _make_corpora(Config().replace(data={"tokenizer": tokenizer}), kind, batches, Path(folder)):
            one = one.replace(data={"val_tokens": 10_000})
            for stage in [name for name in STAGES if (name, tokenizer) != ("tokenizer", "bpe") or name not in found]:
                inputs, began = {name: found[name] for name in table.STAGES[stage].inputs(one)}, time.perf_counter()
                found[stage], _ = run_stage(stage, one, Store(f"{folder}/store"), inputs=inputs)
                spent[stage].append(time.perf_counter() - began)
            sizes.append(found["download"].metrics["bytes"])
    # What a stage takes whatever the size is left out: at most half, for clocks are noisy.
    speeds = {name: (sizes[2] - sizes[1]) / max(spent[name][2] - spent[name][1], spent[name][2] / 2) for name in WHOLE}
    return speeds, sizes[2]


def size_of(data: DataConfig) -> int | None:
    """Return the bytes of a source's texts, or of its ids, about, if its files are here, and plain or parquet."""
    size = 0
    for path in ["hf://"] if data.revision else [url.removeprefix("file://") for url in source_files(data)]:
        if os.path.exists(path) and format_of(path) == (".parquet", ""):
            found = pq.read_metadata(path)
            groups = map(found.row_group, range(found.num_row_groups))
            chunks = [group.column(i) for group in groups for i in range(found.num_columns)]
            of_column = [chunk for chunk in chunks if chunk.path_in_schema.split(".list.")[0] == data.column]
            size += sum(2 * c.num_values if data.pretokenized else c.total_uncompressed_size for c in of_column)
        elif os.path.exists(path) and format_of(path) in PLAIN and not data.pretokenized:
            size += os.path.getsize(path)
        else:
            return None
    return min(size, (data.limit_tokens or size) * (2 if data.pretokenized else 4))
