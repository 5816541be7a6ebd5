"""An encoding in Hugging Face's format: the same ids of the same texts."""

import json
import random
from functools import cache

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nanodlm.data import tokenizer
from nanodlm.data.huggingface import tokenizer_json
from tests.data.test_tokenizer import AWKWARD, TEXTS, documents

KINDS = ("gpt2", "bpe", "bytes")
LETTERS = " \n\t\r\u00a0\u3000'sa1é,.Ⅷ²日"


@cache
def both(name: str) -> tuple[tiktoken.Encoding, Tokenizer]:
    make = {"bpe": lambda: tokenizer.train_bpe(TEXTS, 700), "gpt2": tokenizer.gpt2, "bytes": tokenizer.plain_bytes}
    make["chars"] = lambda: tokenizer.characters([documents(TEXTS)])
    ours = make[name]()
    return ours, Tokenizer.from_str(json.dumps(tokenizer_json(ours)))


def check(name: str, text: str) -> None:
    ours, theirs = both(name)
    ids = ours.encode_ordinary(text)
    theirs.encode_special_tokens = True  # what looks like a mark is ordinary text, as in training
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", KINDS)
def test_odd_texts_have_the_same_ids(name: str) -> None:
    random_ = random.Random(0)
    for text in (*AWKWARD, *TEXTS[:50], *(TEXTS[i][::-1] for i in range(50))):
        check(name, text)
    for _ in range(200):
        check(name, "".join(random_.choices(LETTERS, k=30)))
        check(name, "".join(random_.choices("aeinst", k=30)))  # whose merges overlap each other in many ways


@settings(derandomize=True, max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_has_the_same_ids(text: str) -> None:
    check("bpe", text)


def test_characters_have_the_same_ids_and_others_are_refused() -> None:
    for text in TEXTS[:20]:
        check("chars", text)
    with pytest.raises(Exception, match="UNK"):
        both("chars")[1].encode("日")


@pytest.mark.parametrize("name", (*KINDS, "chars"))
def test_the_end_of_text_and_the_mask_are_the_ids_that_networks_know(name: str) -> None:
    ours, theirs = both(name)
    theirs.encode_special_tokens = False
    assert theirs.encode("<|endoftext|><|mask|>").ids == [ours.eot_token, ours.n_vocab]
    assert theirs.get_vocab_size() == ours.n_vocab + 1
