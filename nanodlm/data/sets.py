r"""Texts to score beside the held-out ones: files of any kind, or sets by recipe, read and detokenised as published.

The recipes are those of SEDD (arXiv:2310.16834) and MDLM (arXiv:2406.07524), whose marks of words' ends and of names
that were cut out are undone alike; `\n` stands for a line's end. Texts follow each other with an end-of-text mark after
each, empty ones left out, and are cut into rows. There, rows have 1,024 of GPT-2's tokens, the first and last of which
are marks; here they have the network's own number, and no such marks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken

from nanodlm.config import DataConfig
from nanodlm.data.documents import Documents
from nanodlm.data.readers import Bad, check_share, read_documents
from nanodlm.data.sources import identity as identity_of_source
from nanodlm.data.sources import source_files
from nanodlm.data.tokenizer import tokenise_all
from nanodlm.errors import NanodlmError, SourceGone, UsageError

Changes = tuple[tuple[str, str], ...]  # regular expressions and what stands in their place, in this order


@dataclass(frozen=True)
class Recipe:
    """How a published set is read."""

    address: str
    licence: str
    changes: Changes = ()
    column: str = "text"
    published: str = ""  # what others reached


def _close_up(marks: str) -> Changes:
    return tuple((f" {re.escape(mark)} ", f"{mark} ") for mark in marks)


_WIKITEXT: Changes = (
    ("s '", "s'"), (" @([-,.])@ ", r"\1"), *_close_up(":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"), (r"\[\s*([^]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
_LM1B: Changes = (
    ("(https?) : / / ", r"\1://"), (r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "), (r" \?$", "?"), (" ! ", "! "), (" !$", "!"), *_close_up(",:;"), (" / ", "/"),
    ('" ([^"]+) "', r'"\1"'), ("' ([^']+) '", r"'\1'"), (r"\( ([^()]+) \)", r"(\1)"), (r"\[ ([^][]+) \]", r"[\1]"),
    (r"\$ ", "$"), ("£ ", "£"),
)  # fmt: skip
_PTB: Changes = (
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), (r"\\/", "/"), (" N(?= )", " 1"),
    (r"\$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"),
)  # fmt: skip
_ROWS: Changes = ((r"(?<!\n)\Z", "\n"), *_WIKITEXT)  # rows of the published files end in a line feed, lines do not
_HUB = "https://huggingface.co/datasets/"
_GPT2 = "GPT-2 (117M), a word, with a sliding window: perplexity"

RECIPES = {
    "lambada": Recipe(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl", "CC BY 4.0",
        (("[“”]", '"'), (r"\A\s*", "\n"), (r"\s+\Z", "")),
    ),
    "wikitext2": Recipe(f"{_HUB}wikitext (wikitext-2-raw-v1)", "CC BY-SA", _ROWS, published=f"{_GPT2} 29.41"),
    "wikitext103": Recipe(f"{_HUB}wikitext (wikitext-103-raw-v1)", "CC BY-SA", _ROWS, published=f"{_GPT2} 37.50"),
    "ptb": Recipe(f"{_HUB}ptb_text_only", "LDC", _PTB, "sentence", f"{_GPT2} 65.85"),
    "lm1b": Recipe(f"{_HUB}lm1b", "not stated", _LM1B, published=f"{_GPT2} 75.20"),
    "ag_news": Recipe(f"{_HUB}ag_news", "not stated"),
    "arxiv": Recipe(f"{_HUB}scientific_papers (arxiv)", "not stated", _WIKITEXT + _LM1B, "article"),
    "pubmed": Recipe(f"{_HUB}scientific_papers (pubmed)", "not stated", _WIKITEXT + _LM1B, "article"),
}  # fmt: skip


def detokenised(text: str, changes: Changes) -> str:
    """Return a text as it was before it was cut into words.

    >>> detokenised("the boys ' two @-@ year tour ( 1990 ) , at last", RECIPES["arxiv"].changes)
    "the boys' two-year tour (1990), at last"
    """
    for pattern, put in changes:
        text = re.sub(pattern, put, text)
    return text


def name_of(word: str) -> str:
    """Return what a set is called: its recipe's name, or that of its file."""
    name = word.partition("=")[0]
    return name if name in RECIPES else word.rstrip("/").rpartition("/")[2]


def recipe_of(word: str, data: DataConfig) -> tuple[Recipe | None, DataConfig]:
    """Return the recipe that FILE or RECIPE=FILE names, if any, and the settings by which the file is read."""
    named = re.fullmatch(r"(\w+)=(.+)", word)
    if named and named[1] not in RECIPES:
        raise UsageError(f"there is no recipe {named[1]!r}: choose {', '.join(RECIPES)}, or give a file")
    recipe = RECIPES[named[1]] if named else None
    how = {"column": recipe.column, "sample_by": "line"} if recipe else data.model_dump(include={"column", "sample_by"})
    return recipe, DataConfig.model_validate({"source": (named[2] if named else word,), "max_bad": data.max_bad, **how})


def identity(word: str, data: DataConfig) -> dict[str, Any]:
    """Return what determines a set: its name, and the digests of its files."""
    recipe, reading = recipe_of(word, data)
    try:
        return {"name": name_of(word), "recipe": recipe is not None, **identity_of_source(reading)}
    except SourceGone as gone:  # which would be looked for among the downloads
        remedy = f"it lies at {recipe.address} (licence: {recipe.licence})" if recipe else "check its name"
        raise NanodlmError(f"there is no {word} to score: {remedy}") from gone


def find(word: str, data: DataConfig) -> None:
    """Say what is wrong with a set before anything is built: it is not there, cannot be read, or has no text."""
    identity(word, data)
    next(texts(word, data))


def texts(word: str, data: DataConfig, bad: Bad | None = None) -> Iterator[Documents]:
    """Yield a set's documents, of which there is one or more, a few megabytes at a time; `bad` gets the other rows."""
    recipe, reading = recipe_of(word, data)
    documents, bad = None, bad or Bad()
    for array in read_documents(reading, source_files(reading), bad):
        documents = Documents.of(array)
        if recipe:
            changed = [detokenised(str(text, "utf-8"), recipe.changes).encode() for text in documents]
            documents = Documents(np.frombuffer(b"".join(changed), np.uint8), np.cumsum([0, *map(len, changed)]))
        yield documents
    check_share(reading, bad)
    if documents is None:
        raise NanodlmError(f"{word} holds no text to score: check the file, or leave it out")


def tokens(word: str, data: DataConfig, encoding: tiktoken.Encoding) -> tuple[np.ndarray, Bad]:
    """Return the ids of a set's texts with an end-of-text mark after each, (T,), and the rows that are none."""
    bad = Bad()
    found = [some.flat for some in tokenise_all(encoding, texts(word, data, bad))]
    return np.concatenate(found).astype(np.int32), bad
