"""The bound by token: context that is given, noise drawn to a precision, and the commands that score texts."""

import dataclasses
import html
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanodlm
from nanodlm.build import make_model
from nanodlm.cli.main import main
from nanodlm.config import ScoreConfig
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.evaluation import compare, scoring
from nanodlm.evaluation.compare import bounds
from nanodlm.evaluation.evaluate import ROW, Text, score
from nanodlm.evaluation.scoring import draw
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store
from tests.support.training import tiny, untrained

BYTES = tokenizer.plain_bytes()
MASK = 257


@pytest.mark.parametrize("objective", [{"kind": "absorbing"}, {"kind": "block", "block_size": 4}])
def test_what_is_given_is_context_and_the_bound_is_on_the_rest(objective: dict[str, Any]) -> None:
    model, row = untrained(**objective), np.array([40, 50, 60, 70], np.int32)
    options = {"context": jnp.asarray(row)[None]} if model.block_size else {}
    expected = 0.0
    for n in (1, 2):  # of the two last tokens, so many are masked, each subset as often
        subsets = list(itertools.combinations((2, 3), n))
        for masked in subsets:
            x_t = jnp.asarray(row).at[jnp.array(masked)].set(MASK)[None]
            log_p = jax.nn.log_softmax(model(x_t, jnp.zeros((1, 1)), **options)[0, :, :MASK])
            expected -= sum(float(log_p[i, row[i]]) for i in masked) / n / len(subsets)
    copies, options = [row] * 64, ScoreConfig(batch_size=64, repeats=40)
    nats, by_row, error, _ = draw(model, copies, np.full(64, 2), options)
    assert (nats.shape, by_row.shape) == ((128,), (40, 64))
    assert nats.sum() == pytest.approx(by_row.sum(axis=1).mean())
    assert error is not None
    assert abs(nats.sum() - 64 * expected) < 4 * error + 1e-3
    assert 0 < error < 0.1 * nats.sum()


@pytest.mark.parametrize("of", [{}, {"group": 3}, {"kind": "block", "block_size": 3}, {"kind": "autoregressive"}])
def test_the_output_layer_leaves_out_no_position_that_is_scored(of: dict[str, Any], monkeypatch: Any) -> None:
    group = of.pop("group", 1)
    model, rows = untrained(**of), np.random.default_rng(0).integers(0, MASK, (16, 32), dtype=np.int32)
    given, keys = np.arange(16) % 5 * (np.arange(16) > 8), [jax.random.key(i) for i in range(4)]
    found = [scoring.make_scorer(model, group)(nnx.state(model), rows, given, key).nats for key in keys]
    most = scoring._most_scored(dataclasses.replace(model.objective, group=group), jnp.asarray(rows))
    assert most < 0.8 * rows.size or model.block_size == 1
    monkeypatch.setattr(scoring, "_most_scored", lambda _, x_0: x_0.size)
    scoring._scorer.cache_clear()
    for key, nats in zip(keys, found, strict=True):
        whole = scoring.make_scorer(model, group)(nnx.state(model), rows, given, key).nats
        np.testing.assert_allclose(nats, whole, rtol=1e-5, atol=1e-5)
    scoring._scorer.cache_clear()


