"""The train stage: the loop around the jitted `update.train_step`.

    nanodlm train demo --train.max_steps 200      # a laptop: a minute
    nanodlm train owt --train.batch_size 64       # one or many GPUs: the batch is shared by all devices

The device always has work: rows are read ahead in a thread, those of the next update are sent while one is computed,
and numbers are fetched an update late. Step k's rows and noise depend on the seeds and k alone, so a resumed run
repeats an uninterrupted one bit for bit. What is not finite is never saved: a run that diverges stops, and names the
checkpoint from which it can go on.
"""

import contextlib
import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from nanodlm.build import make_objective
from nanodlm.checkpoints.identity import describe_run
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.checkpoints.saving import Checkpoints, State
from nanodlm.config import Config, differences
from nanodlm.data import rows as data_rows
from nanodlm.data.loader import train_batches, windows
from nanodlm.data.rows import read
from nanodlm.data.tokenizer import load, save
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.devices.hosts import any_process, from_leader, my_share, put_rows
from nanodlm.devices.mesh import make_mesh
from nanodlm.errors import NanodlmError, Stopped, UsageError
from nanodlm.evaluation.scoring import make_scorer, score_rows
from nanodlm.store import Artifact, Attempt
from nanodlm.store.cache import cache_dir
from nanodlm.training.logger import _Logger
from nanodlm.training.signals import _agreement, _catch_signals
from nanodlm.training.step import make_program
from nanodlm.training.trackers import Tracker


def train(
    config: Config,
    inputs: dict[str, Artifact],
    attempt: Attempt | None,
    emit: Callable[..., None] = lambda *_, **__: None,
) -> dict[str, Any]:
    """Stage: train for `max_steps` updates, from the newest whole checkpoint if an earlier attempt left one, else from
    that of `exp.resume_path`.

    Writes `checkpoints/`, `config.json`, `logs.json` and, as it goes, `logs.jsonl`, `tokenizer/` and `parameters.json`
    into the attempt. Of several processes the first has the attempt; the others are given None, and take part.

    Raises:
        Stopped: After SIGTERM or SIGUSR1: the update was finished and a checkpoint saved.
        UsageError: When the checkpoint to continue from is missing or of another run.
        NanodlmError: When the loss is not a number or explodes; the last good checkpoint is named.
    """
    with _catch_signals() as stop:
        return _train(config, inputs, attempt, emit, stop)


def _train(
    config: Config,
    inputs: dict[str, Artifact],
    attempt: Attempt | None,
    emit: Callable[..., None],
    stop: threading.Event,
) -> dict[str, Any]:
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    _check_same({**config.model_dump(mode="json"), "inputs": digests, "jax": jax.__version__})
    shard = inputs["shard"].on_demand()
    tokens = inputs["shard"].metrics
    encoding = load(inputs["tokenizer"].local())
    rows_per_step = config.train.batch_size * config.train.grad_acc_steps
    mesh = make_mesh(config.train.batch_size, fsdp=config.train.fsdp, tensor=config.train.tensor)
    vocabulary = Vocabulary.of(encoding)
    program = make_program(config, vocabulary, mesh)
    if tokens["n_vocab"] != vocabulary.size:
        raise NanodlmError("the shards were made with another tokenizer: rebuild them with --rebuild shard")
    if attempt:
        (attempt.path / "config.json").write_text(config.model_dump_json(indent=1))
        (attempt.path / "tokenizer").mkdir()
        save(encoding, attempt.path / "tokenizer")
    key = jax.random.key(config.train.seed)
    run = describe_run(config, inputs["shard"].digest, inputs["tokenizer"].digest, key)
    validate = _validation(config, vocabulary, program.graphdef, shard, tokens["dtype"], mesh)
    kept = {"keep": config.exp.keep, "keep_best": config.exp.keep_best}
    with (
        jax.set_mesh(mesh),
        contextlib.ExitStack() as late,
        Checkpoints(attempt, run, **kept) as checkpoints,
    ):
        restored = _restore(config, checkpoints, program.state)
        info = restored[1] if restored else {"logs": [], "rows_seen": 0}
        tracker = None
        if attempt:
            run_id, file = attempt.fingerprint[:16], attempt.path / "logs.jsonl"
            tracker = Tracker(config, file, run_id=run_id, folder=cache_dir(), records=info["logs"], emit=emit)
            late.enter_context(tracker)  # closed once the last checkpoint is safe
        state = restored[0] if restored else program.initialise()
        first, since = int(state["step"]), int(state["step"])
        shift = info["rows_seen"] - first * rows_per_step  # 0, unless the batch size was allowed to change
        emit("message", text=_describe(mesh, program.n_parameters, first))
        share, shares = my_share(mesh)
        late.callback(_fetch_ahead(tokens["rows_per_shard"], shard, config.data.shuffle_seed).set)
        batches = train_batches(
            tokens["rows_per_shard"],
            shard,
            dtype=tokens["dtype"],
            batch_size=config.train.batch_size,
            grad_acc_steps=config.train.grad_acc_steps,
            seed=config.data.shuffle_seed,
            first_row=info["rows_seen"],
            share=share,
            shares=shares,
        )
        limit = 10 * math.log(vocabulary.size)
        logger = _Logger(config, info["logs"], emit, tracker, limit=limit, last_good=checkpoints.last)
        if any_process(stop.is_set()):
            raise Stopped(f"stopped by a signal after update {first}, before another: run again to continue")
        signalled = _agreement(mesh, stop)
        for step in range(first + 1, config.train.max_steps + 1):
            state, scalars = program.step(state, put_rows(mesh, next(batches), axis=1), key)
            if step == first + 1:
                jax.block_until_ready(scalars)  # compiled; from here on the clock runs
                logger.start(step)
            logger.flush()  # the record of the update before, while this one is computed
            last, stopping = step == config.train.max_steps, signalled(scalars)
            saving = step % config.exp.save_every == 0 or last or stopping
            scored: dict[str, Any] = {}
            if saving:
                logger.check(step, scalars, state)
                if validate and not stopping:  # a signal leaves no time for it
                    scored = logger.off_the_clock(validate, state)
            if step % config.exp.log_every == 0 or last:
                logger.add(step, {**scalars, **scored})
            if saving:
                logger.flush()  # this update is done, for its state has been checked
                if not (validate or stopping):
                    scored = logger.mean_bound(since, step)
                seen = step * rows_per_step + shift
                checkpoints.save(state, step, logs=list(logger.records), rows_seen=seen, **scored)
                since = step
                emit("checkpoint", step=step)
            if stopping and not last:
                checkpoints.finish()
                raise Stopped(f"stopped by a signal after update {step}; a checkpoint is saved: run again to continue")
        logger.stop(config.train.max_steps)
        checkpoints.finish()
        best = checkpoints.best()
    final = state.get("ema_state", state["model_state"])
    result = {"parameters_sha256": parameters_sha256(final), "updates": config.train.max_steps}
    if attempt:
        (attempt.path / "logs.json").write_text(json.dumps(logger.records, indent=1))
        identity = {**result, **config.model_dump(include={"model", "schedule", "objective"})}
        (attempt.path / "parameters.json").write_text(json.dumps(identity, indent=1))
        for leftover in (attempt.path / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)
    return {
        **result,
        "parameters": program.n_parameters,
        "trained_tokens": (config.train.max_steps * rows_per_step + shift) * config.model.seq_len,
        "train_tokens_per_second": round(logger.tokens_per_second, 1),
        "train_loss": logger.records[-1]["loss"],
        "train_nats_per_token": logger.records[-1]["nats_per_token"],
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "resumed_from_update": first,
        "best_update": best,
        **({"skipped": int(state["skipped"])} if "skipped" in state else {}),
    }


