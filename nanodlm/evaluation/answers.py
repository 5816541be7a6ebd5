"""Answers given their prompts: the conditional likelihood by which a model chooses among texts.

A row holds the end of a prompt and the answer. What follows in the row is masked and stays so: a network of a stream's
rows says how likely the text goes on so, whatever comes then. One of padded rows, or one that never saw a mask, reads
nothing there, so that its bound is given how long the answer is. From left to right it makes no difference.
"""

from contextlib import suppress
from typing import Any

import numpy as np
import orjson
import tiktoken
from jaxtyping import Int

from nanodlm.data.rows import evenly_spaced
from nanodlm.data.tokenizer import encode
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.evaluation.evaluate import Text

Pair = tuple[str, str]  # a prompt and its answer, of which the text is made as they are


def read_pairs(file: str, prompt: str, answer: str, most: int | None = None) -> list[Pair]:
    """Return the prompts and answers in two fields of each line of a .jsonl file, or `most` of them, evenly spaced."""
    if not file.endswith(".jsonl"):
        raise UsageError(f"a prompt and its answer are fields of a row: name a .jsonl file, not {file}")
    pairs = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            found: Any = None
            with suppress(ValueError, LookupError, TypeError):
                row = orjson.loads(line)
                found = row[prompt], row[answer]
            if not (found and all(isinstance(text, str) for text in found) and found[1]):
                what = f"{file}:{number} holds no texts {prompt!r} and {answer!r}"
                raise NanodlmError(f"{what}: set --given and --column to names of its fields")
            pairs.append(found)
    return [pairs[i] for i in evenly_spaced(len(pairs), most)]


def ids(encoding: tiktoken.Encoding, text: str) -> Int[np.ndarray, "T"]:
    """Return the token ids of a text, without a mark."""
    return np.concatenate(encode(encoding, text), dtype=np.int32)


def text_of(pairs: list[Pair], encoding: tiktoken.Encoding, length: int) -> Text:
    """Return rows whose scored tokens are the answers, each a document; those of a prompt that fit are given.

    White space at the end of a prompt is taken for the beginning of the answer, for tokens of words begin with it. An
    answer longer than a row is cut into rows, the last of which has what is before it for context.

    >>> from nanodlm.data.tokenizer import plain_bytes
    >>> text = text_of([("I: ", "yes")], plain_bytes(), 8)
    >>> text.rows[0].tolist(), text.given.tolist(), bytes(text.scored[0].tolist())
    ([73, 58, 32, 121, 101, 115, 257, 257], [2], b' yes')
    """
    rows, given, scored, documents = [], [], [], []
    mask = Vocabulary.of(encoding).mask_id
    for number, (prompt, answer) in enumerate(pairs):
        before, asked = prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer
        begin, tokens = len(ids(encoding, before)), np.concatenate([ids(encoding, part) for part in (before, asked)])
        for first in range(begin, len(tokens), length):
            last = min(first + length, len(tokens))
            start = max(0, last - length)
            rows.append(np.pad(tokens[start:last], (0, length - (last - start)), constant_values=mask))
            given.append(first - start)
            scored.append(tokens[first:last])
            documents.append([number, number])
    return Text(rows, np.array(given), scored, np.array(documents), context="answers given their prompts")
