"""The train stage: from `train` to the jitted `train_step` in one hop.

    nanodlm train demo --train.max_steps 200      # a laptop: a minute
    nanodlm train owt --train.batch_size 64       # one or many GPUs: the batch is shared by all devices

Step k's rows and noise depend on the seeds and k alone, so a resumed run repeats an uninterrupted one bit for bit. What
is not finite is never saved: a run that diverges stops, and names the checkpoint from which it can go on.
"""

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tiktoken
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key

from nanodlm import loader, losses, sharding, shards, tokenizer
from nanodlm.checkpoint import Checkpoints, State, describe_run, make_model, make_objective, parameters_sha256
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped, UsageError
from nanodlm.metrics import Tracker
from nanodlm.model import count_parameters, segments
from nanodlm.optimizer import learning_rate, make_optimizer
from nanodlm.scoring import make_scorer, score_rows
from nanodlm.store import Artifact, Attempt, cache_dir

LOGITS_AT_ONCE = 2**26  # numbers; in float32, 256 MiB


def train_step(
    state: State,
    rows: Int[Array, "A B L"],
    key: Key[Array, ""],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: losses.Objective,
    config: Config,
) -> tuple[State, dict[str, Array]]:
    """One update from A micro-batches of B rows.

    The loss is the objective's in nats per token: summed over a row's tokens, divided by all of them. The noise of all
    micro-batches is drawn at once, so that its times are spread evenly over the whole update.

    Returns:
        The new state, and scalars: `loss` (what was minimised), `nats_per_token` (the bound; with isolated documents
        that of rows whose document edges are known), `grad_norm`, `lr`, and `skipped` when the state counts them.
    """
    n_micro, n_rows, length = rows.shape
    chunks = -(-n_rows * length * objective.mask_id // LOGITS_AT_ONCE)
    flat = rows.reshape(-1, length)
    segment_ids = segments(flat, objective.mask_id - 1) if config.data.isolate_documents else None
    noised = objective.corrupt(flat, jax.random.fold_in(key, state["step"]), segment_ids)
    micro = jax.tree.map(lambda a: a.reshape(n_micro, n_rows, *a.shape[1:]), (flat, noised, segment_ids))

    def loss_fn(
        params: Any, x_0: Int[Array, "B L"], noised: losses.Corruption, segment_ids: Int[Array, "B L"] | None
    ) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, params)
        if objective.mixed:
            nats = objective.row_nats(objective.logits(model, x_0, noised, segment_ids), x_0, noised)
            return jnp.mean(nats.loss) / length, jnp.mean(nats.bound) / length
        features = objective.logits(model.features, x_0, noised, segment_ids)
        loss, bound = objective.fused_nats(features, model.table, x_0, noised, chunks=chunks)
        return loss / x_0.size, bound / x_0.size

    def evaluate(batch: tuple[Array, losses.Corruption, Array | None]) -> tuple[Any, Any]:
        return jax.value_and_grad(loss_fn, has_aux=True)(state["model_state"], *batch)

    def accumulate(total: Any, batch: tuple[Array, losses.Corruption, Array | None]) -> tuple[Any, None]:
        return jax.tree.map(lambda t, v: t + v / n_micro, total, evaluate(batch)), None

    if n_micro == 1:
        (loss, bound), grads = evaluate(jax.tree.map(lambda a: a[0], micro))
    else:
        zero = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), state["model_state"]))
        ((loss, bound), grads), _ = jax.lax.scan(accumulate, zero, micro)
    updates, optimizer_state = optimizer.update(grads, state["optimizer_state"], state["model_state"])
    params = optax.apply_updates(state["model_state"], updates)
    new = {"model_state": params, "optimizer_state": optimizer_state, "step": state["step"] + 1}
    if "ema_state" in state:
        # The average starts as the parameters do; early on it follows them faster (arXiv:2206.00364, appendix).
        decay = jnp.minimum(config.train.ema_decay, (1 + state["step"]) / (10 + state["step"]))
        new["ema_state"] = optax.incremental_update(params, state["ema_state"], 1 - decay)
    scalars = {
        "loss": loss,
        "nats_per_token": bound,
        "grad_norm": optax.tree.norm(grads),
        "lr": learning_rate(config.train)(state["step"] - state.get("skipped", 0)),
    }
    if "skipped" in state:
        fine = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"])
        new = jax.tree.map(partial(jnp.where, fine), new, {name: state[name] for name in new})
        new |= {"step": state["step"] + 1, "skipped": state["skipped"] + jnp.where(fine, 0, 1)}
        scalars["skipped"] = new["skipped"]
    return new, scalars


