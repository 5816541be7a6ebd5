import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodlm.config import Config
from nanodlm.data import held_out as held_out_module
from nanodlm.data import rows as data_rows
from nanodlm.data import shard, split, tokenizer
from nanodlm.data.documents import Documents
from nanodlm.data.held_out import check_rows
from nanodlm.errors import NanodlmError
from nanodlm.stages import table
from nanodlm.stages.run import run_stage
from nanodlm.store import Artifact, Store, new_attempt
from tests.support.commands import speeches
from tests.support.helpers import downloaded, identity, prose, tiny_config


def document_key(content: str | list[int], seed: int) -> str:
    values = np.frombuffer(content.encode(), np.uint8) if isinstance(content, str) else np.array(content, np.uint16)
    documents = Documents(values, np.array([0, len(values)]))
    hashes = np.frombuffer(documents.hashed()[0], np.uint8).reshape(1, 16)
    return replace(documents, hashes=hashes).keys(seed)[0].hex()


BUILD = {"tokenizer": split.build_tokenizer, "split": split.build_split, "shard": shard.build_shards}
DOCUMENTS = [*prose(199), "<|endoftext|> is only text here.\n"]


def build(
    stage: str, config: Config, store: Store, inputs: dict[str, Artifact], emit: Any = lambda *_, **__: None
) -> Artifact:
    with new_attempt(store, stage, "f0") as attempt:
        metrics = BUILD[stage](config, inputs, attempt, emit)
        return attempt.commit(identity=identity(stage), metrics=metrics)


def prepare(
    folder: Path, parts: list[list[Any]], until: str = "shard", seq_len: int = 32, **data: Any
) -> dict[str, Artifact]:
    """Artifacts of the stages up to `until`, for a corpus of these parts."""
    config, store = tiny_config(model={"seq_len": seq_len}, **data), Store(str(folder))
    inputs = {"download": downloaded(store, parts)}
    for stage in BUILD:
        inputs[stage] = build(stage, config, store, inputs)
        if stage == until:
            break
    return inputs


def encoding_of(artifacts: dict[str, Artifact]) -> tiktoken.Encoding:
    return tokenizer.load(artifacts["tokenizer"].local())


def validation_of(artifacts: dict[str, Artifact]) -> list[int]:
    return np.load(artifacts["split"].local() / "validation.npy").tolist()


def cut_of(artifacts: dict[str, Artifact]) -> str:
    return json.loads((artifacts["split"].local() / "split.json").read_text())["cut"]


def training_rows(artifacts: dict[str, Artifact], dtype: str = "<u2") -> list[list[int]]:
    files = sorted(artifacts["shard"].local().glob("train-*.arrayrecord"))
    return [row.tolist() for file in files for row in data_rows.read(file, dtype)]


def held_out(documents: list[Any], val_tokens: int, tokens: Any, seed: int = 0) -> tuple[list[Any], list[int]]:
    """The rule itself, by sorting: documents of the front, and the stream of their tokens cut to the budget."""
    chosen, stream = [], []
    for document in sorted(documents, key=lambda d: document_key(d, seed)):
        if len(stream) >= val_tokens:
            break
        chosen.append(document)
        stream += tokens(document)
    return chosen, stream[:val_tokens]


def byte_tokens(text: str) -> list[int]:
    return [*text.encode(), 256]


def test_a_key_is_a_function_of_content_and_seed_only() -> None:
    contents: list[Any] = ["a", "b", "", "é", [1, 2], [2, 1], [1], [258]]
    keys = [document_key(c, seed) for c in contents for seed in (0, 1, 2**63 - 1)]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}
    assert document_key([1, 2], 5) == document_key(np.array([1, 2], np.uint16).tolist(), 5)
    # Golden: a change here would silently move documents between the sides of every existing data set.
    assert document_key("a", 0) == document_key(" A\n", 0) == "55ffe9b5954f289bb293114c97c645cd"
    assert document_key("a b", 0) == document_key("a\r\n  B ", 0) != document_key("a c", 0)
    assert document_key([1, 50256], 7) == "9ddcdebba063c01df96a8091c6445c16"


