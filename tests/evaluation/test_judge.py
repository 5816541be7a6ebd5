"""The judge: measures against their definitions, errors against repeated sets, and broken texts in the right order."""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nanodlm
from nanodlm.build import make_model
from nanodlm.checkpoints.finding import find_model
from nanodlm.cli.main import main
from nanodlm.config import twin
from nanodlm.data import rows as data_rows
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.evaluation import judge
from nanodlm.evaluation.uncertainty import interval
from nanodlm.model.transformer import Transformer
from nanodlm.stages import run as stages_run
from nanodlm.stages.lookup import look_up
from nanodlm.stages.table import NAMES, until
from nanodlm.store import Artifact, Store
from tests.support.helpers import committed
from tests.support.training import tiny

BYTES = tokenizer.plain_bytes()


def texts_of(rng: np.random.Generator, count: int, length: int = 24) -> list[np.ndarray]:
    """Texts of 12 tokens, each with frequencies of its own."""
    return [rng.choice(12, length, p=rng.dirichlet(np.ones(12))) for _ in range(count)]


def bigrams(rates: np.ndarray, **model: Any) -> Transformer:
    """An autoregressive network whose law of a token given the one before is exactly a table's; the last is of none."""
    shape = {"d_model": 512, "seq_len": 16, "conv_width": 0, "tie_embeddings": False, **model}
    network = make_model(tiny(model=shape, objective={"kind": "autoregressive"}), Vocabulary.of(BYTES))
    known, size = len(rates) - 1, len(network.embedding.embedding[...])
    before = np.zeros((size, 512))
    before[np.arange(known), np.arange(known)] = before[257, known] = 64  # the mask stands for the beginning
    scores = np.full((size, 512), 0.0)
    scores[:, : known + 1] = -30.0
    scores[:known, : known + 1] = np.log(rates.T)
    network.embedding.embedding[...] = jnp.asarray(before, jnp.float32)
    network.head.embedding[...] = jnp.asarray(scores / math.sqrt(512), jnp.float32)  # type: ignore[union-attr]
    return network  # layers add nothing before training, and the norm scales one of 512 to the root of that


def bleu(text: list[int], references: list[list[int]]) -> float:
    logs = 0.0
    for n in range(1, 5):
        grams, *others = (Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (text, *references))
        found = sum(min(count, max(other[gram] for other in others)) for gram, count in grams.items())
        logs += math.log((found or 0.1) / max(1, len(text) - n + 1)) / 4
    nearest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return math.exp(min(0.0, 1 - nearest / len(text)) + logs)


def test_measures_are_what_their_definitions_say_written_out() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 6, n) for n in (3, 9, 14, 14, 25, 2)]
    grams = [[tuple(text[i : i + 2]) for i in range(len(text) - 1)] for text in texts]
    assert judge.distinct(texts, 2) == len({gram for of in grams for gram in of}) / sum(map(len, grams))
    repeated = sum(gram in of[:i] for of in grams for i, gram in enumerate(of))
    assert judge.repetition(texts, 2) == pytest.approx(repeated / sum(map(len, grams)))
    shares = [np.array([*Counter(text.tolist()).values()]) / len(text) for text in texts]
    assert judge.entropy(texts) == pytest.approx(-np.mean([(p * np.log(p)).sum() for p in shares]))
    lists = [text.tolist() for text in texts]
    scores = [bleu(text, lists[:i] + lists[i + 1 :]) for i, text in enumerate(lists)]
    assert judge.self_bleu(texts) == pytest.approx(np.mean(scores))
    assert judge.self_bleu([texts[4]] * 3) == pytest.approx(1.0)


def test_what_is_too_short_or_too_few_has_no_number() -> None:
    short = [np.array([1, 2])]
    assert judge.with_error(judge.self_bleu, short) == (None, None)
    assert judge.with_error(judge.repetition, short * 3) == (None, None)
    found = judge.quality(short, np.zeros(0, np.uint64))
    assert (found["texts"], found["tokens"], found["copied"]) == (1, 2, None)
    assert (found["distinct_1"], found["distinct_1_stderr"]) == (1.0, None)


@pytest.mark.parametrize("count", [8, 23])
def test_intervals_of_measures_cover_the_truth_of_as_many_texts_at_the_stated_rate(count: int) -> None:
    rng = np.random.default_rng(1)
    means = {"entropy": judge.entropy, "repetition": partial(judge.repetition, n=2)}
    others = {"distinct": partial(judge.distinct, n=2), "self_bleu": judge.self_bleu}  # whose errors are too large
    found = [
        {name: judge.with_error(of, texts) for name, of in {**means, **others}.items()}
        for texts in (texts_of(rng, count) for _ in range(200))
    ]
    for name in (*means, *others):
        truth = np.mean([of[name][0] for of in found])
        intervals = [interval(*of[name], min(count, 12)) for of in found]  # type: ignore[arg-type]
        covered = sum(low <= truth <= high for low, high in intervals)
        assert 0.9 * 200 <= covered <= (0.99 * 200 if name in means else 200), name


