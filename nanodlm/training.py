"""The train stage: from `train` to the jitted `train_step` in one hop.

    nanodlm train demo --train.max_steps 200      # a laptop: a minute
    nanodlm train owt --train.batch_size 64       # one or many GPUs: the batch is shared by all devices

Step k's rows and noise depend on the seeds and k alone, so a resumed run repeats an uninterrupted one bit for bit.
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
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from nanodlm import loader, losses, sharding, tokenizer
from nanodlm.checkpoint import Checkpoints, State, make_model, make_objective, parameters_sha256
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped
from nanodlm.metrics import Tracker
from nanodlm.model import count_parameters, segments
from nanodlm.optimizer import learning_rate, make_optimizer
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
        that of rows whose document edges are known), `grad_norm`, `lr`.
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
        "lr": learning_rate(config.train)(state["step"]),
    }
    return new, scalars


def init_state(config: Config, params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first update."""
    state = {"model_state": params, "optimizer_state": optimizer.init(params), "step": jnp.int32(0)}
    return {**state, "ema_state": jax.tree.map(jnp.copy, params)} if config.train.ema_decay else state


def train(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Stage: train for `max_steps` updates, from the newest whole checkpoint if an earlier attempt left one.

    Writes `checkpoints/`, `config.json`, `logs.json` and, as it goes, `logs.jsonl`, `tokenizer/` and `parameters.json`
    into the attempt.

    Raises:
        Stopped: After SIGTERM or SIGUSR1: the update was finished and a checkpoint saved.
        NanodlmError: When the loss is not a number.
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
    with _catch_signals() as stop, contextlib.ExitStack() as late, Checkpoints(attempt, config.exp.keep) as checkpoints:
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
            jax.eval_shape(initialise),
        )
        restored = checkpoints.restore(target)
        logs = restored[1]["logs"] if restored else []
        run_id, file = attempt.fingerprint[:16], attempt.path / "logs.jsonl"
        tracker = Tracker(config, file, run_id=run_id, folder=cache_dir(), records=logs, emit=emit)
        late.enter_context(tracker)  # closed once the last checkpoint is safe
        state = restored[0] if restored else initialise()
        first = int(state["step"])
        emit("message", text=_describe(config, count_parameters(nnx.merge(graphdef, abstract)), first))
        batches = loader.train_batches(
            data,
            dtype=tokens["dtype"],
            rows_per_step=rows_per_step,
            seed=config.data.shuffle_seed,
            first_step=first,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        logger = _Logger(config, logs, emit, tracker)
        key = jax.random.key(config.train.seed)
        for step in range(first + 1, config.train.max_steps + 1):
            rows = next(batches)
            rows = rows.reshape(config.train.grad_acc_steps, -1, rows.shape[-1])
            state, scalars = step_fn(state, sharding.put_rows(mesh, rows, axis=1), key)
            if step == first + 1:
                jax.block_until_ready(scalars)  # compiled; from here on the clock runs
                logger.start(step)
            last = step == config.train.max_steps
            if step % config.exp.log_every == 0 or last:
                logger.add(step, scalars)
            if step % config.exp.save_every == 0 or last or stop.is_set():
                logger.flush()
                checkpoints.save(state, step, logs=list(logger.records))
                emit("checkpoint", step=step)
            if stop.is_set() and not last:
                checkpoints.finish()
                raise Stopped(f"stopped by a signal after update {step}; a checkpoint is saved: run again to continue")
        logger.stop(config.train.max_steps)
        checkpoints.finish()
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
        "trained_tokens": config.train.max_steps * rows_per_step * config.model.seq_len,
        "train_tokens_per_second": round(logger.tokens_per_second, 1),
        "train_loss": logger.records[-1]["loss"],
        "train_nats_per_token": logger.records[-1]["nats_per_token"],
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "resumed_from_update": first,
    }


class _Logger:
    """Fetches scalars one record late, so that the loop never waits for the device."""

    def __init__(self, config: Config, records: list[dict[str, Any]], emit: Callable[..., None], tracker: Tracker):
        self.records = list(records)
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
        """Fetch and write the waiting record.

        Raises:
            NanodlmError: When one of its numbers is not finite.
        """
        if self._waiting is None:
            return
        (step, scalars, now), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in scalars.items()}
        if not all(map(math.isfinite, values.values())):
            raise NanodlmError(
                f"the loss is not a number at update {step} ({values}): lower --train.lr or --train.clip_grad_norm; "
                "the checkpoints before it are kept"
            )
        self._measure(step, now)
        record = {"step": step, **values, "tokens_per_second": round(self.tokens_per_second, 1)}
        self.records.append(record)
        self._tracker.log(record)
        self._emit("progress", done=step, total=self._config.train.max_steps, unit="updates", **record)


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
