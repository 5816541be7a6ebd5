"""The train stage, and evaluate and sample after it: their numbers, their artifacts."""

import json
import math
import threading
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
from nanodlm.build import make_model, make_objective
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import PRESETS, Config
from nanodlm.data import loader, tokenizer
from nanodlm.data import rows as data_rows
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.evaluation import evaluate
from nanodlm.model.transformer import segments
from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.store import Artifact, Store
from nanodlm.store.files import Storage
from tests.support.commands import speeches


def tiny(**groups: dict[str, Any]) -> Config:
    base = PRESETS["demo"].replace(
        data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
        model={"seq_len": 32, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32},
        train={"optimizer": "adamw", "max_steps": 12, "warmup_steps": 2, "cooldown_steps": 4, "batch_size": 4},
        eval={"max_rows": 20, "batch_size": 8},
        sample={"num_samples": 2, "num_steps": 4},
        exp={"save_every": 5, "log_every": 3, "val_rows": 0},
    )
    return base.replace(**groups)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def trained(store: Store) -> Artifact:
    return nanodlm.train(tiny(), store.uri())


MANY = tiny(
    data={"isolate_documents": True},
    model={"time_conditioning": True, "dtype": "bfloat16"},
    train={"ema_decay": 0.9, "optimizer": "muon"},
    objective={"estimator": "continuous", "weighting": "bound"},
)


@pytest.fixture(scope="module")
def averaged(store: Store) -> Artifact:
    """A run with many options at once, as an average, Muon, bfloat16 and documents that do not see each other."""
    return nanodlm.train(MANY, store.uri())


def test_train_leaves_checkpoints_with_config_and_logs_beside_them(trained: Artifact) -> None:
    folder = trained.local()
    steps = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert steps == ["step_000010", "step_000012"]
    assert {"model_state", "optimizer_state"} <= {p.name for p in (folder / "checkpoints" / steps[1]).iterdir()}
    assert json.loads((folder / "config.json").read_text())["train"]["max_steps"] == 12
    assert [record["step"] for record in json.loads((folder / "logs.json").read_text())] == [3, 6, 9, 12]


