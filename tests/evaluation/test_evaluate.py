"""The bound of held-out text, its units and its standard error."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanodlm
from nanodlm.build import make_model
from nanodlm.data import rows as data_rows
from nanodlm.data import tokenizer
from nanodlm.data.shard import token_counts
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.evaluation import evaluate
from nanodlm.evaluation.report import named
from nanodlm.model.transformer import segments
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store
from tests.support.commands import speeches
from tests.support.training import tiny


def test_evaluation_of_a_model_that_scores_all_tokens_alike_is_the_uniform_bound() -> None:
    config, encoding = tiny(model={"tie_embeddings": False}), tokenizer.plain_bytes()
    rows = list(np.random.default_rng(0).integers(0, 257, (20, 32)))
    # The output layer starts at zero: log 257 nats per token, whatever the noise.
    untrained = make_model(config, Vocabulary.of(encoding))
    text = evaluate.Text(rows, np.zeros(20, int), rows, np.zeros((20, 2), int))
    metrics, drawn = evaluate.score(untrained, encoding, text, config.eval, counts=np.ones(257, int))
    assert math.isclose(metrics["nats_per_token"], math.log(257), rel_tol=1e-4)
    assert metrics["nats_per_token"] == pytest.approx(drawn.nats.mean())
    assert metrics["perplexity"] == pytest.approx(257, rel=1e-3)
    assert (metrics["rows"], metrics["tokens"]) == (20, 640)
    assert (metrics["documents"], metrics["stderr_over"]) == (1, "rows")
    assert math.isclose(metrics["unigram_nats_per_token"], math.log(257))


def test_units_are_converted_by_the_bytes_of_the_same_tokens(trained: Artifact, models: Store) -> None:
    artifact, _ = stages_run.run_stage("evaluate", tiny(), models)
    m = artifact.metrics
    assert m["val_bits_per_character"] * m["scored_characters"] == pytest.approx(
        m["val_bits_per_byte"] * m["scored_bytes"]
    )
    bits = m["val_nats_per_token"] * m["scored_tokens"] / math.log(2) / m["scored_bytes"]
    assert math.isclose(m["val_bits_per_byte"], bits)
    assert m["val_bits_per_byte_stderr"] > 0
    assert m["val_unigram_nats_per_token"] < math.log(257)


def test_more_noise_draws_shrink_the_standard_error(trained: Artifact, models: Store) -> None:
    one, _ = stages_run.run_stage("evaluate", tiny(eval={"max_rows": None}), models)
    many, _ = stages_run.run_stage("evaluate", tiny(eval={"max_rows": None, "repeats": 4}), models)
    assert many.metrics["val_bits_per_byte_stderr"] < one.metrics["val_bits_per_byte_stderr"]
    difference = abs(many.metrics["val_nats_per_token"] - one.metrics["val_nats_per_token"])
    assert difference < 5 * one.metrics["val_nats_per_token_stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
def test_an_autoregressive_models_evaluated_number_is_minus_log_p_of_all_rows(models: Store, isolated: bool) -> None:
    data = {"isolate_documents": isolated, "source": speeches(6), "val_tokens": 1010}
    config = tiny(data=data, objective={"kind": "autoregressive"}, eval={"max_rows": None})
    run = nanodlm.train(config, models.uri())
    result, _ = stages_run.run_stage("evaluate", config, models)
    model, encoding = nanodlm.load(run.uri)
    shard = models.open(f"shard/{run.manifest['inputs']['shard']['fingerprint']}")
    rows = data_rows.read(shard.local() / "validation.arrayrecord", shard.metrics["dtype"])
    assert [len(row) for row in rows[-2:]] == [32, 1010 % 32]
    total, options = 0.0, {"schedule": make_schedule("linear"), "mask_id": 257, "objective": "autoregressive"}
    for batch in (np.stack(rows[:-1]), rows[-1][None]):
        x_0 = jnp.asarray(batch)
        edges = segments(x_0, encoding.n_vocab - 1) if isolated else None
        total += nanodlm.nelbo(model, x_0, jax.random.key(0), **options, segment_ids=edges).sum()
    assert result.metrics["val_nats_per_token"] == pytest.approx(float(total) / 1010, rel=1e-5)


def test_further_sets_are_scored_and_count_by_content_and_every_row_is_kept(
    trained: Artifact, models: Store, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(
            '{"text": "“One two,” he said "}\n{"text": "three"}\n' * 20 + '{"text": null}\n'
        )
    held_out, _ = stages_run.run_stage("evaluate", tiny(), models)
    configs = [
        tiny(data={"max_bad": 0.05}, eval={"sets": f"lambada={tmp_path}/{name}/test.jsonl"}) for name in ("a", "b")
    ]
    made = [stages_run.run_stage("evaluate", config, models)[0] for config in configs]
    assert made[0].fingerprint == made[1].fingerprint != held_out.fingerprint
    (found,) = made[0].metrics["sets"]
    assert (found["file"], found["documents"], found["rows"]) == ("lambada", 40, 17)
    assert (found["left_out"], named(found)) == ({"null": 1}, "lambada (left out: 1 null)")
    assert found["bits_per_byte_interval"][0] < found["bits_per_byte"] < found["bits_per_byte_interval"][1]
    table = np.load(made[0].file("rows.npy"))
    assert {**made[0].metrics, "sets": []} == held_out.metrics
    for number, m in enumerate([{k[4:]: v for k, v in made[0].metrics.items()}, found]):
        rows = table[table["set"] == number]
        assert rows["nats"].sum() / rows["tokens"].sum() == pytest.approx(m["nats_per_token"])
        assert len(rows) == (20, 17)[number]


def test_fewer_rows_are_spread_over_the_whole_split(trained: Artifact, models: Store) -> None:
    artifact, _ = stages_run.run_stage("evaluate", tiny(eval={"max_rows": 3}), models)
    shard = models.open(f"shard/{trained.manifest['inputs']['shard']['fingerprint']}")
    rows = data_rows.read(shard.local() / "validation.arrayrecord", shard.metrics["dtype"])
    tokens = np.concatenate([rows[0], rows[round((len(rows) - 1) / 2)], rows[-1]])
    unigram = evaluate.unigram_nats(tokens, token_counts(shard))
    assert artifact.metrics["scored_rows"] == 3
    assert artifact.metrics["val_unigram_nats_per_token"] == pytest.approx(unigram)