@pytest.mark.parametrize(
    ("val_tokens", "kind"), [(1, "bytes"), (999, "bytes"), (1000, "bytes"), (1000, "bpe"), (3000, "gpt2")]
)
def test_the_validation_split_is_the_front_of_the_order_cut_to_exactly_the_budget(
    tmp_path: Path, val_tokens: int, kind: str
) -> None:
    artifacts = prepare(tmp_path, [DOCUMENTS], "split", val_tokens=val_tokens, tokenizer=kind, vocab_size=300)
    encoding = encoding_of(artifacts)
    chosen, stream = held_out(DOCUMENTS, val_tokens, lambda text: [*encoding.encode_ordinary(text), encoding.eot_token])
    assert validation_of(artifacts) == stream
    assert len(stream) == val_tokens
    assert cut_of(artifacts) == document_key(chosen[-1], 0)
    metrics = artifacts["split"].metrics
    expected = {"val_tokens": val_tokens, "val_documents": len(chosen), "documents": len(DOCUMENTS)}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["val_bytes"] == len(encoding.decode_bytes([i for i in stream if i != encoding.eot_token]))


CORPORA = st.lists(st.integers(0, 40).map(lambda i: f"{i} " * (i % 7 + 1)), min_size=40, max_size=80)


@settings(derandomize=True, max_examples=15, deadline=None)
@given(documents=CORPORA, added=CORPORA, seed=st.integers(0, 2**63 - 1))
def test_added_documents_move_others_out_only_at_the_edge_and_none_in(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], added: list[str], seed: int
) -> None:
    val_tokens = 60
    before, after = (
        prepare(tmp_path_factory.mktemp("store"), [corpus], "split", val_tokens=val_tokens, split_seed=seed)
        for corpus in (documents, documents + added)
    )
    cut, new_cut = cut_of(before), cut_of(after)
    assert new_cut <= cut  # so nothing that was trained on is ever held out later
    old = [d for d in documents if document_key(d, seed) <= cut]
    pushed_out = [d for d in old if document_key(d, seed) > new_cut]
    # Old held-out documents leave from the edge inwards: all that left lie behind all that stayed.
    stayed = [document_key(d, seed) for d in old if d not in pushed_out]
    assert max(stayed, default="") <= min((document_key(d, seed) for d in pushed_out), default="g")
    assert validation_of(after) == held_out(documents + added, val_tokens, byte_tokens, seed)[1]


def test_equal_documents_all_lie_on_one_side(tmp_path: Path) -> None:
    unique = prose(60)
    copies = [text for text in unique for _ in range(3)]
    artifacts = prepare(tmp_path, [copies[:90], copies[90:]], val_tokens=1500)
    cut = cut_of(artifacts)
    trained = bytes(t for row in training_rows(artifacts) for t in row if t != 256)
    inside = [text for text in unique if document_key(text, 0) <= cut]
    outside = [text for text in unique if document_key(text, 0) > cut]
    assert 2 < len(inside) < 30
    assert all(text.encode() not in trained for text in inside)
    assert sum(trained.count(text.encode()) for text in outside) > 2.9 * len(outside)  # rows' rests apart
    assert artifacts["shard"].metrics["train_documents"] == 3 * len(outside)
    assert validation_of(artifacts) == held_out(copies, 1500, byte_tokens)[1]


