"""The train stage: its numbers, its artifacts, and what is made of them."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

import nanodlm
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import PRESETS
from nanodlm.data import tokenizer
from nanodlm.errors import NanodlmError
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store
from tests.support.commands import speeches
from tests.support.training import MANY, tiny


@pytest.fixture
def store(models: Store) -> Store:
    return models


@pytest.fixture(scope="module")
def averaged(models: Store) -> Artifact:
    """A run with many options at once, as an average, Muon, bfloat16 and documents that do not see each other."""
    return nanodlm.train(MANY, models.uri())


def test_train_leaves_checkpoints_with_config_and_logs_beside_them(trained: Artifact) -> None:
    folder = trained.local()
    steps = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert steps == ["step_000010", "step_000012"]
    assert {"model_state", "optimizer_state"} <= {p.name for p in (folder / "checkpoints" / steps[1]).iterdir()}
    assert json.loads((folder / "config.json").read_text())["train"]["max_steps"] == 12
    logs = json.loads((folder / "logs.json").read_text())
    assert [record["step"] for record in logs] == [3, 6, 9, 12]
    assert 0 <= logs[-1]["waiting_share"] == trained.metrics["waiting_share"] < 1


def test_train_finds_a_finished_run_again(trained: Artifact, store: Store) -> None:
    assert nanodlm.train(tiny(), store.uri()).manifest == trained.manifest


def test_load_gives_back_the_parameters_that_were_recorded(trained: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        model, encoding = nanodlm.load(trained.uri)
    assert not caplog.records, "libraries warn of nothing"
    assert parameters_sha256(nnx.to_pure_dict(nnx.state(model))) == trained.metrics["parameters_sha256"]
    assert encoding.n_vocab == 257
    assert model(jnp.full((1, 32), 257), jnp.ones(1)).shape == (1, 32, 384)


def test_load_takes_a_checkpoint_folder_and_refuses_what_is_no_model(trained: Artifact, store: Store) -> None:
    assert nanodlm.load(f"{store.uri()}/train/{trained.fingerprint[:8]}")
    early, _ = nanodlm.load(str(trained.local() / "checkpoints" / "step_000010"))
    final, _ = nanodlm.load(trained.uri)
    assert not np.array_equal(early.embedding.embedding[...], final.embedding.embedding[...])
    with pytest.raises(NanodlmError, match="no model"):
        nanodlm.load("nonsense")
    download = next(fingerprint for stage, fingerprint in store if stage == "download")
    with pytest.raises(NanodlmError, match="made before any model"):
        nanodlm.load(store.uri("download", download))


def test_the_average_of_the_parameters_is_what_load_returns_in_float32(averaged: Artifact) -> None:
    model, _ = nanodlm.load(averaged.uri)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    assert (next((averaged.local() / "checkpoints").iterdir()) / "ema_state").is_dir()
    assert parameters_sha256(nnx.to_pure_dict(nnx.state(model))) == averaged.metrics["parameters_sha256"]


@pytest.mark.slow
def test_the_owt_path_trains_on_pretokenised_parquet_rows_of_gpt2_ids(tmp_path: Path) -> None:
    """The same code as preset owt, on local files of the hub data set's schema: uint16 rows of 1024 ids."""
    encoding = tokenizer.gpt2()
    ids = [i for path in speeches(3) for i in [*encoding.encode_ordinary(Path(path).read_text()), encoding.eot_token]]
    rows = np.array(ids[: len(ids) // 1024 * 1024], np.uint16).reshape(-1, 1024)
    for part, chunk in enumerate(np.array_split(rows, 2)):
        column = pa.array(list(chunk), pa.list_(pa.uint16()))
        pq.write_table(pa.table({"tokens": column}), tmp_path / f"train-{part:05d}-of-00002.parquet")
    config = PRESETS["owt"].replace(
        data={"source": str(tmp_path / "*.parquet"), "val_tokens": 2000},
        model={"n_layers": 1, "n_heads": 2, "d_model": 8, "d_ff": 16},
        train={"batch_size": 2, "grad_acc_steps": 2, "max_steps": 2, "warmup_steps": 1, "ema_decay": 0.5},
        eval={"batch_size": 2},
    )
    store = Store(str(tmp_path / "store"))
    run = nanodlm.train(config, store.uri())
    model, loaded = nanodlm.load(run.uri)
    assert (loaded.n_vocab, model.embedding.num_embeddings) == (50257, 50304)
    shard = store.open(f"shard/{run.manifest['inputs']['shard']['fingerprint']}")
    assert shard.metrics["val_tokens"] == 2000
    assert shard.metrics["val_rows"] == 2, "one whole row of 1024 and one of 976"
    result, _ = stages_run.run_stage("evaluate", config, store)
    # Two updates leave the output layer close to its start at zero, where every token has probability 1/50257.
    assert math.isclose(result.metrics["val_nats_per_token"], math.log(50257), rel_tol=0.02)
    assert result.metrics["scored_tokens"] == 2000


def test_with_the_weights_of_the_bound_the_loss_is_the_bound_which_evaluate_finds_too(
    averaged: Artifact, store: Store
) -> None:
    logs = json.loads((averaged.local() / "logs.json").read_text())
    assert logs and all(math.isclose(r["loss"], r["nats_per_token"], rel_tol=1e-5) for r in logs)
    artifact, _ = stages_run.run_stage("evaluate", MANY, store)
    assert abs(artifact.metrics["val_nats_per_token"] - logs[-1]["nats_per_token"]) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "block", "block_size": 5},
        {"kind": "autoregressive"},
        {"kind": "hybrid", "weighting": "clipped"},
        {"kind": "uniform"},
        {"kind": "absorbing", "estimator": "constant_count", "weighting": "clipped", "times": "stratified"},
    ],
    ids=lambda objective: objective["kind"],
)
def test_every_objective_trains_evaluates_and_writes_after_a_prompt(store: Store, objective: dict[str, Any]) -> None:
    causal = objective["kind"] in ("block", "autoregressive")
    # Models that write from left to right take a prompt that is longer than a row.
    prompt, length = ("Fellow citizens of the Senate and of the House, ", 60) if causal else ("The people of these", 32)
    sample = {"prompt": prompt, "length": length, "top_k": 50, "top_p": 0.95}
    config = tiny(objective=objective, sample=sample, schedule={"kind": "cosine"})
    run = nanodlm.train(config, store.uri())
    assert 3 < run.metrics["train_nats_per_token"] < 8
    result, _ = stages_run.run_stage("evaluate", config, store)
    error = result.metrics["val_nats_per_token_stderr"]
    assert abs(result.metrics["val_nats_per_token"] - 4.2) < 0.5 + 4 * error
    drawn, _ = stages_run.run_stage("sample", config, store)
    tokens = np.load(drawn.local() / "tokens.npy", allow_pickle=False)
    assert tokens.shape == (2, length)
    assert tokens.max() < 257
    assert all(bytes(row[: len(prompt)].tolist()) == prompt.encode() for row in tokens)