def init_state(config: Config, params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first update."""
    state = {"model_state": params, "optimizer_state": optimizer.init(params), "step": jnp.int32(0)}
    if config.train.skip_nonfinite:
        state["skipped"] = jnp.int32(0)
    return {**state, "ema_state": jax.tree.map(jnp.copy, params)} if config.train.ema_decay else state


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no array of a tree holds a NaN or an infinity.

    >>> bool(all_finite({"a": jnp.zeros(2), "b": jnp.log(jnp.zeros(2))}))
    False
    """
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def train(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Stage: train for `max_steps` updates, from the newest whole checkpoint if an earlier attempt left one, else from
    that of `exp.resume_path`.

    Writes `checkpoints/`, `config.json`, `logs.json` and, as it goes, `logs.jsonl`, `tokenizer/` and `parameters.json`
    into the attempt.

    Raises:
        Stopped: After SIGTERM or SIGUSR1: the update was finished and a checkpoint saved.
        UsageError: When the checkpoint to continue from is missing or of another run.
        NanodlmError: When the loss is not a number or explodes; the last good checkpoint is named.
    """
    data = inputs["shard"].local()
    tokens = inputs["shard"].metrics
    encoding = tokenizer.load(inputs["tokenizer"].local())
    rows_per_step = config.train.batch_size * config.train.grad_acc_steps
    mesh = sharding.make_mesh(config.train.batch_size)
    optimizer = make_optimizer(config.train)

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(config, encoding)))
    if tokens["n_vocab"] != encoding.n_vocab:
        raise NanodlmError("the shards were made with another tokenizer: rebuild them with --rebuild shard")

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def initialise() -> State:
        params = nnx.to_pure_dict(nnx.split(make_model(config, encoding))[1])
        return init_state(config, params, optimizer)

    step_fn = jax.jit(
        partial(
            train_step,
            graphdef=graphdef,
            optimizer=optimizer,
            objective=make_objective(config, encoding),
            config=config,
        ),
        donate_argnums=0,
    )
    (attempt.path / "config.json").write_text(config.model_dump_json(indent=1))
    (attempt.path / "tokenizer").mkdir()
    tokenizer.save(encoding, attempt.path / "tokenizer")
    key = jax.random.key(config.train.seed)
    run = describe_run(config, inputs["shard"].digest, inputs["tokenizer"].digest, key)
    validate = _validation(config, encoding, graphdef, data, tokens["dtype"], mesh)
    kept = {"keep": config.exp.keep, "keep_best": config.exp.keep_best}
    with (
        _catch_signals() as stop,
        contextlib.ExitStack() as late,
        Checkpoints(attempt, run, **kept) as checkpoints,
    ):
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
            jax.eval_shape(initialise),
        )
        restored = _restore(config, checkpoints, target)
        info = restored[1] if restored else {"logs": [], "rows_seen": 0}
        run_id, file = attempt.fingerprint[:16], attempt.path / "logs.jsonl"
        tracker = Tracker(config, file, run_id=run_id, folder=cache_dir(), records=info["logs"], emit=emit)
        late.enter_context(tracker)  # closed once the last checkpoint is safe
        state = restored[0] if restored else initialise()
        first, since = int(state["step"]), int(state["step"])
        shift = info["rows_seen"] - first * rows_per_step  # 0, unless the batch size was allowed to change
        emit("message", text=_describe(config, count_parameters(nnx.merge(graphdef, abstract)), first))
        batches = loader.train_batches(
            data,
            dtype=tokens["dtype"],
            rows_per_step=rows_per_step,
            seed=config.data.shuffle_seed,
            first_step=first,
            shift=shift,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        limit = 10 * math.log(encoding.n_vocab)
        logger = _Logger(config, info["logs"], emit, tracker, limit=limit, last_good=checkpoints.last)
        if stop.is_set():
            raise Stopped(f"stopped by a signal after update {first}, before another: run again to continue")
        for step in range(first + 1, config.train.max_steps + 1):
            rows = next(batches)
            rows = rows.reshape(config.train.grad_acc_steps, -1, rows.shape[-1])
            state, scalars = step_fn(state, sharding.put_rows(mesh, rows, axis=1), key)
            if step == first + 1:
                jax.block_until_ready(scalars)  # compiled; from here on the clock runs
                logger.start(step)
            last, stopping = step == config.train.max_steps, stop.is_set()
            saving = step % config.exp.save_every == 0 or last or stopping
            scored: dict[str, Any] = {}
            if saving:
                logger.check(step, scalars, state)
                if validate and not stopping:  # a signal leaves no time for it
                    scored = logger.off_the_clock(validate, state)
            if step % config.exp.log_every == 0 or last:
                logger.add(step, {**scalars, **scored})
            if saving:
                logger.flush()
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
    (attempt.path / "logs.json").write_text(json.dumps(logger.records, indent=1))
    final = state.get("ema_state", state["model_state"])
    result = {"parameters_sha256": parameters_sha256(final), "updates": config.train.max_steps}
    identity = {**result, **config.model_dump(include={"model", "schedule", "objective"})}
    (attempt.path / "parameters.json").write_text(json.dumps(identity, indent=1))
    for leftover in (attempt.path / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover)
    return {
        **result,
        "parameters": count_parameters(nnx.merge(graphdef, abstract)),
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


def _restore(config: Config, checkpoints: Checkpoints, target: State) -> tuple[State, dict[str, Any]] | None:
    """The state to continue from and what its checkpoint remembers; None is to start anew."""
    exp = config.exp
    restored = checkpoints.restore(target, exp.allow_changed) if exp.resume else None
    if restored is None and exp.resume_path:
        restored = checkpoints.start(exp.resume_path, target, exp.allow_changed)
        if int(restored[0]["step"]) >= config.train.max_steps:
            raise UsageError(f"{exp.resume_path} has all {config.train.max_steps} updates: raise --train.max_steps")
    return restored


def _validation(
    config: Config, encoding: tiktoken.Encoding, graphdef: nnx.GraphDef, data: Path, dtype: str, mesh: Mesh
) -> Callable[[State], dict[str, float]] | None:
    """What scores a state, always with the same noise on the first validation rows; None is not wanted."""
    length = config.model.seq_len
    rows = shards.read(data / "validation.arrayrecord", dtype)[: config.exp.val_rows] if config.exp.val_rows else []
    rows = [row for row in rows if len(row) == length]
    if not rows:
        return None
    known = config.objective.kind == "autoregressive" and config.data.isolate_documents
    scorer = make_scorer(make_objective(config, encoding), graphdef, edges_known=known)
    key = jax.random.key(config.eval.seed)

    def validate(state: State) -> dict[str, float]:
        params = state.get("ema_state", state["model_state"])
        nats = score_rows(scorer, params, rows, key, mesh=mesh, batch_size=config.train.batch_size)
        bound = float(sum(batch.sum() for batch in nats)) / (len(rows) * length)
        return {"val_nats_per_token": bound} if math.isfinite(bound) else {}

    return validate


class _Logger:
    """Fetches scalars one record late, so that the loop never waits for the device."""

    def __init__(
        self,
        config: Config,
        records: list[dict[str, Any]],
        emit: Callable[..., None],
        tracker: Tracker,
        *,
        limit: float,
        last_good: Callable[[int], str],
    ):
        """Continue the records of a run.

        Args:
            config: The run's configuration.
            records: Those of before.
            emit: Called with each.
            tracker: Told each.
            limit: Of the bound in nats per token, which two records in a row may not exceed.
            last_good: Address of the newest checkpoint before an update.
        """
        self.records = list(records)
        self._limit, self._last_good = limit, last_good
        self.tokens_per_second: float = records[-1]["tokens_per_second"] if records else 0.0
        self._config, self._emit, self._tracker = config, emit, tracker
        self._waiting: tuple[int, dict[str, Array], float] | None = None
        self._clock: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """Start the clock: update `step` is done."""
        self._clock = (step, time.monotonic())

    def stop(self, step: int) -> None:
        """Stop the clock: update `step` is done, and with it all before."""
        self._measure(step, time.monotonic())

    def off_the_clock(self, work: Callable[[State], dict[str, float]], state: State) -> dict[str, float]:
        """Do something that is no training."""
        began = time.monotonic()
        result = work(state)
        if self._clock:
            self._clock = (self._clock[0], self._clock[1] + time.monotonic() - began)
        return result

    def _measure(self, step: int, now: float) -> None:
        if self._clock and step > self._clock[0]:
            train = self._config.train
            per_update = train.batch_size * train.grad_acc_steps * self._config.model.seq_len
            self.tokens_per_second = (step - self._clock[0]) * per_update / (now - self._clock[1])

    def add(self, step: int, scalars: dict[str, Array]) -> None:
        """Record the scalars of an update; those of the record before are fetched now."""
        self.flush()
        self._waiting = (step, scalars, time.monotonic())

    def flush(self) -> None:
        """Fetch and write the waiting record; numbers that are not finite are written as None.

        Raises:
            NanodlmError: When one is, unless such updates are skipped, or when the bound has exploded.
        """
        if self._waiting is None:
            return
        (step, scalars, now), self._waiting = self._waiting, None
        values = self._fetch(step, scalars)
        self._measure(step, now)
        record = {"step": step, **values, "tokens_per_second": round(self.tokens_per_second, 1)}
        self.records.append(record)
        self._tracker.log(record)
        self._emit("progress", done=step, total=self._config.train.max_steps, unit="updates", **record)
        if all((r["nats_per_token"] or 0) > self._limit for r in self.records[-2:]) and len(self.records) > 1:
            before, bound = self.records[-2]["step"], record["nats_per_token"]
            raise self._diverged(f"the loss has exploded at update {step}, to {bound:.0f} nats per token", before)

    def check(self, step: int, scalars: dict[str, Array], state: State) -> None:
        """Make sure that the state after an update is worth saving.

        Raises:
            NanodlmError: When its numbers, or those of records before, are not finite.
        """
        self.flush()
        self._fetch(step, scalars)
        if not all_finite(state):
            raise self._diverged(f"parameters or optimizer are not finite after update {step}", step)

    def mean_bound(self, after: int, until: int) -> dict[str, float]:
        """The mean training bound of the records in a range of updates, if there are any."""
        bounds = [r["nats_per_token"] for r in self.records if after < r["step"] <= until]
        bounds = [bound for bound in bounds if bound is not None]
        return {"train_nats_per_token": sum(bounds) / len(bounds)} if bounds else {}

    def _fetch(self, step: int, scalars: dict[str, Array]) -> dict[str, float | None]:
        values = {name: float(value) for name, value in scalars.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and not self._config.train.skip_nonfinite:
            found = ", ".join(f"{name} {values[name]}" for name in bad)
            raise self._diverged(f"the loss is not a number at update {step} ({found})", step)
        if "skipped" in values:
            values["skipped"] = int(values["skipped"])
        return {name: None if name in bad else value for name, value in values.items()}

    def _diverged(self, what: str, before: int) -> NanodlmError:
        good = self._last_good(before)
        remedy = "lower --train.lr or --train.clip_grad_norm, or add --train.skip_nonfinite"
        if not good:
            return NanodlmError(f"{what}; no checkpoint was saved before: {remedy}")
        return NanodlmError(
            f"{what}; the last good checkpoint is {good}: {remedy}, and go on from it with --exp.resume_path "
            "and --exp.allow_changed"
        )


@contextlib.contextmanager
def _catch_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGUSR1 sets; outside the main thread, where none can be caught, nothing does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(config: Config, parameters: int, first: int) -> str:
    resumed = f", continuing after update {first:,}" if first else ""
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device" + "s" * (jax.device_count() > 1)
    return f"{parameters / 1e6:.2f}M parameters on {devices}{resumed}"