def test_copies_are_runs_of_eight_tokens_within_a_row_of_any_shard(store: Store, tmp_path: Path) -> None:
    rng, files = np.random.default_rng(2), {}
    trained = rng.integers(0, 1000, (2, 300, 16)).astype("<u2")
    for part in range(2):
        data_rows.write(tmp_path / "rows", trained[part])
        files[data_rows.name(part)] = (tmp_path / "rows").read_bytes()
    shard = committed(store, files)
    shard.manifest["metrics"] = {"rows_per_shard": [300, 300], "dtype": "<u2"}
    within, across = trained[1, 299, 3:13], np.concatenate([trained[0, 4, -6:], trained[0, 5, :6]])
    texts = [np.concatenate([within, across]).astype(np.int32), rng.integers(0, 1000, 15)]
    known = judge.in_training(texts, shard)
    assert len(known) == 3
    assert judge.copied(texts, known) == 3 / (15 + 8)
    parts = list(data_rows.stream(shard.file(data_rows.name(1)), "<u2", tokens=16 * 7))
    assert (len(parts), len(parts[0])) == (43, 7)
    assert np.array_equal(np.concatenate(parts), trained[1])


def test_nats_are_minus_log_p_whatever_the_lengths_of_texts_and_of_the_judges_rows() -> None:
    rng = np.random.default_rng(3)
    rates = rng.dirichlet(np.ones(12), 13)
    texts = [rng.integers(0, 12, n) for n in (5, 16, 17, 1, 40, 63)]
    nats = judge.nats_of(bigrams(rates), texts, batch_size=4)
    for text, of in zip(texts, nats, strict=True):
        assert of == pytest.approx(-np.log(rates[[12, *text[:-1]], text]), rel=1e-4)
    found, all_ = judge.likelihood(nats, [2 * len(text) for text in texts]), np.concatenate(nats)
    assert found["nats_per_token"] == pytest.approx(all_.mean())
    assert found["nats_per_byte"] == pytest.approx(all_.mean() / 2)
    assert found["nats_per_byte_stderr"] == pytest.approx(found["nats_per_token_stderr"] / 2)
    assert found["perplexity"] == pytest.approx(math.exp(all_.mean()))
    assert found["text_perplexity"] == pytest.approx(np.mean([math.exp(of.mean()) for of in nats]))
    assert "nats_per_byte" not in judge.likelihood(nats)
    with pytest.raises(NanodlmError, match="nothing to judge"):
        judge.likelihood([np.zeros(0)] * 2)


def test_a_judge_that_ignores_context_scores_the_entropy_of_the_texts_exactly() -> None:
    texts = texts_of(np.random.default_rng(4), 30, length=16)
    counts = np.bincount(np.concatenate(texts), minlength=12)
    rates = np.tile((counts + 1e-9) / counts.sum(), (13, 1))
    nats = judge.nats_of(bigrams(rates), texts, batch_size=8)
    assert judge.likelihood(nats)["nats_per_token"] == pytest.approx(judge.entropy([np.concatenate(texts)]), rel=1e-5)


def test_texts_broken_in_known_ways_are_ranked_by_their_measures_together() -> None:
    rng, words = np.random.default_rng(5), np.arange(12).reshape(4, 3)  # a word is three tokens, and calls for the next
    rates = np.full((13, 12), 0.002)
    rates[[0, 1, 3, 4, 6, 7, 9, 10], [1, 2, 4, 5, 7, 8, 10, 11]] = 1.0
    for i in range(4):
        rates[3 * i + 2, [3 * ((i + 1) % 4), 3 * ((i + 2) % 4)]] = [0.8, 0.2]
    rates[12, ::3] = 0.25
    rates /= rates.sum(axis=1, keepdims=True)
    order = [(first + np.cumsum(rng.choice([1, 2], 5, p=[0.8, 0.2]))) % 4 for first in rng.integers(0, 4, 40)]
    real = [words[of].ravel() for of in order]
    broken = {
        "real": real,
        "words shuffled": [words[rng.permutation(of)].ravel() for of in order],
        "tokens shuffled": [rng.permutation(text) for text in real],
        "one word": [np.tile(words[of[0]], 5) for of in order],
    }
    network = bigrams(rates, seq_len=15)
    nats = {k: judge.likelihood(judge.nats_of(network, texts, 8)) for k, texts in broken.items()}
    likely = [nats[k]["nats_per_token"] for k in ("real", "words shuffled", "tokens shuffled")]
    errors = [nats[k]["nats_per_token_stderr"] for k in ("real", "words shuffled", "tokens shuffled")]
    assert likely[0] + 4 * errors[0] < likely[1] - 4 * errors[1] < likely[1] + 4 * errors[1] < likely[2]
    assert nats["one word"]["nats_per_token"] < likely[2], "a score alone misleads"
    spread = {k: judge.entropy(texts) for k, texts in broken.items()}
    assert spread["real"] == pytest.approx(spread["tokens shuffled"])
    assert spread["one word"] < 0.95 * spread["real"]
    assert judge.repetition(broken["one word"]) > 2 * judge.repetition(real)