def test_documents_in_rows_are_trained_on_scored_and_written_up_to_their_end(store: Store) -> None:
    data = {"rows": "document", "variable_share": 0.5, "sample_by": "line", "source": speeches(6), "val_tokens": 5000}
    config = tiny(data=data, sample={"num_samples": 64}, exp={"val_rows": 4}, eval={"max_rows": None})
    run = nanodlm.train(config, store.uri())
    shard = store.open(f"shard/{run.manifest['inputs']['shard']['fingerprint']}").metrics
    assert run.metrics["trained_tokens"] == round(48 * shard["train_tokens"] / shard["train_rows"]) < 48 * 32
    found = {name: stages_run.run_stage(name, config, store)[0] for name in ("evaluate", "sample", "report")}
    m = found["evaluate"].metrics
    assert (m["scored_tokens"], m["scored_bytes"]) == (shard["val_tokens"], shard["val_bytes"])
    assert m["scored_documents"] == m["scored_rows"] == shard["val_rows"]
    drawn = np.load(found["sample"].file("tokens.npy")).tolist()
    texts = [json.loads(line)["text"] for line in found["sample"].file("samples.jsonl").read_text().splitlines()]
    assert texts == [bytes(row[: [*row, 256].index(256)]).decode(errors="replace") for row in drawn]
    assert any(256 in row for row in drawn)
    assert "given how long each text is" in " ".join(found["report"].file("report.md").read_text().split())