def test_training_begins_when_the_first_window_of_remote_shards_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other shards do not come before the first updates are done."""
    monkeypatch.setattr(loader, "WINDOW", 2)
    config, store = tiny(data={"source": speeches(24), "part_mb": 0.03}), Store("memory://first-window/store")
    for name in table.until("shard"):
        built, _ = stages_run.run_stage(name, config, store)
    first, *later = loader.windows(built.metrics["rows_per_shard"], config.data.shuffle_seed)  # type: ignore[possibly-unbound]
    assert later
    assert sum(built.metrics["rows_per_shard"][i] for i in first) > 4 * (12 + 16)  # those of updates and those prepared
    late = {data_rows.name(i) for window in later for i in window}
    begun, fetched = threading.Event(), []

    def get(self: Store, pairs: list[tuple[str, Path]]) -> None:
        names = {source.rpartition("/")[2] for source, _ in pairs}
        assert not names & late or begun.wait(120)
        fetched.extend(names)
        Storage.get(self, pairs)

    def emit(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["unit"] == "updates":
            begun.set()

    monkeypatch.setattr(Store, "get", get)
    stages_run.run_stage("train", config, store, emit=emit)
    assert begun.is_set()
    assert late & set(fetched)  # and then they are fetched ahead
    store.remove_folder(store.root)


def test_train_finds_a_finished_run_again(trained: Artifact, store: Store) -> None:
    assert nanodlm.train(tiny(), store.uri()).manifest == trained.manifest


def test_load_gives_back_the_parameters_that_were_recorded(trained: Artifact) -> None:
    model, encoding = nanodlm.load(trained.uri)
    assert parameters_sha256(nnx.to_pure_dict(nnx.state(model))) == trained.metrics["parameters_sha256"]
    assert encoding.n_vocab == 257
    assert model(jnp.full((1, 32), 257), jnp.ones(1)).shape == (1, 32, 384)


def test_load_takes_a_checkpoint_folder_and_refuses_what_is_no_model(trained: Artifact, store: Store) -> None:
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
        data={"source": str(tmp_path / "*.parquet"), "revision": "", "val_tokens": 2000},
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


def test_evaluation_of_a_model_that_scores_all_tokens_alike_is_the_uniform_bound() -> None:
    config, encoding = tiny(model={"tie_embeddings": False}), tokenizer.plain_bytes()
    rows = list(np.random.default_rng(0).integers(0, 257, (20, 32)))
    # The output layer starts at zero: log 257 nats per token, whatever the noise.
    untrained, objective = make_model(config, Vocabulary.of(encoding)), make_objective(config, Vocabulary.of(encoding))
    metrics = evaluate.score(untrained, encoding, rows, objective, config.eval)
    assert math.isclose(metrics["val_nats_per_token"], math.log(257), rel_tol=1e-4)
    assert (metrics["scored_rows"], metrics["scored_tokens"]) == (20, 640)


def test_units_are_converted_by_the_bytes_of_the_same_tokens(trained: Artifact, store: Store) -> None:
    artifact, _ = stages_run.run_stage("evaluate", tiny(), store)
    m = artifact.metrics
    bits = m["val_nats_per_token"] * m["scored_tokens"] / math.log(2) / m["scored_bytes"]
    assert math.isclose(m["val_bits_per_byte"], bits)
    assert m["val_bits_per_byte_stderr"] > 0
    assert m["val_unigram_nats_per_token"] < math.log(257)


def test_more_noise_draws_shrink_the_standard_error(trained: Artifact, store: Store) -> None:
    one, _ = stages_run.run_stage("evaluate", tiny(eval={"max_rows": None}), store)
    many, _ = stages_run.run_stage("evaluate", tiny(eval={"max_rows": None, "repeats": 4}), store)
    assert many.metrics["val_bits_per_byte_stderr"] < one.metrics["val_bits_per_byte_stderr"]
    difference = abs(many.metrics["val_nats_per_token"] - one.metrics["val_nats_per_token"])
    assert difference < 5 * one.metrics["val_nats_per_token_stderr"]


def test_samples_begin_with_the_prompt_and_repeat_for_a_seed(trained: Artifact, store: Store) -> None:
    config = tiny(sample={"prompt": "The people"})
    artifact, _ = stages_run.run_stage("sample", config, store)
    texts = [json.loads(line)["text"] for line in (artifact.local() / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 2
    assert all(text.startswith("The people") for text in texts)
    assert np.load(artifact.local() / "tokens.npy", allow_pickle=False).max() < 257  # real tokens alone
    again, _ = stages_run.run_stage("sample", config, store, rebuild=True)
    assert again.digest == artifact.digest
    other, _ = stages_run.run_stage("sample", tiny(sample={"prompt": "The people", "seed": 1}), store)
    assert other.digest != artifact.digest


def test_a_prompt_as_long_as_a_row_is_refused(trained: Artifact, store: Store) -> None:
    with pytest.raises(UsageError, match=r"shorten --sample\.prompt"):
        stages_run.run_stage("sample", tiny(sample={"prompt": "x" * 32}), store)


def test_the_report_shows_numbers_curve_and_escaped_samples(trained: Artifact, store: Store) -> None:
    config = tiny(sample={"prompt": "<b>&"})
    for name in ("evaluate", "sample", "report"):
        artifact, _ = stages_run.run_stage(name, config, store)
    page = (artifact.local() / "report.html").read_text()  # type: ignore[possibly-unbound]
    assert all(text in page for text in ("<svg", "&lt;b&gt;&amp;", "bits per byte"))
    assert "<b>&" not in page
    assert "> <b>&" in (artifact.local() / "report.md").read_text()  # type: ignore[possibly-unbound]


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


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
def test_an_autoregressive_models_evaluated_number_is_minus_log_p_of_all_rows(store: Store, isolated: bool) -> None:
    data = {"isolate_documents": isolated, "source": speeches(6), "val_tokens": 1010}
    config = tiny(data=data, objective={"kind": "autoregressive"}, eval={"max_rows": None})
    run = nanodlm.train(config, store.uri())
    result, _ = stages_run.run_stage("evaluate", config, store)
    model, encoding = nanodlm.load(run.uri)
    shard = store.open(f"shard/{run.manifest['inputs']['shard']['fingerprint']}")
    rows = data_rows.read(shard.local() / "validation.arrayrecord", shard.metrics["dtype"])
    assert [len(row) for row in rows[-2:]] == [32, 1010 % 32]
    total, options = 0.0, {"schedule": make_schedule("linear"), "mask_id": 257, "objective": "autoregressive"}
    for batch in (np.stack(rows[:-1]), rows[-1][None]):
        x_0 = jnp.asarray(batch)
        edges = segments(x_0, encoding.n_vocab - 1) if isolated else None
        total += nanodlm.nelbo(model, x_0, jax.random.key(0), **options, segment_ids=edges).sum()
    assert result.metrics["val_nats_per_token"] == pytest.approx(float(total) / 1010, rel=1e-5)
