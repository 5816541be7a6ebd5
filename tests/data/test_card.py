"""The data card: held against counting by hand, and equal whatever the order and the parts."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanodlm.data import shard
from nanodlm.data.card import described
from nanodlm.data.readers import Bad
from nanodlm.store import Store
from tests.data.test_split import DOCUMENTS, build
from tests.support.helpers import downloaded, tiny_config

IDS = {"pretokenized": True, "column": "tokens"}
RAGGED = [[i % 250 for i in range(n, 2 * n)] for n in range(1, 150)]


def card_of(folder: Path, parts: list[list[Any]], found: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    config, store = tiny_config(**data), Store(str(folder))
    inputs = {"download": downloaded(store, parts)}
    inputs["download"].manifest["metrics"] |= found or {}
    for stage in ("tokenizer", "split", "shard"):
        inputs[stage] = build(stage, config, store, inputs)
    return json.loads(inputs["shard"].file("card.json").read_text())


def test_the_card_counts_what_is_trained_on_and_what_is_left_out(tmp_path: Path) -> None:
    bad = {
        "bad_rows": dataclasses.asdict(Bad({"null": 3}, ["a.jsonl:7: null"], 300)),
        "bad_validation_rows": dataclasses.asdict(Bad({"not UTF-8": 1}, ["b.jsonl:9: not UTF-8"], 100)),
        "cleaned": {"repaired": 5, "too short": 12},
    }
    card = card_of(tmp_path, [DOCUMENTS], bad, split="last")
    text = "".join(f"{text}\0" for text in DOCUMENTS).encode()[:-1000]
    kept = text[: len(text) // 32 * 32]
    counts = Counter(kept.replace(b"\0", b""))
    sizes = {"tokens": len(kept), "bytes": sum(counts.values()), "characters": sum(counts.values())}
    assert card["training"] == {"documents": text.count(b"\0") + 1, **sizes}
    assert card["validation"]["tokens"] == 1000
    assert card["frequent"][0] == [chr(counts.most_common(1)[0][0]), max(counts.values())]
    assert card["never_trained_on"] == 256 - len(counts)
    left_out = {"rows, null": 3, "documents, too short": 12, "tokens, in no row": len(text) - len(kept)}
    assert card["left_out"] == left_out | {"validation rows, not UTF-8": 1}
    places = {("", "a.jsonl:7: null"), ("", "b.jsonl:9: not UTF-8")}
    said = {("left out", "3 rows, null"), ("", "1 validation rows, not UTF-8"), ("mended", "5 documents"), *places}
    assert said <= set(described(card))


@pytest.mark.parametrize(("documents", "data"), [(DOCUMENTS, {}), (RAGGED, {**IDS, "val_tokens": 100})])
def test_lengths_and_examples_are_the_same_whatever_the_order_and_the_parts(
    tmp_path: Path, documents: list[Any], data: dict[str, Any]
) -> None:
    turned = documents[::-1]
    one = card_of(tmp_path / "one", [documents], **data)
    others = card_of(tmp_path / "others", [turned[:50], turned[50:60], turned[60:]], **data)
    assert (one["lengths"], one["examples"]) == (others["lengths"], others["examples"])
    texts = [bytes(text).decode(errors="replace") if data else text for text in documents]
    assert len([text for text in one["examples"] if any(other.startswith(text) for other in texts)]) == 10
    assert sum(one["lengths"].values()) == one["training"]["documents"]
    for low, count in one["lengths"].items():
        there = sum(int(low) <= len(text) + (not data) < 2 * int(low) for text in documents)
        assert there - one["validation"]["documents"] <= count <= there


def test_rows_of_a_stream_have_no_lengths_and_parts_of_an_earlier_version_no_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (60, 64)).tolist()
    card = card_of(tmp_path / "rows", [rows], **IDS, val_tokens=640)
    assert (card["lengths"], len(card["examples"])) == ({}, 10)
    write, added = shard._write_shard, ("lengths", "beginnings")
    monkeypatch.setattr(shard, "_write_shard", lambda *a: {k: v for k, v in write(*a).items() if k not in added})
    card = card_of(tmp_path / "texts", [DOCUMENTS])
    assert (card["lengths"], card["examples"]) == ({}, [])