def test_the_sides_are_disjoint_and_the_manifest_says_so(tmp_path: Path) -> None:
    artifacts = prepare(tmp_path, [DOCUMENTS[:70], DOCUMENTS[70:140], DOCUMENTS[140:]], seq_len=2)
    metrics = artifacts["shard"].metrics
    keys = sorted(document_key(text, 0) for text in DOCUMENTS)
    cut = keys.index(cut_of(artifacts))
    assert metrics["largest_validation_key"] == keys[cut]
    assert metrics["smallest_training_key"] == keys[cut + 1]
    assert metrics["train_documents"] + artifacts["split"].metrics["val_documents"] == len(DOCUMENTS)
    validation = bytes(t for t in validation_of(artifacts) if t != 256)
    trained = bytes(t for row in training_rows(artifacts) for t in row if t != 256)
    for text in DOCUMENTS:
        assert (text.encode()[:-1] in trained) == (document_key(text, 0) > keys[cut])
        assert not (text.encode() in validation and text.encode() in trained)


def test_the_order_of_the_documents_and_parts_does_not_matter_for_what_is_held_out(tmp_path: Path) -> None:
    orders = [[DOCUMENTS], [DOCUMENTS], [DOCUMENTS[::-1]], [DOCUMENTS[100:], DOCUMENTS[:100]]]
    for kind in ("bytes", "bpe"):
        options = {"until": "split", "tokenizer": kind, "vocab_size": 300}
        found = [prepare(tmp_path / f"{kind}{i}", parts, **options) for i, parts in enumerate(orders)]
        assert len({(artifacts["tokenizer"].digest, artifacts["split"].digest) for artifacts in found}) == 1


@pytest.mark.parametrize("val_tokens", [50, 1000, 2500])
def test_the_tokenizer_is_the_one_trained_on_the_documents_behind_its_zone(tmp_path: Path, val_tokens: int) -> None:
    artifacts = prepare(tmp_path, [DOCUMENTS], "split", val_tokens=val_tokens, tokenizer="bpe", vocab_size=400)
    zone_end, cut = artifacts["tokenizer"].metrics["zone"], cut_of(artifacts)
    assert cut <= zone_end
    outside = [text for text in DOCUMENTS if document_key(text, 0) > zone_end]
    assert 0 < len(outside) < len(DOCUMENTS)
    encoding = encoding_of(artifacts)
    assert encoding._mergeable_ranks == tokenizer.train_bpe(outside, 400)._mergeable_ranks
    zone = [text for text in DOCUMENTS if document_key(text, 0) <= zone_end]
    assert artifacts["tokenizer"].metrics["zone_tokens"] == sum(len(encoding.encode_ordinary(t)) + 1 for t in zone)
    assert artifacts["tokenizer"].metrics["zone_bytes"] == sum(len(t.encode()) for t in zone)


def test_the_zone_grows_until_it_holds_the_validation_tokens(tmp_path: Path) -> None:
    # Long repetitive words: more bytes a token than first guessed, so that the first zone gives too few tokens.
    documents = [f"{'extraordinarily ' * 30}{i}." for i in range(100)]
    messages: list[str] = []
    config, store = tiny_config(tokenizer="bpe", vocab_size=280, val_tokens=600), Store(str(tmp_path))
    inputs = {"download": downloaded(store, [documents])}
    inputs["tokenizer"] = build("tokenizer", config, store, inputs, lambda _, text: messages.append(text))
    assert len(messages) >= 2
    assert inputs["tokenizer"].metrics["zone_tokens"] >= 600
    inputs["split"] = build("split", config, store, inputs)
    assert len(validation_of(inputs)) == 600
    assert cut_of(inputs) <= inputs["tokenizer"].metrics["zone"]


