"""Cleaning: documents that are mended, or left out for what they are or because another one has their text."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tiktoken import Encoding

from nanodlm.config import Config, DataConfig
from nanodlm.data import sets
from nanodlm.data.documents import Documents
from nanodlm.data.shingles import Seen, apart, contains, runs, signatures
from nanodlm.data.tokenizer import tokenise_all
from nanodlm.errors import UsageError

Stream = Iterator[tuple[int, pa.Array]]  # documents, and the number of the source that they are from
CONTAMINATED = ("contaminated_documents", "contaminated_bytes")
LOOKED_AT = 2000  # bytes that tell a document's language


def check(data: DataConfig) -> None:
    """Refuse cleaning that needs a package which is not installed, and languages that cannot be told."""
    for setting, package in (("repair", "ftfy"), ("languages", "eldc")):
        if getattr(data, setting) and find_spec(package) is None:
            raise UsageError(f"--data.{setting} needs {package}: pip install -c constraints.txt -e '.[clean]'")
    if data.languages:
        from eldc import LANGUAGES

        if unknown := {*data.languages} - {*LANGUAGES}:
            raise UsageError(f"--data.languages has {min(unknown)!r}, which is none of {', '.join(LANGUAGES)}")


def cleaned(data: DataConfig, stream: Stream, folder: Path, counts: dict[str, int]) -> Stream:
    """Yield the documents that the settings want, in order, and count in `counts` what becomes of the others."""
    tests = _tests(data)
    counts |= dict.fromkeys(["repaired"] * data.repair + [*tests], 0)

    def one_by_one() -> Stream:
        for source, array in stream:
            array = _repaired(array, counts) if data.repair else array
            for why, test in tests.items():
                array = _filtered(array, test(array), why, counts)
            if len(array):
                yield source, array

    if data.duplicates is None or data.duplicates == 1:
        yield from one_by_one()
        return
    # Which are near duplicates is known when all have been read: until then they wait in a file without a name.
    sources, found = [], bytearray()
    with tempfile.TemporaryFile(dir=folder) as file:
        column = pa.list_(pa.uint16()) if data.pretokenized else pa.large_string()
        with pa.ipc.new_stream(file, pa.schema({"documents": column})) as writer:
            for source, array in one_by_one():
                found += signatures(Documents.of(array)).tobytes()
                sources.append(source)
                writer.write_batch(pa.record_batch([array], ["documents"]))
        keep = apart(np.frombuffer(found, np.uint8).reshape(-1, 128), data.duplicates)
        file.seek(0)
        for source, batch in zip(sources, pa.ipc.open_stream(file), strict=True):
            yield source, _filtered(batch.column(0), keep[: len(batch)], "near duplicates", counts)
            keep = keep[len(batch) :]


def _filtered(array: pa.Array, keep: np.ndarray, why: str, counts: dict[str, int]) -> pa.Array:
    counts[why] = counts.get(why, 0) + int((~keep).sum())
    return array if keep.all() else array.filter(pa.array(keep))


def _tests(data: DataConfig) -> dict[str, Callable[[pa.Array], np.ndarray]]:
    """Return what must be true of documents, by the reason for which the others are left out."""
    tests: dict[str, Callable[[pa.Array], np.ndarray]] = {}
    lengths = "list_value_length" if data.pretokenized else "utf8_length"
    if least := data.min_length:
        tests["too short"] = lambda array: pc.call_function(lengths, [array]).to_numpy() >= least
    if most := data.max_length:
        tests["too long"] = lambda array: pc.call_function(lengths, [array]).to_numpy() <= most
    if data.languages:
        tests["in other languages"] = lambda array: np.isin(_languages(Documents.of(array)), data.languages)
    if data.duplicates:
        seen = Seen()
        tests["exact duplicates"] = lambda array: seen.first(_numbers(Documents.of(array).hashed())[:, 0])
    return tests


def _numbers(keys: list[bytes]) -> np.ndarray:
    """Return the two numbers of each key, which are uniform and independent, (N, 2), uint64."""
    return np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)


def _languages(texts: Documents) -> np.ndarray:
    import eldc

    eldc.init()
    beginnings = (str(text[:LOOKED_AT], "utf-8", "ignore") for text in texts)
    return np.array([eldc.detect(beginning.replace("\0", " ")) for beginning in beginnings], str)


def _repaired(array: pa.Array, counts: dict[str, int]) -> pa.Array:
    """Undo what decoding by a wrong table did to texts ("schÃ¶n"), and change nothing else."""
    from ftfy import TextFixerConfig, fix_text

    config = TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
        uncurl_quotes=False, fix_line_breaks=False, remove_control_chars=False, normalization=None,
    )  # fmt: skip
    texts = array.to_pylist()
    fixed = [text if text.isascii() else fix_text(text, config) for text in texts]
    counts["repaired"] += sum(map(str.__ne__, texts, fixed))
    return pa.array(fixed, array.type)


def scored_runs(config: Config, encoding: Encoding, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the runs of words, or ids, in what is held out and in each set of `eval.sets`, as sorted hashes."""
    data, size = config.data, config.data.decontaminate
    if not size:
        return {}
    values = tokens if data.pretokenized else np.frombuffer(encoding.decode_bytes(tokens.tolist()), np.uint8)
    found = {"validation": [Documents(values, np.array([0, len(values)]))]}
    for word in config.eval.sets:
        texts = sets.texts(word, data)
        found.setdefault(sets.name_of(word), []).extend(tokenise_all(encoding, texts) if data.pretokenized else texts)
    return {name: np.unique(np.concatenate([runs(some, size)[0] for some in of])) for name, of in found.items()}


class Chosen:
    """Which documents of a part, of those that are not held out, are trained on, and how many those are."""

    def __init__(self, data: DataConfig, scored: dict[str, np.ndarray], weight: float):
        """Take each `weight` times, in so many turns, but none that shares a run of words with what is `scored`."""
        self.turns = math.ceil(weight)
        self.documents = 0
        self.has_last = True  # whether the last document so far is trained on
        self.counts = dict.fromkeys(CONTAMINATED, 0) if scored else {}
        self.alike = dict.fromkeys(scored, 0)  # documents that share words with each
        self._scored, self._weight, self._data = scored, weight, data
        self._perhaps = np.zeros(2**24, bool)  # by the first 24 bits of a hash, for few need be looked for
        for hashes in scored.values():
            self._perhaps[hashes >> np.uint64(40)] = True

    def of(self, batches: Iterable[Documents], turn: int) -> Iterator[Documents]:
        """Yield the documents of one turn: all, or in the last a share that their keys decide."""
        for batch in batches:
            keep = np.ones(len(batch), bool)
            if self._scored and len(batch):
                hashes, owner = runs(batch, self._data.decontaminate or 0)
                at = np.flatnonzero(self._perhaps[hashes >> np.uint64(40)])
                for name, those in self._scored.items():
                    alike = np.bincount(owner[at[contains(those, hashes[at])]], minlength=len(batch)) > 0
                    self.alike[name] += int(alike.sum()) if turn == 0 else 0
                    keep &= ~alike
                if turn == 0:
                    self.counts[CONTAMINATED[0]] += int((~keep).sum())
                    self.counts[CONTAMINATED[1]] += batch.only(~keep).flat.nbytes
            if (share := self._weight - turn) < 1:
                keep &= _numbers(batch.keys(self._data.split_seed))[:, 1] < share * 2**64
            self.documents += int(keep.sum())
            self.has_last = bool(keep[-1]) if len(keep) else self.has_last
            if keep.any():
                yield batch.only(keep)