def test_samples_are_measured_beside_as_much_held_out_text_and_judged_by_a_twin_that_is_reused(
    trained: Artifact, models: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(sample={"judge": "twin", "num_samples": 3, "prompt": "The"}, exp={"run_name": "mine"})
    assert until("sample") == (*NAMES, "report")
    assert until("sample", config) == until("report", config) == (*NAMES, "twin", "judge", "report")
    assert until("judge", config) == (*NAMES, "twin", "judge")
    sampled, _ = stages_run.run_stage("sample", config, models)
    for texts in (sampled.metrics["quality"][name] for name in ("samples", "held_out")):
        assert (texts["texts"], texts["tokens"]) == (3, 3 * (32 - 3))
        assert 0 < texts["entropy"] < math.log(29)
        assert texts["entropy_stderr"] > 0
    assert sampled.metrics["quality"]["held_out"]["copied"] < 1
    by_hand = nanodlm.train(tiny(objective={"kind": "autoregressive"}), models.uri())
    network, told = stages_run.run_stage("twin", config, models)
    assert (network.fingerprint, told["status"], told["stage"]) == (by_hand.fingerprint, "cached", "twin")
    judged, _ = stages_run.run_stage("judge", config, models)
    m, lines = judged.metrics, json.loads(judged.file("judge.json").read_text())
    assert sum(of["nats"] for of in lines["gen"]) / (3 * 29) == pytest.approx(m["gen_nats_per_token"])
    assert m["held_out_gen_perplexity"] == pytest.approx(math.exp(m["held_out_gen_nats_per_token"]))
    stages_run.run_stage("evaluate", config, models)
    check_report(stages_run.run_stage("report", config, models)[0], judged, network)
    assert all(lookup.artifact for lookup in look_up(config, models))
    words = [config.model_dump_json(), "--store", models.uri(), "--json", "--until"]
    for last, end in (("judge", ["twin", "judge"]), ("report", ["twin", "judge"]), ("twin", ["twin"])):
        with pytest.raises(SystemExit, match="0"):
            main(["run", *words, last])  # all is there, so no server is started
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [done["stage"] for done in told["stages"]] == [*NAMES, *end]
        assert (told["report"] is not None) == (last == "report")
    for name in ("twin", "judge"):
        with pytest.raises(SystemExit, match="0"):
            main(["plan", *words, "judge", "--rebuild", name])
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
        assert [row["stage"] for row in rows if row["action"] == "build"] == [name]
    for more in ([], ["--rebuild", "report"]):
        with pytest.raises(SystemExit, match="0"):
            main(["plan", *words[:-1], *more])
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
        assert [row["stage"] for row in rows] == [*NAMES, "twin", "judge", "report"], "as a run would go"
    named = config.replace(sample={"judge": by_hand.name})
    assert stages_run.run_stage("judge", named, models)[0].fingerprint == judged.fingerprint
    (tmp_path / "config.json").write_text(named.model_dump_json())
    for command in ("judge", "sample", "train"):
        with pytest.raises(SystemExit):
            main([command, str(tmp_path / "config.json"), "--store", models.uri(), "--json"])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["model"] == trained.uri
        assert result["stages"][0]["stage"] == command


def check_report(report: Artifact, judged: Artifact, network: Artifact) -> None:
    """The pages and the results say what the judge found, and the pages what it is."""
    m, page, plain = judged.metrics, *(report.file(name).read_text() for name in ("report.html", "report.md"))
    assert json.loads(report.file("results.json").read_text())["judge"] == m
    for side in ("gen", "held_out_gen"):
        likely = f"{m[f'{side}_nats_per_token']:.3f} ± {m[f'{side}_nats_per_token_stderr']:.3f}"
        for said in (likely, f"{m[f'{side}_perplexity']:.1f}", f"The judge is {network.name}."):
            assert said in " ".join(page.split())
            assert said in " ".join(plain.split())
    assert "twin is made from tokenizer and shard; judge is made from shard and sample and twin; report" in page
    for one in (judged, network):
        assert one.fingerprint in page
        assert one.fingerprint in plain


def test_a_judge_has_to_write_from_left_to_right_and_read_the_same_tokens(trained: Artifact, models: Store) -> None:
    with pytest.raises(UsageError, match="is absorbing, and cannot judge: name an autoregressive model"):
        list(look_up(tiny(sample={"judge": trained.uri}), models))
    shard = models.open(f"shard/{dict(trained.inputs)['shard']}")
    other = json.loads(json.dumps(shard.manifest))
    other["inputs"]["tokenizer"]["digest"] = "another"
    shard.manifest.update(other)
    with pytest.raises(UsageError, match="another tokenizer's tokens"):
        judge.check(trained, shard)


def test_the_newest_model_is_none_that_was_trained_to_judge(store: Store, trained: Artifact, models: Store) -> None:
    made = twin(tiny(exp={"run_name": "mine"}, train={"max_steps": 11}))
    assert (made.objective.kind, made.sample.judge, made.exp.run_name) == ("autoregressive", "", "mine-twin")
    newest = find_model("", models)
    network = nanodlm.train(made, models.uri())
    assert find_model("", models) == newest
    assert find_model("mine-twin", models) == network.uri