@pytest.mark.parametrize(("seq_len", "kind"), [(2, "bytes"), (32, "bytes"), (61, "bytes"), (32, "bpe"), (32, "gpt2")])
def test_rows_are_the_training_documents_one_after_another_with_an_end_mark_after_each(
    tmp_path: Path, kind: str, seq_len: int
) -> None:
    parts = [DOCUMENTS[:90], DOCUMENTS[90:]]
    artifacts = prepare(tmp_path, parts, seq_len=seq_len, tokenizer=kind, vocab_size=300)
    encoding, cut = encoding_of(artifacts), cut_of(artifacts)
    expected, left = [], 0
    for part in parts:
        kept = [text for text in part if document_key(text, 0) > cut]
        stream = [t for text in kept for t in [*encoding.encode_ordinary(text), encoding.eot_token]]
        whole = len(stream) // seq_len * seq_len
        expected += [stream[i : i + seq_len] for i in range(0, whole, seq_len)]
        left += len(stream) - whole
    assert training_rows(artifacts) == expected
    metrics = artifacts["shard"].metrics
    assert (metrics["train_rows"], metrics["train_tokens"]) == (len(expected), len(expected) * seq_len)
    assert metrics["dropped_tokens"] == left
    assert metrics["train_documents"] == sum(document_key(text, 0) > cut for text in DOCUMENTS)
    assert (metrics["n_vocab"], metrics["seq_len"], metrics["dtype"]) == (encoding.n_vocab, seq_len, "uint16")
    names = [path.name for path in sorted(artifacts["shard"].local().glob("*.arrayrecord"))]
    assert names == ["train-00000.arrayrecord", "train-00001.arrayrecord", "validation.arrayrecord"]


@pytest.mark.parametrize(("val_tokens", "last"), [(1000, 8), (992, 32), (993, 1), (33, 1)])
def test_the_last_validation_row_holds_what_is_left(tmp_path: Path, val_tokens: int, last: int) -> None:
    artifacts = prepare(tmp_path, [DOCUMENTS], val_tokens=val_tokens)
    rows = data_rows.read(artifacts["shard"].local() / "validation.arrayrecord", "<u2")
    assert {len(row) for row in rows[:-1]} <= {32}
    assert len(rows[-1]) == last
    assert np.concatenate(rows).tolist() == validation_of(artifacts)
    assert artifacts["shard"].metrics["val_rows"] == len(rows) == -(-val_tokens // 32)
    assert artifacts["shard"].metrics["val_bytes"] == artifacts["split"].metrics["val_bytes"]


def test_a_part_without_training_documents_is_an_empty_shard(tmp_path: Path) -> None:
    ordered = sorted(DOCUMENTS, key=lambda text: document_key(text, 0))
    artifacts = prepare(tmp_path, [ordered[:2], ordered[2:]])
    first, second = sorted(artifacts["shard"].local().glob("train-*.arrayrecord"))
    assert data_rows.read(first, "<u2") == []
    assert len(data_rows.read(second, "<u2")) == artifacts["shard"].metrics["train_rows"] > 0


def token_rows(count: int = 60, length: int = 64) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 257, (count, length)).tolist()


