"""An encoding as Hugging Face's `tokenizers` and `transformers` load it: the same ids, from files of their formats."""

import tiktoken

from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.store import Json

MASK = "<|mask|>"  # the name, in these files, of the first id after the encoding's


def tokenizer_json(encoding: tiktoken.Encoding) -> Json:
    """Return the `tokenizer.json` of an encoding, the mask included: byte-level BPE, or one token a character.

    tiktoken merges the two neighbours whose bytes together are the token of the lowest rank, however they came about;
    so each way to cut a token in two tokens is a merge, in the order of its rank. What looks like a special token in
    a text becomes one, unless the loaded tokenizer's `encode_special_tokens` is set.
    """
    ranks = encoding._mergeable_ranks
    by_rank = sorted(ranks, key=ranks.__getitem__)
    if encoding.name == "chars":
        vocabulary = {token.decode(): ranks[token] for token in by_rank}
        model: Json = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}  # what it does not have is an error
        before: Json = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        after: Json = {"type": "Fuse"}
    else:
        letters = byte_letters()
        spelt = {token: "".join(letters[byte] for byte in token) for token in by_rank}
        halves = ((token[:i], token[i:]) for token in by_rank for i in range(1, len(token)))
        merges = [[spelt[left], spelt[right]] for left, right in halves if left in ranks and right in ranks]
        # A piece that is a token is not merged at all, here as there.
        model = {"type": "BPE", "vocab": {spelt[token]: ranks[token] for token in by_rank}, "merges": merges}
        model |= {"ignore_merges": True, "byte_fallback": False, "fuse_unk": False}
        before = after = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    marks = ((encoding.eot_token, END_OF_TEXT), (encoding.n_vocab, MASK))
    added = [{"id": number, "content": mark, **switches} for number, mark in marks]
    parts = {"model": model, "pre_tokenizer": before, "decoder": after, "normalizer": None, "post_processor": None}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def tokenizer_config(length: int) -> Json:
    """Return the `tokenizer_config.json` beside it, for `transformers`, for rows of so many tokens."""
    marks = {"eos_token": END_OF_TEXT, "mask_token": MASK}
    options = {"clean_up_tokenization_spaces": False, "model_max_length": length}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **marks, **options}


def byte_letters() -> dict[int, str]:
    """Return the printable letter that stands for each byte in these files. Source: GPT-2's `bytes_to_unicode`.

    >>> byte_letters()[ord("a")], byte_letters()[ord(" ")]
    ('a', 'Ġ')
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
