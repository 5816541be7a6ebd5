"""Documents in rows: one a row, or packed; what is cut, dropped and padded is counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanodlm.config import Config
from nanodlm.data import layout
from nanodlm.data import rows as data_rows
from nanodlm.data.documents import Documents
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Store
from tests.data.test_split import BUILD, DOCUMENTS, build, byte_tokens, cut_of, document_key, training_rows
from tests.support.helpers import downloaded, tiny_config

MARK, PADDING = 256, 257
SHORT = [text[: 3 + 7 * i % 60] + f"{i}" for i, text in enumerate(DOCUMENTS)]


def shards(folder: Path, parts: list[list[Any]], said: list[str] | None = None, **data: Any) -> dict[str, Artifact]:
    config, store = tiny_config(**data), Store(str(folder))
    inputs = {"download": downloaded(store, parts)}
    for stage in BUILD:
        emit = lambda kind, **fields: said.append(fields["text"]) if said is not None and "text" in fields else None  # noqa: E731
        inputs[stage] = build(stage, config, store, inputs, emit)
    return inputs


def held_out_rows(artifacts: dict[str, Artifact]) -> list[list[int]]:
    return [row.tolist() for row in data_rows.read(artifacts["shard"].file("validation.arrayrecord"), "<u2")]


def padded(tokens: list[int], length: int = 32) -> list[int]:
    return tokens + [PADDING] * (length - len(tokens))


def documents(sizes: np.ndarray, seed: int = 0) -> Documents:
    values = np.random.default_rng(seed).integers(0, MARK, sizes.sum()).astype(np.uint16)
    values[np.cumsum(sizes) - 1] = MARK
    return Documents(values, np.concatenate([[0], np.cumsum(sizes)]))


@pytest.mark.parametrize("at_once", [2**22, 96])
def test_each_document_has_a_row_cut_or_padded_and_what_is_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(layout, "AT_ONCE", at_once)
    said: list[str] = []
    artifacts = shards(tmp_path, [SHORT[:90], SHORT[90:]], said, rows="document")
    kept = [byte_tokens(text) for text in SHORT if document_key(text, 0) > cut_of(artifacts)]
    rows, metrics = training_rows(artifacts), artifacts["shard"].metrics
    assert rows == [padded(tokens[:32]) for tokens in kept]
    tokens, lost = sum(min(32, len(t)) for t in kept), sum(max(0, len(t) - 32) for t in kept)
    assert (metrics["train_tokens"], metrics["dropped_tokens"]) == (tokens, lost)
    assert metrics["padding_share"] == pytest.approx(1 - tokens / 32 / len(rows))
    assert metrics["padding_share"] > 0.1
    assert metrics["cut_documents"] == sum(len(t) > 32 for t in kept) > 20
    stream = np.load(artifacts["split"].file("validation.npy"))
    pieces = [piece.tolist() for piece in np.split(stream, np.flatnonzero(stream == MARK) + 1)]
    assert held_out_rows(artifacts) == [padded(piece[:32]) for piece in pieces if piece]
    scored = [token for piece in pieces for token in piece[:32]]
    assert (metrics["val_tokens"], metrics["val_dropped_tokens"]) == (len(scored), len(stream) - len(scored))
    assert metrics["val_bytes"] == len(scored) - scored.count(MARK)
    assert f"{metrics['padding_share']:.2%} of the training rows is padding" in said[-1]
    assert f"{lost:,} tokens ({lost / (lost + tokens):.2%}) are dropped" in said[-1]


@pytest.mark.parametrize("ids", [False, True], ids=["texts", "ids"])
def test_packed_rows_drop_nothing_and_marks_tell_their_documents(tmp_path: Path, ids: bool) -> None:
    stream = [token for text in SHORT for token in byte_tokens(text)]
    parts = [[stream[i : i + 50] for i in range(0, len(stream), 50)]] if ids else [SHORT[:90], SHORT[90:]]
    artifacts = shards(tmp_path, parts, rows="packed", split="last", val_tokens=1000, pretokenized=ids)
    held_out, metrics = np.load(artifacts["split"].file("validation.npy")).tolist(), artifacts["shard"].metrics
    assert held_out == stream[-1000:]
    found = []
    for row in training_rows(artifacts):
        end = [*row, PADDING].index(PADDING)
        assert set(row[end:]) <= {PADDING}
        pieces = [piece.tolist() for piece in np.split(row[:end], np.flatnonzero(np.array(row[:end]) == MARK) + 1)]
        found += [piece for piece in pieces if piece]
        assert all(piece[-1:] == [MARK] for piece in pieces[:-1])
    whole = np.split(stream[:-1000], np.flatnonzero(np.array(stream[:-1000]) == MARK) + 1)
    assert sorted(found) == sorted(d[i : i + 32].tolist() for d in whole for i in range(0, len(d), 32))
    assert (metrics["train_tokens"], metrics["dropped_tokens"], metrics["val_dropped_tokens"]) == (
        sum(map(len, found)),
        0,
        0,
    )
    assert metrics["padding_share"] < 0.06
    rows = held_out_rows(artifacts)
    assert [token for row in rows for token in row if token != PADDING] == held_out, "in the documents' order"
    assert all(MARK not in row[: row.index(PADDING) - 1] for row in rows if PADDING in row), "each in a row of its own"


def plain_best_fit(sizes: list[int], length: int) -> list[list[int]]:
    """The rule itself: from the longest on, each where the least room is left that is enough."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= length]
        max(fitting, key=sum, default=rows).append(size) if fitting else rows.append([size])
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_packing_is_best_fit_decreasing(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 65, 400)
    rows = layout.packed(documents(sizes), 64, MARK)
    found = np.concatenate([np.diff([0, *(np.flatnonzero(row == MARK) + 1)]) for row in rows])
    assert sorted(found) == sorted(sizes)
    expected = [sum(row) for row in plain_best_fit(sizes.tolist(), 64)]  # which of equally full rows is chosen is open
    assert sorted((rows != PADDING).sum(axis=1)) == sorted(expected)


