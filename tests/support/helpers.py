"""What several test modules need: prose to prepare, and stores to prepare it in."""

import random
from pathlib import Path

import pyarrow as pa

from nanodlm.config import Config
from nanodlm.data.parts import SCHEMAS, Writer
from nanodlm.store import Artifact, Attempt, Item, Store, new_attempt
from nanodlm.upkeep.copy import copy

SYLLABLES = ("ba", "con", "de", "fi", "gra", "ho", "in", "ju", "li", "mo", "na", "or", "per", "qui", "re", "sta", "tu")


def prose(documents: int, seed: int = 0, words: int = 40) -> list[str]:
    """Distinct texts of words whose frequencies fall off as in a language, so that BPE has something to merge."""
    random_ = random.Random(seed)
    lexicon = sorted({"".join(random_.choices(SYLLABLES, k=random_.randint(1, 4))) for _ in range(300)})
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    texts = []
    for i in range(documents):
        drawn = random_.choices(lexicon, weights, k=random_.randint(words // 2, words))
        texts.append(f"{' '.join(drawn).capitalize()}, {i}.\n")
    return texts


def tiny_config(source: Path | str | list[str] = "unused", *, model: dict | None = None, **data: object) -> Config:
    """A configuration whose data stages take a fraction of a second."""
    fields = {
        "source": source if isinstance(source, list) else str(source),
        "tokenizer": "bytes",
        "val_tokens": 1000,
        "part_mb": 0.01,
        **data,
    }
    return Config().replace(data=fields, model={"seq_len": 32, **(model or {})})


def fill(attempt: Attempt, files: dict[str, bytes]) -> None:
    """Write files into an attempt's folder."""
    for name, content in files.items():
        (attempt.path / name).parent.mkdir(parents=True, exist_ok=True)
        (attempt.path / name).write_bytes(content)


def committed(store: Store, files: dict[str, bytes], stage: str = "shard", fingerprint: str = "f0") -> Artifact:
    """An artifact with these files."""
    with new_attempt(store, stage, fingerprint) as attempt:
        fill(attempt, files)
        return attempt.commit(identity=identity(stage), metrics={})


def copied(source: Store, target: Store, artifacts: list[Item] | None = None) -> dict[str, bool]:
    """Copy these artifacts, or all, and say of each stage's whether it had to be sent."""
    wanted = list(source) if artifacts is None else artifacts
    return {artifact.stage: sent for artifact, sent in copy(source, target, wanted, lambda *_, **__: None)}


def flip(path: Path) -> bytes:
    """Change the last byte of a file; what it was."""
    before = path.read_bytes()
    path.unlink()  # it may be another name of the same file
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def identity(stage: str = "shard") -> dict[str, object]:
    """The part of a manifest that a stage's identity gives."""
    return {"schema": 1, "stage": stage, "version": 1, "parameters": {}, "inputs": {}}


def downloaded(store: Store, parts: list[list[str]] | list[list[list[int]]]) -> Artifact:
    """A download artifact with these documents, one list a part, as the download stage would have left it."""
    with new_attempt(store, "download", "d0") as attempt:
        sizes = []
        for i, documents in enumerate(parts):
            column = "text" if isinstance(documents[0], str) else "tokens"
            writer = Writer(attempt.path / f"part-{i:05d}.arrow", column)
            writer.write(pa.array(documents, SCHEMAS[column].field(0).type))
            writer.close()
            sizes.append(writer.size)
        lengths = {len(document) for documents in parts for document in documents}
        packed = {"row_size": lengths.pop()} if column == "tokens" and len(lengths) == 1 else {}
        metrics = {"bytes": sum(sizes), "documents": sum(map(len, parts)), "part_sizes": sizes, **packed}
        return attempt.commit(identity=identity("download"), metrics=metrics)