def _check_same(run: dict[str, Any]) -> None:
    """Make sure that all processes train the same; they would hang, or publish something else than they say.

    Raises:
        UsageError: On all of them, with what differs on this one.
    """
    differ = differences(from_leader(run), json.loads(json.dumps(run)))
    if any_process(bool(differ)):
        fields = "; ".join(f"{field}: {values}" for field, values in differ.items())
        here = f"process {jax.process_index()} has {fields}" if differ else "another one says what differs"
        raise UsageError(f"the processes were not started alike ({here}): give all the same flags and versions")


def _restore(config: Config, checkpoints: Checkpoints, target: State) -> tuple[State, dict[str, Any]] | None:
    """The state to continue from and what its checkpoint remembers; None is to start anew."""
    exp = config.exp
    restored = checkpoints.restore(target, exp.allow_changed) if exp.resume else None
    if restored is None and exp.resume_path:
        restored = checkpoints.start(exp.resume_path, target, exp.allow_changed)
        if int(restored[0]["step"]) >= config.train.max_steps:
            raise UsageError(f"{exp.resume_path} has all {config.train.max_steps} updates: raise --train.max_steps")
    return restored


def _fetch_ahead(rows_per_shard: list[int], shard: Callable[[str], Path], seed: int) -> threading.Event:
    """Ask for all shards in the order in which they are read, beside the training; the event ends that.

    The loader asks for those that are late itself, and raises what goes wrong.
    """
    ended = threading.Event()

    def fetch() -> None:
        for number in (i for window in windows(rows_per_shard, seed) for i in window):
            if ended.is_set():
                return
            with contextlib.suppress(NanodlmError, OSError, RuntimeError):  # the last: while the interpreter ends
                shard(data_rows.name(number))

    threading.Thread(target=fetch, name="fetch-ahead", daemon=True).start()
    return ended


def _validation(
    config: Config,
    vocabulary: Vocabulary,
    graphdef: nnx.GraphDef,
    shard: Callable[[str], Path],
    dtype: str,
    mesh: Mesh,
) -> Callable[[State], dict[str, float]] | None:
    """What scores a state, always with the same noise on the first validation rows; None is not wanted."""
    length = config.model.seq_len
    rows = read(shard("validation.arrayrecord"), dtype)[: config.exp.val_rows] if config.exp.val_rows else []
    rows = [row for row in rows if len(row) == length]
    if not rows:
        return None
    scorer = make_scorer(
        make_objective(config, vocabulary),
        graphdef,
        document_end=vocabulary.end_of_text if config.edges_known else None,
    )
    key = jax.random.key(config.eval.seed)

    def validate(state: State) -> dict[str, float]:
        params = state.get("ema_state", state["model_state"])
        nats = score_rows(scorer, params, rows, key, mesh=mesh, batch_size=config.train.batch_size)
        bound = float(sum(batch.sum() for batch in nats)) / (len(rows) * length)
        return {"val_nats_per_token": bound} if math.isfinite(bound) else {}

    return validate


def _describe(mesh: Mesh, parameters: int, first: int) -> str:
    resumed = f", continuing after update {first:,}" if first else ""
    devices = f"{mesh.size} {jax.devices()[0].device_kind} device" + "s" * (mesh.size > 1)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{parameters / 1e6:.2f}M parameters on {devices}{f' ({axes})' if axes else ''}{resumed}"