def test_a_text_without_a_mark_shares_no_row_for_nobody_could_tell_where_it_ends() -> None:
    values = np.array([1, MARK, 2, 3, 4], np.uint16)
    assert layout.packed(Documents(values, np.array([0, 2, 5])), 8, MARK).tolist() == [
        padded([2, 3, 4], 8),
        padded([1, MARK], 8),
    ]


def test_lengths_are_drawn_by_content_for_a_share_and_marks_fill_them() -> None:
    found = documents(np.random.default_rng(0).integers(2, 33, 4000))
    limit, drawn = layout.limits(found, 32, 0.25)
    assert abs(drawn.mean() - 0.25) < 0.03 and set(limit[~drawn]) == {32}
    assert abs((limit[drawn] == 32).mean() - 0.5) < 0.06
    assert set(limit[drawn]) == {*range(1, 33)}
    turned = Documents(np.concatenate([*map(np.asarray, [*found][::-1])]), np.cumsum([0, *found.sizes[::-1]]))
    np.testing.assert_array_equal(layout.limits(turned, 32, 0.25)[0], limit[::-1])
    rows = np.concatenate([*layout.one_a_row(found, limit, drawn, 32, MARK)])
    for document, row, most, marks in zip(found, rows.tolist(), limit, drawn, strict=True):
        text = [*document][:most]
        assert row == padded(text + [MARK] * ((most - len(text)) * marks))


def test_rows_of_the_stream_are_found_under_their_old_fingerprint_and_others_are_not() -> None:
    parameters = STAGES["shard"].parameters
    assert parameters(Config()) == {"seq_len": 64}
    assert parameters(Config().replace(data={"variable_share": 0.5})) == {"seq_len": 64}
    document = Config().replace(data={"rows": "document"})
    others = [document, document.replace(data={"variable_share": 0.5}), Config().replace(data={"rows": "packed"})]
    assert len({str(parameters(config)) for config in [Config(), *others]}) == 4
