"""The train stage: restore, then batch, step, log and save until all updates are done.

    nanodlm train demo --train.max_steps 200      # a laptop: a minute
    nanodlm train owt --train.batch_size 64       # one or many GPUs: the batch is shared by all devices

The device always has work: rows are read ahead in a thread, those of the next update are sent while one is computed,
and numbers are fetched an update late. Step k's rows and noise depend on the seeds and k alone, so a resumed run
repeats an uninterrupted one bit for bit. What is not finite is never saved: a run that diverges stops.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from nanodlm.checkpoints import State
from nanodlm.checkpoints.identity import describe_run
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.checkpoints.saving import Checkpoints
from nanodlm.config import Config, differences, training_settings
from nanodlm.data.loader import train_batches
from nanodlm.data.rows import evenly_spaced, read
from nanodlm.data.tokenizer import load, save
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.devices.hosts import from_leader, my_share
from nanodlm.errors import Emit, NanodlmError, Stopped, UsageError
from nanodlm.evaluation.scoring import make_scorer, score_rows
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Attempt
from nanodlm.training.logger import Logger
from nanodlm.training.signals import catch_signals, make_stop_vote
from nanodlm.training.step import Program, make_program
from nanodlm.training.trackers import Tracker


def train(config: Config, inputs: dict[str, Artifact], attempt: Attempt | None, emit: Emit) -> dict[str, Any]:
    """Stage: train for `max_steps` updates, from an earlier attempt's newest checkpoint or that of `exp.resume_path`.

    Writes `checkpoints/`, `config.json`, `logs.json` and, as it goes, `logs.jsonl`, `tokenizer/` and `parameters.json`
    into the attempt. Of several processes the first has the attempt; the others are given None, and take part. After
    SIGTERM or SIGUSR1 the update is finished, a checkpoint saved, and `Stopped` raised.
    """
    with catch_signals() as stop:
        _require_same_start(config, inputs)
        shard, folder = inputs["shard"], inputs["shard"].local()  # all, for the first rows are of any shard
        encoding = load(inputs["tokenizer"].local())
        vocabulary = Vocabulary.of(encoding)
        program = make_program(config, vocabulary)
        mesh = program.mesh
        if shard.metrics["n_vocab"] != vocabulary.size:
            raise NanodlmError("the shards were made with another tokenizer: rebuild them with --rebuild shard")
        if attempt:
            (attempt.path / "config.json").write_text(config.model_dump_json(indent=1))
            (attempt.path / "tokenizer").mkdir()
            save(encoding, attempt.path / "tokenizer")
        count = config.exp.val_rows
        rows = read(folder / "validation.arrayrecord", shard.metrics["dtype"]) if count else []
        rows = [row for row in rows if len(row) == config.model.seq_len]  # the last one may be shorter
        rows = [rows[i] for i in evenly_spaced(len(rows), count)]
        validate = _validation(config, program.network, rows, mesh)
        key = jax.random.key(config.train.seed)
        run = describe_run(config, shard.digest, inputs["tokenizer"].digest, key)
        with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(attempt, run, keep=config.exp.keep, keep_best=config.exp.keep_best)
            state, past = _restore(config, checkpoints, program)
            first, rows_seen = int(state["step"]), past["rows_seen"]
            emit("message", text=_describe(mesh, program.n_parameters, first))
            tracker = None  # the process that has the attempt tracks, until the last checkpoint is safe
            if attempt:
                log = Tracker(config, attempt.path / "logs.jsonl", attempt.fingerprint[:16], past["logs"], emit)
                tracker = stack.enter_context(log)
            stack.enter_context(checkpoints)
            batches = train_batches(config, shard.metrics, folder, first_row=rows_seen, share=my_share(mesh))
            stack.enter_context(contextlib.closing(batches))
            bits = shard.metrics["val_tokens"] / shard.metrics["val_bytes"] / math.log(2)
            row_tokens = shard.metrics["train_tokens"] / shard.metrics["train_rows"]
            logger = Logger(config, list(past["logs"]), emit, tracker, bits, checkpoints.last, row_tokens)
            state = _Loop(program, key, checkpoints, logger, validate, stop).run(state, batches, rows_seen)
    new_rows = (config.train.max_steps - first) * config.train.batch_size * config.train.grad_acc_steps
    trained_tokens = round((rows_seen + new_rows) * row_tokens)
    found = {"resumed_from_update": first, "best_update": checkpoints.best(), "trained_tokens": trained_tokens}
    return _finish(config, attempt, state, logger) | {"parameters": program.n_parameters, **found}


class _Loop(NamedTuple):
    """What stays the same from update to update."""

    program: Program
    key: jax.Array
    checkpoints: Checkpoints
    logger: Logger
    validate: Callable[[State], dict[str, float]] | None
    stop: threading.Event

    def run(self, state: State, batches: Iterator[np.ndarray], rows_seen: int) -> State:
        """Take updates until `max_steps` are done; log and save now and then."""
        train, exp, logger = self.logger.config.train, self.logger.config.exp, self.logger
        first = int(state["step"])
        if process_allgather(np.array([self.stop.is_set()])).any():
            raise Stopped(f"stopped by a signal after update {first}, before another: run again to continue")
        shall_stop = make_stop_vote(self.program.mesh, self.stop)
        for step in range(first + 1, train.max_steps + 1):
            rows = jax.make_array_from_process_local_data(self.program.rows.sharding, logger.wait(batches))
            state, scalars = self.program.update(state, rows, self.key)
            rows_seen += train.batch_size * train.grad_acc_steps
            if step == first + 1:
                jax.block_until_ready(scalars)  # compiled; from here on the clock runs
                logger.since, logger.began, logger.waited = step, time.monotonic(), 0.0
            logger.flush()  # the record of the update before, while this one is computed
            last, stopping = step == train.max_steps, shall_stop(scalars)
            saving = last or stopping or step % exp.save_every == 0
            scores: dict[str, Any] = {}
            if saving:
                logger.check(step, scalars, state)
                if self.validate and not stopping:  # a signal leaves no time for it
                    began = time.monotonic()
                    scores = self.validate(state)
                    logger.began += time.monotonic() - began
            if last or step % exp.log_every == 0:
                logger.add(step, scalars | scores)
            if saving:
                logger.flush()  # this update is done, for its state has been checked
                self.checkpoints.save(state, step, logs=list(logger.records), rows_seen=rows_seen, **scores)
                logger.emit("checkpoint", step=step)
            if stopping and not last:
                self.checkpoints.finish()
                raise Stopped(f"stopped by a signal after update {step}; a checkpoint is saved: run again to continue")
        return state


def _finish(config: Config, attempt: Attempt | None, state: State, logger: Logger) -> dict[str, Any]:
    """Write what lies beside the checkpoints, and return the metrics of the run."""
    parameters = state.get("ema_state", state["model_state"])
    result = {"parameters_sha256": parameters_sha256(parameters), "updates": config.train.max_steps}
    if attempt:
        (attempt.path / "logs.json").write_text(json.dumps(logger.records, indent=1, sort_keys=True))
        settings = training_settings(config)  # without those that nothing reads, for equal runs are equal files
        identity = {**result, **{group: settings[group] for group in ("model", "schedule", "objective")}}
        (attempt.path / "parameters.json").write_text(json.dumps(identity, indent=1))
    return {
        **result,
        **{f"train_{name}": logger.records[-1][name] for name in ("tokens_per_second", "loss", "nats_per_token")},
        "waiting_share": logger.records[-1]["waiting_share"],
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        **({"skipped": int(state["skipped"])} if "skipped" in state else {}),
    }


def _require_same_start(config: Config, inputs: dict[str, Artifact]) -> None:
    """Make sure that all processes train the same; they would hang, or publish something else than they say."""
    digests = {stage: artifact.digest for stage, artifact in inputs.items()}
    run = {**config.model_dump(mode="json"), "inputs": digests, "jax": jax.__version__}
    differ = differences(from_leader(run), run)
    if process_allgather(np.array([bool(differ)])).any():
        fields = "; ".join(f"{field}: {values}" for field, values in differ.items())
        here = f"process {jax.process_index()} has {fields}" if differ else "another one says what differs"
        raise UsageError(f"the processes were not started alike ({here}): give all the same flags and versions")


def _restore(config: Config, checkpoints: Checkpoints, program: Program) -> tuple[State, dict[str, Any]]:
    """Return the state to begin with, of a checkpoint or anew, and what the checkpoint remembers."""
    exp = config.exp
    restored = checkpoints.restore(program.state, exp.allow_changed) if exp.resume else None
    if restored is None and exp.resume_path:
        restored = checkpoints.start(exp.resume_path, program.state, exp.allow_changed)
        if int(restored[0]["step"]) >= config.train.max_steps:
            raise UsageError(f"{exp.resume_path} has all {config.train.max_steps} updates: raise --train.max_steps")
    return restored or (program.initialise(), {"logs": [], "rows_seen": 0})


def _validation(
    config: Config, network: Transformer, rows: list[np.ndarray], mesh: Mesh
) -> Callable[[State], dict[str, float]] | None:
    """Return what scores a state, always with the same noise on these rows, or None."""
    if not rows:
        return None
    scorer, key = make_scorer(network), jax.random.key(config.eval.seed)
    tokens = sum(int((row < network.objective.mask_id).sum()) for row in rows)

    def validate(state: State) -> dict[str, float]:
        params = state.get("ema_state", state["model_state"])
        scored = score_rows(scorer, params, rows, key, mesh=mesh, batch_size=config.train.batch_size)
        bound = float(sum(nats.sum() for nats, _ in scored)) / tokens
        return {"val_nats_per_token": bound} if math.isfinite(bound) else {}

    return validate


def _describe(mesh: Mesh, parameters: int, first: int) -> str:
    resumed = f", continuing after update {first:,}" if first else ""
    devices = f"{mesh.size} {jax.devices()[0].device_kind} device" + "s" * (mesh.size > 1)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{parameters / 1e6:.2f}M parameters on {devices}{f' ({axes})' if axes else ''}{resumed}"