def test_rows_of_ids_are_held_out_joined_and_cut_like_documents(tmp_path: Path) -> None:
    rows = [[1, 2, 3], *token_rows()]
    artifacts = prepare(tmp_path, [rows[:30], rows[30:]], pretokenized=True, column="tokens", val_tokens=1000)
    chosen, stream = held_out(rows, 1000, list)
    assert validation_of(artifacts) == stream
    expected, left = [], 0
    for part in (rows[:30], rows[30:]):
        stream = [i for row in part if row not in chosen for i in row]
        expected += [stream[i : i + 32] for i in range(0, len(stream) // 32 * 32, 32)]
        left += len(stream) % 32
    assert training_rows(artifacts) == expected
    assert artifacts["shard"].metrics["dropped_tokens"] == left


def test_rows_cut_from_a_stream_are_held_out_in_runs_and_what_they_share_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [[i % 251, *rng.integers(0, 256, rng.integers(5, 100)).tolist(), 256] for i in range(2000)]
    stream = [i for document in documents for i in document]
    rows = [stream[i : i + 16] for i in range(0, len(stream) // 16 * 16, 16)]
    config = tiny_config(pretokenized=True, column="tokens", val_tokens=16_000, model={"seq_len": 16})
    store, said = Store(str(tmp_path)), []
    inputs = {"download": downloaded(store, [rows[:3001], rows[3001:]])}
    for stage in BUILD:
        inputs[stage] = build(stage, config, store, inputs, lambda kind, text="", **_: said.append(text))
    metrics = inputs["split"].metrics
    assert metrics["unit_rows"] == 62  # sixteen runs of so many rows of sixteen are 16,000 tokens or less
    # By what truly lies on both sides: held-out tokens of documents that training rows hold a part of.
    held = {tuple(validation_of(inputs)[i : i + 16]) for i in range(0, 16_000, 16)}
    inside = np.repeat([tuple(row) in held for row in rows], 16)
    ends = np.cumsum([len(document) for document in documents])
    both = sum(int(part.sum()) for part in np.split(inside, ends[ends < len(inside)]) if 0 < part.sum() < len(part))
    assert both / inside.sum() == pytest.approx(metrics["val_shared_share"], abs=0.01)
    assert 0.02 < metrics["val_shared_share"] < 0.12
    assert any("of what is held out belongs to documents that go on in training rows" in text for text in said)


@pytest.mark.parametrize("bad", [257, 65535])
@pytest.mark.parametrize("side", ["front", "back"])
def test_an_id_that_the_tokenizer_lacks_is_refused(tmp_path: Path, bad: int, side: str) -> None:
    rows = token_rows()
    by_key = sorted(rows, key=lambda row: document_key(row, 0))
    first, last = (document_key(row, 0) for row in (by_key[0], by_key[-1]))
    keyed = ((document_key(row, 0), row) for row in ([i, bad] for i in range(50_000)))
    spoilt = next(row for key, row in keyed if (key < first if side == "front" else key > last))
    with pytest.raises(NanodlmError, match=rf"token id {bad}, but bytes has ids 0 to 256: check --data.tokenizer"):
        prepare(tmp_path, [[*rows, spoilt]], pretokenized=True, column="tokens")


CORPUS = prose(60)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
@pytest.mark.parametrize(
    "parts", [[["é — Ω 😀, long. " * 300]], [CORPUS[:30], CORPUS[30:]], [CORPUS[:3], ["é" * 4001, "…"]]], ids=len
)
def test_of_a_small_corpus_the_last_tenth_is_held_out_and_what_is_before_it_trained_on(
    tmp_path: Path, parts: list[list[str]], kind: str
) -> None:
    artifacts = prepare(tmp_path, parts, seq_len=2, val_tokens=None, tokenizer=kind, vocab_size=300)
    encoding, split, whole = encoding_of(artifacts), artifacts["split"].metrics, "".join(map("".join, parts)).encode()
    front = whole[: len(whole) * 9 // 10].decode(errors="ignore")  # up to the edge of a character
    ids = [i for i in validation_of(artifacts) if i != encoding.eot_token]
    assert front.encode() + encoding.decode_bytes(ids) == whole
    fronts, left = [], len(front)
    for part in parts:
        fronts.append([text[: max(0, left - sum(map(len, part[:i])))] for i, text in enumerate(part)])
        left -= sum(map(len, part))
    whole_texts = {text for part in parts for text in part}  # a mark ends these, and no document in the middle
    streams = []
    for part in fronts:
        ends = [[encoding.eot_token] if text in whole_texts else [] for text in part]
        streams.append([t for text, end in zip(part, ends, strict=True) for t in encoding.encode_ordinary(text) + end])
    assert training_rows(artifacts) == [s[i : i + 2] for s in streams for i in range(0, len(s) // 2 * 2, 2)]
    if kind == "bpe":
        trained = tokenizer.train_bpe([text for part in fronts for text in part], 300)
        assert encoding._mergeable_ranks == trained._mergeable_ranks
    assert split["split"] == "last"
    assert "smallest_training_key" not in artifacts["shard"].metrics


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "chars"])
@pytest.mark.parametrize("val_tokens", [100, 2001])
def test_exactly_the_last_tokens_of_the_source_are_held_out_on_request(
    tmp_path: Path, kind: str, val_tokens: int
) -> None:
    parts = [CORPUS[:20], CORPUS[20:50], CORPUS[50:]]
    data = {"split": "last", "val_tokens": val_tokens, "tokenizer": kind, "vocab_size": 300}
    artifacts = prepare(tmp_path, parts, seq_len=2, **data)
    encoding, metrics = encoding_of(artifacts), artifacts["split"].metrics
    stream = [i for text in CORPUS for i in [*encoding.encode_ordinary(text), encoding.eot_token]]
    assert validation_of(artifacts) == stream[-val_tokens:]
    held_out = encoding.decode_bytes([i for i in validation_of(artifacts) if i != encoding.eot_token])
    trained = [i for row in training_rows(artifacts) for i in row if i != encoding.eot_token]
    front = "".join(CORPUS).encode().removesuffix(held_out)
    assert len(front) - len(encoding.decode_bytes(trained)) <= 3 * 2 * 5  # a token at the end of each part is dropped
    assert (metrics["split"], metrics["val_tokens"], metrics["val_bytes"]) == ("last", val_tokens, len(held_out))
    assert metrics["val_documents"] == stream[-val_tokens:].count(encoding.eot_token)


def test_no_token_is_made_up_where_a_document_is_cut(tmp_path: Path) -> None:
    artifacts = prepare(tmp_path, [["abcdefghij" * 100]], seq_len=64, split="last", val_tokens=361)
    metrics = artifacts["shard"].metrics
    assert metrics["train_tokens"] + metrics["dropped_tokens"] + 361 == 1001  # the bytes and one mark
    assert bytes(i for row in training_rows(artifacts) for i in row) == b"abcdefghij" * 64


def test_a_file_to_train_on_is_no_validation_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    config = tiny_config(str(tmp_path / "a.txt"), validation=str(tmp_path / "a.txt"), val_tokens=None)
    with pytest.raises(NanodlmError, match=r"a\.txt is in --data\.validation as well"):
        run_stage("download", config, Store(str(tmp_path / "store")))


def test_a_share_of_the_end_is_that_share_of_its_characters(tmp_path: Path) -> None:
    text = "".join(CORPUS)[:9999]
    artifacts = prepare(tmp_path, [[text]], split="last", val_share=0.25, tokenizer="chars", seq_len=8, val_tokens=None)
    encoding = encoding_of(artifacts)
    assert encoding.decode(validation_of(artifacts)[:-1]) == text[int(9999 * 0.75) :]
    assert artifacts["split"].metrics["val_characters"] == 9999 - int(9999 * 0.75)


def test_a_validation_set_of_its_own_is_held_out_whole_and_the_source_trained_on_whole(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(CORPUS[:40]))
    (tmp_path / "valid.txt").write_text("".join(CORPUS[40:]))
    files = {"validation": str(tmp_path / "valid.txt"), "sample_by": "line", "val_tokens": None}
    config = tiny_config([str(tmp_path / "train.txt")], model={"seq_len": 2}, **files)
    store = Store(str(tmp_path / "store"))
    for stage in ("download", "tokenizer", "split", "shard"):
        shards, _ = run_stage(stage, config, store)
    assert shards.metrics["val_bytes"] == sum(len(text.encode()) - 1 for text in CORPUS[40:])
    assert shards.metrics["train_tokens"] > 0


def test_of_few_rows_of_ids_the_last_tenth_is_held_out_within_a_row_if_need_be(tmp_path: Path) -> None:
    rows = token_rows(5)
    artifacts = prepare(tmp_path, [rows[:2], rows[2:]], seq_len=16, pretokenized=True, column="tokens", val_tokens=None)
    assert validation_of(artifacts) == rows[4][32:]
    assert training_rows(artifacts) == [row[i : i + 16] for row in rows for i in (0, 16, 32, 48)][:-2]


@pytest.mark.parametrize("pretokenized", [False, True])
def test_documents_of_a_validation_set_that_the_source_has_too_are_counted(tmp_path: Path, pretokenized: bool) -> None:
    twins, said = [" " + CORPUS[3].upper(), CORPUS[4]], []
    for name, documents in {"train": [*prose(60, seed=5), *twins], "valid": CORPUS[:10]}.items():
        rows = [{"text": list(text.encode()) if pretokenized else text} for text in documents]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"validation": str(tmp_path / "valid.jsonl"), "pretokenized": pretokenized, "val_tokens": None}
    config, store = tiny_config(tmp_path / "train.jsonl", **data), Store(str(tmp_path / "store"))
    for stage in ("download", "tokenizer", "split"):
        made, _ = run_stage(stage, config, store, emit=lambda kind, **told: said.append(told.get("text", "")))
    count = 1 if pretokenized else 2  # ids have no white space and no case
    assert made.metrics["val_twins"] == count
    assert any(text.startswith(f"{count} document") and "are trained on" in text for text in said)


SMALL = (
    r"holding out the last tenth \(0.* MB\) of a small corpus; --data\.val_tokens N takes N tokens of documents chosen"
)


@pytest.mark.parametrize(
    ("documents", "asked", "says"),
    [(DOCUMENTS, None, ""), (DOCUMENTS[:20], 500, ""), (DOCUMENTS[:20], None, SMALL), (["long " * 9000], None, SMALL)],
    ids=["large", "asked", "small", "one"],
)
def test_a_fixed_number_is_held_out_by_hash_unless_the_corpus_is_small_and_none_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[str], asked: int | None, says: str
) -> None:
    monkeypatch.setattr(held_out_module, "VAL_TOKENS", 900)
    monkeypatch.setattr(held_out_module, "SMALL", 5000)
    config, store, said = tiny_config(val_tokens=asked), Store(str(tmp_path)), []
    inputs = {"download": downloaded(store, [documents])}
    for stage in ("tokenizer", "split"):
        inputs[stage] = build(stage, config, store, inputs, lambda _, text: said.append(text))
    assert inputs["split"].metrics["split"] == ("last" if says else "hash")
    assert re.match(says, "".join(said))
    assert bool(said) == bool(says)
    assert says or len(validation_of(inputs)) == (asked or 900)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("val_tokens", [10**6, 1600])
def test_a_corpus_smaller_than_the_split_is_refused_with_what_to_do(tmp_path: Path, kind: str, val_tokens: int) -> None:
    with pytest.raises(NanodlmError) as caught:
        prepare(tmp_path, [["word " * 60, "mot " * 60, "Wort " * 60]], tokenizer=kind, val_tokens=val_tokens)
    assert str(caught.value).startswith("the corpus is smaller than the validation split: ")
    assert f"cannot give {val_tokens:,} validation tokens and leave some to train on" in str(caught.value)
    assert "lower --data.val_tokens" in str(caught.value)
    assert "or leave it out, add text, or cut .txt files up with --data.sample_by paragraph" in str(caught.value)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_one_document_is_not_to_be_split_by_a_lower_number(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        NanodlmError, match=r"one document.*: leave out --data\.val_tokens, .*sample_by paragraph"
    ) as caught:
        prepare(tmp_path, [["word " * 600]], tokenizer=kind, val_tokens=10)
    assert "lower" not in str(caught.value)


def test_the_largest_number_that_rows_of_ids_can_give_is_named_and_can_be_given(tmp_path: Path) -> None:
    ids = {"pretokenized": True, "column": "tokens"}
    with pytest.raises(
        NanodlmError, match=r"320 tokens in 5 documents .*lower --data\.val_tokens to at most 256 or"
    ) as caught:
        prepare(tmp_path / "a", [token_rows(5)], val_tokens=300, **ids)
    assert "sample_by" not in str(caught.value)
    assert prepare(tmp_path / "b", [token_rows(5)], val_tokens=256, **ids)["shard"].metrics["train_rows"] == 2


@pytest.mark.parametrize(
    ("sources", "data", "says"),
    [
        (["a.txt"], {"val_tokens": 100}, "one document"),
        (["a.txt", "b.txt"], {"val_tokens": 402}, "400 bytes cannot give 402 validation tokens"),
        (["a.txt"], {"val_tokens": 201, "sample_by": "line"}, "200 bytes cannot give 201"),
        (["a.txt", "b.txt"], {"val_tokens": 401}, ""),
        (["a.txt"], {"val_tokens": None}, ""),
        (["a.txt", "c.parquet"], {"val_tokens": 10**6}, ""),
    ],
)
def test_a_number_that_local_files_cannot_give_is_refused_before_they_are_read(
    tmp_path: Path, sources: list[str], data: dict[str, Any], says: str
) -> None:
    for name in sources:
        (tmp_path / name).write_text("a" * 200)
    config = tiny_config([str(tmp_path / name) for name in sources], **data)
    with pytest.raises(NanodlmError, match=says) if says else contextlib.nullcontext():
        table.check(config, table.until("split"))
    table.check(config, ("download", "train"))


def test_validation_tokens_of_one_row_are_refused_before_anything_is_built() -> None:
    for until, tokens in (("shard", 33), ("split", 32)):
        table.check(tiny_config(speeches(2), val_tokens=tokens), table.until(until))
    with pytest.raises(
        NanodlmError, match=r"32 validation tokens are one row of seq_len \(32\).*raise --data\.val_tokens, or"
    ):
        table.check(tiny_config(val_tokens=32), ("shard",))
    with pytest.raises(NanodlmError, match=r"4 validation tokens are one row .*; add text, or lower --model\.seq_len"):
        check_rows(tiny_config(val_tokens=None).data, 1, 4, 4)


def test_rows_that_no_split_can_mend_are_refused_with_what_does(tmp_path: Path) -> None:
    with pytest.raises(NanodlmError, match=r"add text, or lower --model\.seq_len$"):
        prepare(tmp_path, [["short"]], val_tokens=None)


@pytest.mark.parametrize(("asked", "remedy"), [(None, "add text"), (32, "raise --data.val_tokens")])
def test_one_validation_row_is_refused_before_anything_is_trained(
    tmp_path: Path, asked: int | None, remedy: str
) -> None:
    with pytest.raises(NanodlmError, match=rf"no standard error; {remedy}, or lower --model\.seq_len"):
        prepare(tmp_path, [["a few words " * 20, "and more " * 5]], val_tokens=asked)


def test_no_whole_training_row_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NanodlmError, match=r"no training row: .* fewer than seq_len \(100000\).*lower --model.seq_len"):
        prepare(tmp_path, [DOCUMENTS], seq_len=100_000)


def test_sharding_cut_off_continues_to_the_same_bytes(tmp_path: Path) -> None:
    parts = [DOCUMENTS[i : i + 50] for i in range(0, 200, 50)]
    undisturbed = prepare(tmp_path / "undisturbed", parts)
    inputs = prepare(tmp_path / "store", parts, "split")
    config, store = tiny_config(), Store(str(tmp_path / "store"))

    def emit(kind: str, **fields: Any) -> None:
        if fields["done"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("shard", config, store, inputs, emit)
    assert store.find("shard", "f0") is None
    (killed,) = (tmp_path / "store" / "shard" / "f0" / "attempts").iterdir()
    finished = {p.name: p.stat().st_ino for p in killed.glob("*.arrayrecord")}
    assert sorted(finished) == ["train-00000.arrayrecord", "train-00001.arrayrecord"]
    resumed = build("shard", config, store, inputs)
    assert resumed.digest == undisturbed["shard"].digest
    assert resumed.metrics == undisturbed["shard"].metrics
    assert {name: (resumed.local() / name).stat().st_ino for name in finished} == finished


def test_the_same_corpus_gives_the_same_bytes_at_every_stage(tmp_path: Path) -> None:
    parts = [DOCUMENTS[:90], DOCUMENTS[90:]]
    one, other = (prepare(tmp_path / name, parts, tokenizer="bpe", vocab_size=300) for name in "ab")
    assert {stage: a.digest for stage, a in one.items()} == {stage: a.digest for stage, a in other.items()}
