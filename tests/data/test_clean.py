import json
import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from nanodlm.cli.main import main
from nanodlm.config import Config
from nanodlm.data import clean, rows, shingles
from nanodlm.data.documents import Documents
from nanodlm.data.parts import SCHEMAS
from nanodlm.data.sources import source_files
from nanodlm.data.tokenizer import plain_bytes
from nanodlm.errors import UsageError
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Store
from tests.support.helpers import prose, tiny_config

SPEECHES = [Path(url.removeprefix("file://")).read_text() for url in source_files(Config().data)]
PARAGRAPHS = [p for speech in SPEECHES for p in speech.split("\n") if len(p.split()) > 60]


def documents(texts: list[str]) -> Documents:
    return Documents.of(pa.array(texts, pa.large_string()))


def left(texts: list[Any], tmp_path: Path, batch: int = 7, **data: Any) -> tuple[list[Any], dict[str, int]]:
    """What cleaning leaves of documents that come a few at a time, and its counts."""
    array = pa.array(texts, SCHEMAS["tokens" if data.get("pretokenized") else "text"].field(0).type)
    counts: dict[str, int] = {}
    stream = ((0, array[i : i + batch]) for i in range(0, len(array), batch))
    found = clean.cleaned(tiny_config(**data).data, stream, tmp_path, counts)
    return [text for _, left in found for text in left.to_pylist()], counts


def changed(text: str, count: int, rng: np.random.Generator) -> str:
    words = text.split()
    for place in rng.integers(0, len(words), count):
        words[place] = f"word{rng.integers(10**6)}"
    return " ".join(words)