def test_texts_in_rows_of_one_length_share_one_program(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = untrained(), [np.arange(11, dtype=np.int32) + i for i in range(5)]
    with jax.log_compiles():
        for n in (5, 3):
            draw(model, rows[:n], np.zeros(n, int), ScoreConfig(batch_size=4))
    assert caplog.text.count("Finished XLA compilation of jit(nats_per_token)") == 1


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid", "block", "autoregressive"])
def test_every_kind_charges_nothing_for_what_is_given(kind: str) -> None:
    rows, given = list(np.random.default_rng(0).integers(0, 257, (6, 8), dtype=np.int32)), np.array([0, 3, 5, 7, 2, 1])
    nats, _, error, _ = draw(untrained(kind=kind, block_size=3), rows, given, ScoreConfig(batch_size=4))
    assert len(nats) == 48 - given.sum()
    assert np.isfinite(nats).all()
    assert error == (0.0 if kind == "autoregressive" else None)


def test_a_stride_gives_an_autoregressive_model_more_context_and_scores_every_token_once() -> None:
    model, tokens = untrained(kind="autoregressive"), np.random.default_rng(0).integers(0, 256, 21, dtype=np.int32)
    text = Text.cut(tokens, 8, 256, ScoreConfig(stride=3))
    assert np.array_equal(np.concatenate(text.scored), tokens)
    assert {len(row) for row in text.rows} == {8}
    nats = draw(model, text.rows, text.given, ScoreConfig(batch_size=8)).nats
    row = tokens[6:14]  # scores 11 to 13, given 6 to 10
    x = jnp.concatenate([jnp.array([MASK]), row[:-1]])[None]
    log_p = jax.nn.log_softmax(model(x, jnp.zeros((1, 8)))[0, :, :MASK])
    assert nats[11:14] == pytest.approx([-float(log_p[i, row[i]]) for i in (5, 6, 7)], rel=1e-4)


@pytest.mark.parametrize(("length", "stride"), [(5, None), (8, 2), (9, 2), (24, 8), (31, 5), (32, 7)])
def test_rows_cover_a_text_once(length: int, stride: int | None) -> None:
    tokens = np.where(np.arange(length) % 6 == 5, 256, 1)
    text = Text.cut(tokens, 8, 256, ScoreConfig(stride=stride))
    assert np.array_equal(np.concatenate(text.scored), tokens)
    assert np.array_equal(text.of_tokens(256), np.arange(length) // 6)
    assert stride is None or {len(part) for part in text.scored[1:-1]} <= {stride}


@pytest.mark.parametrize("kind", ["absorbing", "autoregressive"])
def test_a_model_that_ignores_context_scores_the_unigram_entropy(kind: str) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, 257)
    tokens = rng.choice(257, 2000, p=counts / counts.sum()).astype(np.int32)
    shape = {"seq_len": 8, "tie_embeddings": False, "conv_width": 0}
    model = make_model(tiny(model=shape, objective={"kind": kind}), Vocabulary.of(BYTES))
    model.embedding.embedding[...] = jnp.ones_like(model.embedding.embedding[...])  # all positions look alike
    table = model.head.embedding  # type: ignore[union-attr]
    rates = np.full(len(table[...]), 1.0)
    rates[:257] = counts + 1
    table[...] = jnp.zeros_like(table[...]).at[:, 0].set(jnp.log(rates))
    options = ScoreConfig(precision=0.02)
    text = Text.cut(tokens, 8, 256, options)
    metrics, _ = score(model, BYTES, text, options, counts=counts)
    error = metrics["noise_stderr"]
    assert abs(metrics["bits_per_byte"] - metrics["unigram_bits_per_byte"]) < 4 * error + 1e-5
    assert error <= 0.02
    assert (metrics["draws"] > 1, error > 0) == ((kind == "absorbing",) * 2)


def test_score_prints_units_and_errors_and_the_documents_add_up(
    trained: Artifact, models: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["score", *words, "--store", models.uri()])
        said = capsys.readouterr()
        return said.out if ended.value.code == 0 else said.err

    text, lines = tmp_path / "some.txt", tmp_path / "of_each.jsonl"
    text.write_text("The people of the United States\n" * 20 + "\n")
    found = json.loads(run(str(text), "--sample_by", "line", "--per_document", str(lines), "--json").splitlines()[-1])
    (m,) = found["sets"]
    documents = [json.loads(line) for line in lines.read_text().splitlines()]
    assert (len(documents), m["file"], m["documents"], m["left_out"]) == (20, str(text), 20, {"empty": 1})
    assert sum(d["bytes"] for d in documents) == m["bytes"] == 31 * 20
    assert sum(d["nats"] for d in documents) / math.log(2) / m["bytes"] == pytest.approx(m["bits_per_byte"])
    said = run(trained.uri, str(text), f"wikitext2={text}", "--stride", "8", "--repeats", "2")
    for words in (
        "bits per byte (95%",
        "nats per token, perplexity",
        "2 draws, its noise ±",
        "the last 8 given",
        "29.41",
    ):
        assert words in said
    assert "name a file to score" in run(trained.uri)
    assert "no recipe 'nothing': choose lambada" in run(f"nothing={text}")
    assert "there is no missing.txt to score" in run("missing.txt")
    text.with_suffix(".jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    assert run(f"{tmp_path}/some.jsonl").rstrip().endswith("or raise --max_bad (0.01)")
    said = run(f"{tmp_path}/some.jsonl", "--max_bad", "0.5")
    assert "1 document, 1 row, 1 draw" in said
    assert f"left out 1 without 'text' of 2 rows (file://{tmp_path}/some.jsonl:2: without 'text')" in said
    assert "set --column" in run(f"{tmp_path}/some.jsonl", "--column", "title")
    assert "a stride of 33 leaves out tokens: rows have 32" in run(str(text), "--stride", "33")


def table(rng: np.random.Generator, levels: np.ndarray) -> np.ndarray:
    """Rows of two documents each, half of which share their last document with the next one's first."""
    rows = np.zeros(len(levels), ROW)
    rows["tokens"] = rows["bytes"] = 10
    rows["first"], rows["last"] = np.arange(len(rows)) // 2, (np.arange(len(rows)) + 1) // 2
    rows["nats"] = levels + rng.normal(0.0, 1.0, len(rows))
    return rows


def test_differences_of_paired_rows_are_called_significant_at_the_stated_rate_and_found_when_they_are_small() -> None:
    rng, called, found = np.random.default_rng(0), 0, 0
    for _ in range(200):
        levels = rng.normal(30.0, 10.0, 40)  # how hard a row is to every model
        first, second, worse = table(rng, levels), table(rng, levels), table(rng, levels + 1.0)
        called += bounds(first, second)["p"] < 0.05
        found += bounds(first, worse)["p"] < 0.05
    assert 2 <= called <= 20
    assert found > 150
    longer = second.copy()
    longer["bytes"] += 1
    unpaired = bounds(first, longer)
    assert not unpaired["paired"]
    assert unpaired["difference_stderr"] > 3 * bounds(first, second)["difference_stderr"]


def test_compare_says_what_two_runs_differ_in(
    trained: Artifact, models: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = {"train": {"max_steps": 14}, "exp": {"run_name": "longer"}}
    other = nanodlm.train(tiny(**longer), models.uri())
    for config in (tiny(), tiny(**longer)):
        stages_run.run_stage("evaluate", config, models)
    stages_run.run_stage("evaluate", tiny(eval={"seed": 5}), models)  # the newest, which the other run has not
    page = tmp_path / "page.html"
    for words in (["--json"], ["--html", str(page)]):
        with pytest.raises(SystemExit):
            main(["compare", trained.uri, "longer", "--store", models.uri(), *words])
    *_, last = said = capsys.readouterr().out.splitlines()
    (found,) = json.loads(said[0])["comparisons"]
    assert (found["settings"], found["data"], found["code"]) == ({"train.max_steps": "12 -> 14"}, [], [])
    (bound,) = found["bounds"]
    metrics = compare.made_from(other)["evaluate"][-1].metrics
    assert (bound["paired"], bound["set"]) == (True, "held out")
    assert bound["bits_per_byte"][1] == pytest.approx(metrics["val_bits_per_byte"])
    assert "  same data, same code" in said
    assert any("rows in pairs" in line for line in said)
    assert last == f"the page is {page}"
    shown = page.read_text()
    for text in ("On held out text, longer", "train.max_steps", f'<th scope="col">{trained.name}</th>'):
        assert text in shown
    assert shown.count("<svg") == 2
    assert not re.search(r"https?://|\bsrc=", shown)
    with pytest.raises(SystemExit):
        main(["compare", trained.uri, "longer", "--store", models.uri(), "--html", str(tmp_path / "no" / "page.html")])
    assert "there is no folder" in capsys.readouterr().err


def test_bounds_of_other_layouts_or_missing_ones_are_not_compared(trained: Artifact, models: Store) -> None:
    alone = {"train": [trained], "evaluate": [], "sample": []}
    assert f"no whole evaluation of {trained.name} and {trained.name}" in compare.compare(alone, alone)["not_compared"]
    data = {**trained.manifest["config"]["data"], "rows": "document"}
    manifest = {**trained.manifest, "config": {**trained.manifest["config"], "data": data}}
    other = {**alone, "train": [dataclasses.replace(trained, manifest=manifest)]}
    found = compare.compare(alone, other)
    assert (found["bounds"], found["not_compared"]) == ([], "rows are document and stream: bounds of other questions")


def test_runs_without_an_evaluation_are_compared_on_a_page_as_well(trained: Artifact) -> None:
    alone = {"train": [trained], "evaluate": [], "sample": []}
    found = compare.compare(alone, alone)
    shown = compare.page([alone, alone], [found])
    assert html.escape(found["not_compared"].replace("`", "")) in shown
    assert shown.count('<td class="n">–</td><td class="n">–</td>') == 2, "neither a bound nor its interval"


def test_settings_that_differ_are_written_as_in_a_file_and_a_dash_is_what_a_run_does_not_have(
    trained: Artifact,
) -> None:
    runs = []
    for values in ({"a": None, "b": [1, 2], "c": ""}, {"a": 0.5, "b": True, "d": None}):
        manifest = {**trained.manifest, "config": {**trained.manifest["config"], "eval": values}}
        runs.append({"train": [dataclasses.replace(trained, manifest=manifest)], "evaluate": [], "sample": []})
    shown = compare.page(
        runs, [{**compare.compare(*runs), "settings": dict.fromkeys("eval.a eval.b eval.c eval.d".split(), "")}]
    )
    rows = re.findall(r'<th scope="row">eval.(\w)</th><td>(.*?)</td><td>(.*?)</td>', shown)
    assert rows == [("a", "null", "0.5"), ("b", "[1, 2]", "true"), ("c", "&#39;&#39;", "–"), ("d", "–", "null")]