@cache
def runs(text: str) -> set[tuple[str, ...]]:
    """The runs of five words, as they are defined."""
    words = re.findall(r"[a-z0-9\u0080-\u1fff\u3000-\U0010ffff]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(one: str, other: str) -> float:
    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def test_what_two_texts_have_in_common_is_estimated_without_bias() -> None:
    rng = np.random.default_rng(0)
    pairs = [(text, changed(text, int(rng.integers(0, 10)), rng)) for text in PARAGRAPHS[:600]]
    exact = np.array([jaccard(*pair) for pair in pairs])
    one, other = (shingles.signatures(documents([pair[i] for pair in pairs])) for i in (0, 1))
    error = (one == other).mean(1) - exact
    assert abs(error.mean()) < 0.005 and error.std() < 1.2 * np.sqrt((exact * (1 - exact) / 128).mean())


def test_near_duplicates_are_those_that_sets_of_runs_show(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = PARAGRAPHS[:120] + [changed(t, int(rng.integers(1, 8)), rng) for t in PARAGRAPHS[:120] * 2]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    kept, counts = left(texts, tmp_path, duplicates=0.7)
    dropped = [text for text in texts if text not in {*kept}]
    before = {text: texts[: texts.index(text)] for text in dropped}
    assert counts == {"exact duplicates": 0, "near duplicates": len(dropped)} and 100 < len(dropped) < 240
    assert all(max(jaccard(text, k) for k in kept if k in before[text]) > 0.58 for text in dropped)
    assert max(jaccard(one, other) for one, other in combinations(kept, 2)) < 0.82


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_of_equal_documents_the_first_stays(tmp_path: Path, batch: int) -> None:
    texts = ["One text.", "Another", "one  TEXT.\n", "Another", "A third", "One text", "A\u2003third", "a Third"]
    assert left(texts, tmp_path, batch, duplicates=1)[0] == ["One text.", "Another", "A third", "One text", texts[6]]
    ids = [[1, 2], [2, 1], [1, 2], [1], [2, 1], [3] * 30, [3] * 29]
    assert left(ids, tmp_path, batch, duplicates=1, pretokenized=True)[0] == [ids[i] for i in (0, 1, 3, 5, 6)]
    assert left(texts, tmp_path, batch, duplicates=0.8)[0] == ["One text.", "Another", "A third", "One text", texts[6]]


def test_rows_of_ids_have_near_duplicates(tmp_path: Path) -> None:
    ids = [list(range(i, i + 300)) for i in (0, 10, 2000)]
    assert left(ids, tmp_path, pretokenized=True, duplicates=0.8) == (
        [ids[0], ids[2]],
        {"exact duplicates": 0, "near duplicates": 1},
    )


def test_what_was_met_is_known_whatever_came_at_a_time() -> None:
    rng = np.random.default_rng(2)
    seen, met = shingles.Seen(), set[int]()
    for size in rng.integers(1, 200, 60):
        numbers = rng.integers(0, 3000, size).astype(np.uint64)
        first = [not (n in met or met.add(n)) for n in numbers.tolist()]
        assert seen.first(numbers).tolist() == first
    assert sum(map(len, seen._sorted)) == len(met) and len(seen._sorted) < 10


@pytest.mark.parametrize("size", [1, 2, 20_000])
def test_words_are_found_whatever_lies_between_them_and_however_many_at_a_time(size: int) -> None:
    texts = ["“Fellow—citizens,” he said", "fellow citizens HE  said.", "fellowcitizens he said", "中文字 x", "字文"]
    found = [text.tolist() for text in shingles.words(documents(texts), size)]
    assert found[0] == found[1] and len(found[2]) == 3 and found[2][1:] == found[0][2:]
    assert found[3][1] == found[4][1] and len({*found[3]}) == 4, "each Chinese character is a word"


GERMAN, FRENCH = "Der Vertrag wurde gestern in Berlin geschlossen.", "Le président a prononcé un long discours hier."
BROKEN = "Er sagte: â€œSchÃ¶nâ€\x9d &amp; ging.\r\n“So” ﬁng es an."


@pytest.mark.parametrize(
    ("data", "texts", "kept", "counts"),
    [
        ({"min_length": 4}, ["äöü", "abcd", "a"], ["abcd"], {"too short": 2}),
        ({"max_length": 3}, ["äöü", "abcd"], ["äöü"], {"too long": 1}),
        ({"max_length": 2, "pretokenized": True}, [[1, 2], [1, 2, 3]], [[1, 2]], {"too long": 1}),
        ({"languages": ["de"]}, [GERMAN, FRENCH, "\0" + GERMAN], [GERMAN, "\0" + GERMAN], {"in other languages": 1}),
        ({"languages": ["fr", "en"]}, [PARAGRAPHS[0], GERMAN, FRENCH], [PARAGRAPHS[0], FRENCH], None),
        ({"languages": ["de"], "min_length": 4}, ["a"], [], {"too short": 1, "in other languages": 0}),
        ({"repair": True}, [BROKEN], ["Er sagte: “Schön” &amp; ging.\r\n“So” ﬁng es an."], {"repaired": 1}),
        ({"repair": True}, [*PARAGRAPHS[:50], GERMAN], [*PARAGRAPHS[:50], GERMAN], {"repaired": 0}),
        ({"repair": True, "duplicates": 1}, ["schön", "schÃ¶n"], ["schön"], {"repaired": 1, "exact duplicates": 1}),
        ({}, ["a", "a"], ["a", "a"], {}),
    ],
)
def test_documents_are_mended_and_left_out_and_counted(
    tmp_path: Path, data: dict[str, Any], texts: list[Any], kept: list[Any], counts: dict[str, int] | None
) -> None:
    found, counted = left(texts, tmp_path, **data)
    assert found == kept and (counts is None or counted == counts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": ["a", "b"], "weights": [1]}, "needs a number for each of data.source"),
        ({"weights": [0]}, "and one above 0"),
        ({"pretokenized": True, "repair": True}, "token ids have no language"),
        ({"duplicates": 0.3}, "greater than or equal to 0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(**data)


def test_what_is_missing_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"has 'klingon', which is none of am, ar"):
        clean.check(tiny_config(languages=["en", "klingon"]).data)
    monkeypatch.setattr(clean, "find_spec", lambda name: None if name == "ftfy" else find_spec(name))
    with pytest.raises(UsageError, match=r"repair needs ftfy: pip install -c constraints\.txt -e '\.\[clean\]'"):
        clean.check(tiny_config(repair=True).data)


def test_settings_that_clean_nothing_change_no_fingerprint() -> None:
    config = Config()
    assert {*STAGES["download"].parameters(config)} == {"column", "pretokenized", "part_mb", "sample_by", "files"}
    assert STAGES["shard"].parameters(config) == {"seq_len": 64}
    cleaner = config.replace(data={"duplicates": 0.8, "weights": [2], "decontaminate": 13})
    parameters = STAGES["download"].parameters(cleaner)
    assert parameters["duplicates"] == 0.8 and parameters["files_of_each"] == [len(SPEECHES)]
    assert STAGES["shard"].parameters(cleaner) == {"seq_len": 64, "weights": [2.0], "decontaminate": 13}


def shards(folder: Path, **data: Any) -> dict[str, Artifact]:
    store, made = Store(str(folder)), dict[str, Artifact]()
    for stage in ("download", "tokenizer", "split", "shard"):
        made[stage] = run_stage(stage, tiny_config(**{"val_tokens": 500, **data}), store)[0]
    return made


def trained_on(artifacts: dict[str, Artifact]) -> list[str]:
    """The documents in training rows, without the last of each part."""
    texts = []
    for file in sorted(artifacts["shard"].local().glob("train-*")):
        marks = (row.tolist() for row in rows.read(file, "<u2"))
        texts += bytes(i if i < 256 else 0 for row in marks for i in row).decode().split("\0")[:-1]
    return texts


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    paths = []
    for number in range(3):
        paths.append(f"{tmp_path}/{2 - number}.jsonl")  # names in the reverse order
        texts = [{"text": f"{number} {text}"} for text in prose(100, seed=number)]
        Path(paths[-1]).write_text("".join(json.dumps(text) + "\n" for text in texts))
    return paths


def test_documents_are_trained_on_as_often_as_their_source_weighs(tmp_path: Path, sources: list[str]) -> None:
    plain = shards(tmp_path / "plain", source=sources)
    mixed = shards(tmp_path / "mixed", source=sources, weights=[1, 0.5, 2.25], part_mb=0.005)
    assert mixed["split"].digest == plain["split"].digest, "what is held out is what it was"
    texts = {f"{i} {text}" for i in range(3) for text in prose(100, seed=i)}
    once, counts = {*trained_on(plain)}, Counter(trained_on(mixed))
    shares = [Counter(min(3, n) for text, n in counts.items() if text[0] == str(i)) for i in range(3)]
    of_each = Counter(text[0] for text in once)
    assert {*counts} <= texts and {*shares[0]} == {*shares[1]} == {1} and {*shares[2]} <= {1, 2, 3}
    assert shares[0][1] > 0.9 * of_each["0"] and 0.3 < shares[1][1] / of_each["1"] < 0.7
    assert 0.1 < shares[2][3] / of_each["2"] < 0.4 and shares[2][2] > 0.5 * of_each["2"]
    sizes = mixed["download"].metrics["part_sources"]
    assert sizes == sorted(sizes) and {*sizes} == {0, 1, 2}
    tokens = mixed["shard"].metrics["source_tokens"]
    assert sum(tokens) == mixed["shard"].metrics["train_tokens"] and tokens[1] < tokens[0] < tokens[2]
    again = shards(tmp_path / "mixed", source=sources, weights=[1, 1, 1], part_mb=0.005)
    assert again["download"].uri == mixed["download"].uri, "other weights read no source again"
    none = shards(tmp_path / "mixed", source=sources, weights=[1, 0, 0], part_mb=0.005)
    assert {text[0] for text in trained_on(none)} == {"0"} and none["shard"].metrics["source_tokens"][1:] == [0, 0]


def test_a_file_of_two_sources_belongs_to_the_first(tmp_path: Path, sources: list[str]) -> None:
    mixed = shards(tmp_path / "store", source=[sources[1], f"{tmp_path}/*.jsonl"], weights=[1, 2], part_mb=1)
    assert mixed["download"].metrics["part_sources"] == [0, 1] and mixed["download"].metrics["documents"] == 300


@pytest.mark.parametrize("split", ["hash", "last"])
def test_what_shares_a_run_of_words_with_what_is_held_out_is_not_trained_on(tmp_path: Path, split: str) -> None:
    texts = prose(200)
    held = shards(tmp_path / "plain", source=written(tmp_path / "a.jsonl", texts), split=split)["split"]
    validation = bytes(i if i < 256 else 10 for i in np.load(held.local() / "validation.npy")).decode()
    words = validation.lower().replace(",", " ").replace(".", " ").split()
    twelve, thirteen = " ".join(words[20:32]), " ".join(words[20:33])
    texts[:2] = [f"It is said that «{twelve.upper()}», and more.", f"It is said that -- {thirteen.upper()}, and more."]
    made = shards(tmp_path / "b", source=written(tmp_path / "b.jsonl", texts), split=split, decontaminate=13)
    assert np.array_equal(np.load(made["split"].local() / "validation.npy"), np.load(held.local() / "validation.npy"))
    metrics = made["shard"].metrics
    assert (metrics["contaminated_documents"], metrics["contaminated_bytes"]) == (1, len(texts[1].encode()))
    assert texts[0] in trained_on(made) and texts[1] not in trained_on(made)


def test_the_mark_of_the_last_document_stays_when_the_one_that_the_split_cuts_is_left_out(tmp_path: Path) -> None:
    texts = prose(40)
    words = [f"word{i}" for i in range(400)]
    texts.append(" ".join(words[:20] + words[200:] + words[:20]))  # what is held out begins in it, and repeats it
    data = {"split": "last", "val_tokens": 300, "part_mb": 1, "model": {"seq_len": 2}}
    made = shards(tmp_path / "b", source=written(tmp_path / "a.jsonl", texts), decontaminate=13, **data)
    metrics, stream = made["shard"].metrics, "".join(f"{text}\0" for text in texts[:40])
    assert metrics["contaminated_documents"] == 1
    assert metrics["train_tokens"] + metrics["dropped_tokens"] == len(stream), "each of the others has its mark"


@pytest.mark.parametrize("pretokenized", [False, True])
def test_what_shares_words_with_a_set_that_is_scored_is_not_trained_on_and_counted_by_set(
    tmp_path: Path, pretokenized: bool
) -> None:
    texts, one, other = prose(200), prose(3, seed=7), prose(3, seed=8)
    (tmp_path / "lines.txt").write_text("".join(text.replace(",", " ,") for text in one))
    written(tmp_path / "other.jsonl", other)
    texts[:4] = [f"{i} {text.lower()}" for i, text in enumerate([one[0], one[1], other[2], one[2] + other[0]])]
    rows = [list(text.encode()) for text in texts] if pretokenized else texts
    sets = [f"lm1b={tmp_path}/lines.txt", f"{tmp_path}/other.jsonl"]
    data: dict[str, Any] = {"source": written(tmp_path / "a.jsonl", rows), "pretokenized": pretokenized}
    config = tiny_config(**data, decontaminate=80 if pretokenized else 13).replace(eval={"sets": sets})
    store, said = Store(str(tmp_path / "store")), []
    for stage in ("download", "tokenizer", "split", "shard"):
        made, _ = run_stage(stage, config, store, emit=lambda kind, **told: said.append(told.get("text", "")))
    counts = made.metrics["contaminated"]
    card = json.loads((made.local() / "card.json").read_text())["left_out"]
    assert (counts["lm1b"], counts["other.jsonl"], made.metrics["contaminated_documents"]) == (3, 2, 4)
    assert (card["documents, with words of lm1b"], card["documents, with words of other.jsonl"]) == (3, 2)
    assert any("4 documents of" in text and "3 with lm1b, 2 with other.jsonl" in text for text in said)
    before = STAGES["shard"].parameters(config)
    assert before == STAGES["shard"].parameters(config) != STAGES["shard"].parameters(config.replace(eval={"sets": []}))
    written(tmp_path / "other.jsonl", other[:1])
    assert before != STAGES["shard"].parameters(config), "sets count by content"
    without = tiny_config(**data).replace(eval={"sets": sets})
    assert STAGES["shard"].parameters(without) == {"seq_len": 32}


def test_runs_of_ids_that_are_held_out_are_not_trained_on() -> None:
    data = tiny_config(pretokenized=True, decontaminate=3)
    held_out = clean.scored_runs(data, plain_bytes(), np.arange(100, 110, dtype=np.uint32))
    chosen = clean.Chosen(data.data, held_out, weight=2)
    ids = Documents(
        np.array([1, 105, 106, 107, 5, 105, 106, 105, 106, 107], np.uint16),
        np.array([0, 5, 8, 10]),
        np.zeros((3, 16), np.uint8),
    )
    kept = [document.tolist() for turn in range(chosen.turns) for batch in chosen.of([ids], turn) for document in batch]
    assert kept == [[105, 106, 105], [106, 107]] * 2
    assert (chosen.documents, chosen.counts) == (4, {"contaminated_documents": 1, "contaminated_bytes": 10})


def written(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_download_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "a.jsonl", [t for text in prose(200) for t in (text, text + "and", text)])
    config = tiny_config(source, duplicates=0.6, part_mb=0.003)
    whole = run_stage("download", config, Store(str(tmp_path / "whole")))[0]
    assert whole.metrics["cleaned"] == {"exact duplicates": 200, "near duplicates": 200}
    assert whole.metrics["documents"] == 200

    def stopping(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["done"] > 0.005:
            raise KeyboardInterrupt

    store = Store(str(tmp_path / "store"))
    with pytest.raises(KeyboardInterrupt):
        run_stage("download", config, store, emit=stopping)
    assert list(Path(store.root).glob("download/*/attempts/*/parts/part-00001*")), "it had finished parts"
    resumed = run_stage("download", config, store)[0]
    assert (resumed.digest, resumed.metrics) == (whole.digest, whole.metrics)


def test_all_of_it_at_once_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = PARAGRAPHS[:300] + PARAGRAPHS[:30] + [f"{text} Indeed." for text in PARAGRAPHS[:30]]
    texts += ["too short", "x" * 9000, GERMAN * 3, "He said: â€œSchÃ¶nâ€\x9d and went on to other things."]
    data: dict[str, Any] = {"repair": True, "min_length": 40, "max_length": 8000, "languages": ["en"]}
    data |= {"duplicates": 0.8, "decontaminate": 13, "weights": [1, 2], "val_tokens": 9000, "part_mb": 1}
    data |= {"source": [written(tmp_path / f"{i}.jsonl", texts[i::2]) for i in (0, 1)], "tokenizer": "bytes"}
    shards(tmp_path / "store", **data)
    words = [w for k, v in data.items() for w in (f"--data.{k}", *map(str, v if isinstance(v, list) else [v]))]
    with pytest.raises(SystemExit, match=r"^0$"):  # all is there, so no server is started
        main(["run", "--until", "shard", *words, "--model.seq_len", "32", "--store", f"{tmp_path}/store", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = result["metrics"]
    assert {stage["status"] for stage in result["stages"]} == {"cached"}
    counts = {"repaired": 1, "too short": 1, "too long": 1, "in other languages": 1}
    counts |= {"exact duplicates": 30, "near duplicates": 30}
    assert (metrics["cleaned"], metrics["documents"], metrics["part_sources"]) == (counts, 301, [0, 1])
    assert metrics["source_tokens"][1] > 1.5 * metrics["source_tokens"][0]
