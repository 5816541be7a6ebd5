"""Experiments that anyone can rerun, on real text.

    nanodlm bench variance demo      # how much the estimators of the bound and of its gradient vary
    nanodlm bench race demo          # how much sooner the preset reaches the bound of a plain recipe
    nanodlm bench ablation demo      # what each part of the preset is worth

`race` and `ablation` train in memory, on one device, without checkpoints; shards that the store lacks are built first.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Int, Key

from nanodlm.build import make_model, make_objective
from nanodlm.checkpoints.loading import load_artifact
from nanodlm.checkpoints.saving import State
from nanodlm.config import Config, load_config
from nanodlm.data.rows import read
from nanodlm.data.tokenizer import load
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.kinds import KINDS
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.errors import UsageError
from nanodlm.evaluation.evaluate import score
from nanodlm.model.transformer import Transformer
from nanodlm.stages.lookup import ready
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import until
from nanodlm.store import Store, fingerprint_of
from nanodlm.training import plain
from nanodlm.training.optimizer import make_optimizer
from nanodlm.training.plain import make_network, plain_step
from nanodlm.training.step import init_state, train_step

Emit = Callable[..., None]

# Label, estimator, and how its times or counts are spread over the rows.
ESTIMATORS = (
    ("continuous, independent", "continuous", "independent"),
    ("continuous, stratified", "continuous", "stratified"),
    ("continuous, systematic", "continuous", "systematic"),
    ("count, independent", "count", "independent"),
    ("count, systematic", "count", "systematic"),
    ("constant count, systematic", "constant_count", "systematic"),
)


def variance(
    config: Config, store: Store, *, draws: int = 1024, emit: Emit = lambda *_, **__: None
) -> list[dict[str, Any]]:
    """How much the bound of one batch, and its gradient, vary with the noise: a row for each estimator.

    The network and its data are those of the configuration's finished run; the batch is `train.batch_size` rows from
    the front of the validation split, the same in every draw, so that noise is all that varies.

    Returns:
        Rows with `estimator`; `bound`, the mean over all draws in nats per token, and `bound_error`, its standard
        error; `bound_sd`, the standard deviation of one batch's bound; `gradient_noise`, E|g - Eg|^2 / |Eg|^2 for the
        gradient g of the bound, both estimated without bias.

    Raises:
        UsageError: For a model that was not trained on masked rows or blocks, an odd batch, or fewer than two draws.
        NanodlmError: When the run is not in the store.

    Example:
        rows = variance(nanodlm.PRESETS["demo"], Store("data/store"))
    """
    if "constant_count" not in KINDS[config.objective.kind].estimators:
        raise UsageError(
            f"{config.objective.kind} has no estimators to compare: use --objective.kind absorbing or block"
        )
    if draws < 2:
        raise UsageError(f"a variance takes two draws and more, not {draws}: raise --draws")
    if config.train.batch_size % 2:
        raise UsageError(f"constant counts pair rows: use an even --train.batch_size, not {config.train.batch_size}")
    _, inputs = ready("evaluate", config, store)
    model, encoding = load_artifact(inputs["train"])
    rows = read(inputs["shard"].file("validation.arrayrecord"), inputs["shard"].metrics["dtype"])
    rows = [row for row in rows if len(row) == len(rows[0])][: config.train.batch_size]
    if len(rows) < config.train.batch_size:
        raise UsageError(f"the validation split has {len(rows)} whole rows: raise --data.val_tokens")
    x_0 = jnp.asarray(np.stack(rows))
    graphdef, params = nnx.split(model)
    trained = make_objective(load_config(str(inputs["train"].file("config.json"))), Vocabulary.of(encoding))

    def bound(params: Any, objective: Objective, key: Key[Array, ""]) -> Array:
        network = nnx.merge(graphdef, params)
        noised = objective.corrupt(x_0, key)
        return objective.row_nats(objective.logits(network, x_0, noised), x_0, noised).bound.mean() / x_0.shape[1]

    def measure(objective: Objective) -> tuple[Array, Array, Array]:
        def step(total: Any, key: Key[Array, ""]) -> tuple[Any, Array]:
            nats, gradient = jax.value_and_grad(bound)(params, objective, key)
            squares = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
            return (jax.tree.map(jnp.add, total[0], gradient), total[1] + squares), nats

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        (gradients, squares), nats = jax.lax.scan(step, zero, jax.random.split(jax.random.key(0), draws))
        return nats, sum((jnp.vdot(g, g) for g in jax.tree.leaves(gradients)), jnp.float32(0)) / draws**2, squares

    table = []
    for i, (label, estimator, times) in enumerate(ESTIMATORS):
        objective = replace(trained, estimator=estimator, times=times, weighting="bound")
        nats, square_of_mean, squares = map(np.float64, jax.jit(measure, static_argnums=0)(objective))
        spread = (squares - draws * square_of_mean) / (draws - 1)
        table.append(
            {
                "estimator": label,
                "bound": float(nats.mean()),
                "bound_error": float(nats.std(ddof=1)) / math.sqrt(draws),
                "bound_sd": float(nats.std(ddof=1)),
                "gradient_noise": float(spread / (square_of_mean - spread / draws)),
            }
        )
        emit("progress", done=i + 1, total=len(ESTIMATORS), unit="estimators")
    return table


# Training in memory


class Text(NamedTuple):
    """A corpus in memory."""

    encoding: tiktoken.Encoding
    train: Int[np.ndarray, "N L"]
    """All training rows, in the order of the shards."""
    validation: list[np.ndarray]
    """Held-out rows, the first `eval.max_rows` of them; the last may be shorter."""
    digest: str
    """Of the shards."""

    def recut(self, length: int) -> "Text":
        """The same tokens in rows of another length; what is left of the training tokens after the last row is dropped.

        >>> from nanodlm.data.tokenizer import plain_bytes
        >>> text = Text(plain_bytes(), np.zeros((3, 4), np.int32), [np.zeros(4), np.zeros(3)], "")
        >>> again = text.recut(5)
        >>> again.train.shape, [len(row) for row in again.validation]
        ((2, 5), [5, 2])
        """
        train, held_out = self.train.reshape(-1), np.concatenate(self.validation)
        rows = train[: len(train) // length * length].reshape(-1, length)
        cut = [held_out[i : i + length] for i in range(0, len(held_out), length)]
        return self._replace(train=rows, validation=cut)


def load_text(config: Config, store: Store, emit: Emit = lambda *_, **__: None) -> Text:
    """A configuration's tokens; what the store lacks of them is built."""
    for name in until("shard"):
        run_stage(name, config, store, emit=emit)
    _, inputs = ready("train", config, store)
    folder, dtype = inputs["shard"].local(), inputs["shard"].metrics["dtype"]
    rows = [row for path in sorted(folder.glob("train-*.arrayrecord")) for row in read(path, dtype)]
    held_out = read(folder / "validation.arrayrecord", dtype)[: config.eval.max_rows]
    return Text(load(inputs["tokenizer"].local()), np.stack(rows), held_out, inputs["shard"].digest)


class Trained(NamedTuple):
    """A network, and what it took: `seconds` of training, those of compilation not among them."""

    model: Transformer
    updates: int
    tokens: int
    seconds: float
    compile_seconds: float


def _batches(rows: Int[np.ndarray, "N L"], shape: tuple[int, int], seed: int) -> Iterator[Int[np.ndarray, "A B L"]]:
    """Endless batches, reshuffled every epoch."""
    random = np.random.default_rng(seed)
    visits = chain.from_iterable(random.permutation(len(rows)) for _ in count())
    while True:
        yield rows[list(islice(visits, math.prod(shape)))].reshape(*shape, -1)


def _run(
    step: Callable[..., Any],
    state: State,
    batches: Iterator[Int[np.ndarray, "A B L"]],
    updates: int,
    key: Key[Array, ""],
    emit: Emit,
) -> tuple[State, float]:
    """Train until `updates` updates are done: the state, and the seconds since this call."""
    began, first = time.perf_counter(), int(state["step"])
    for done in range(first + 1, updates + 1):
        state, scalars = step(state, next(batches), key)
        if done % 20 == 0 or done == updates:
            emit("progress", done=done, total=updates, unit="updates", loss=float(scalars["loss"]))
    jax.block_until_ready(state)
    return state, time.perf_counter() - began


def _compile(step: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """A step for arguments like these, its state donated, and the seconds that took."""
    began = time.perf_counter()
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile(), time.perf_counter() - began


class Trainer:
    """Trains one configuration, compiled once, with any seeds.

    Example:
        trainer = Trainer(config, text)
        trained = trainer(config)
    """

    def __init__(self, config: Config, text: Text):
        self._text = text
        self._optimizer = make_optimizer(config.train)
        self._graphdef = nnx.split(nnx.eval_shape(lambda: make_model(config, Vocabulary.of(text.encoding))))[0]
        step = partial(
            train_step,
            graphdef=self._graphdef,
            optimizer=self._optimizer,
            objective=make_objective(config, Vocabulary.of(text.encoding)),
            config=config,
            document_end=text.encoding.eot_token if config.data.isolate_documents else None,
        )
        batches, key = self._data(config)
        self._step, self.compile_seconds = _compile(step, self._start(config), next(batches), key)

    def __call__(self, config: Config, emit: Emit = lambda *_, **__: None) -> Trained:
        """Train; the configuration may differ in its seeds alone from the one that was compiled."""
        batches, key = self._data(config)
        updates, per_update = config.train.max_steps, config.train.batch_size * config.train.grad_acc_steps
        state, seconds = _run(self._step, self._start(config), batches, updates, key, emit)
        model = nnx.merge(self._graphdef, state.get("ema_state", state["model_state"]))
        return Trained(model, updates, updates * per_update * config.model.seq_len, seconds, self.compile_seconds)

    def _start(self, config: Config) -> State:
        params = nnx.to_pure_dict(nnx.split(make_model(config, Vocabulary.of(self._text.encoding)))[1])
        return init_state(config, params, self._optimizer)

    def _data(self, config: Config) -> tuple[Iterator[Int[np.ndarray, "A B L"]], Key[Array, ""]]:
        shape = (config.train.grad_acc_steps, config.train.batch_size)
        return _batches(self._text.train, shape, config.data.shuffle_seed), jax.random.key(config.train.seed)


def _bits(text: Text, model: Transformer, objective: Objective, config: Config, emit: Emit) -> tuple[float, float]:
    """Bits per byte of the held-out rows, and their standard error."""
    options = {"edges_known": config.edges_known and objective.traits.edges_known, "emit": emit}
    metrics = score(model, text.encoding, text.validation, objective, config.eval, **options)
    return metrics["val_bits_per_byte"], metrics["val_bits_per_byte_stderr"]


# The race

PLAIN_LENGTH, PLAIN_ROWS = 128, 32
SPEED_UPDATES = 20


def train_plain(text: Text, minutes: float, emit: Emit = lambda *_, **__: None) -> Trained:
    """Train the plain recipe for so many minutes: the first updates tell how many there will be.

    Args:
        text: Tokens, in rows of `PLAIN_LENGTH`.
        minutes: Of training; compilation comes on top.
        emit: Called as `emit(kind, **fields)` with progress.
    """
    shape = {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_ff": 512}
    graphdef, params = nnx.split(make_network(Vocabulary.of(text.encoding).padded_size, **shape))
    state, key = plain.init_state(nnx.to_pure_dict(params)), jax.random.key(0)
    batches = _batches(text.train, (1, PLAIN_ROWS), seed=0)
    step = partial(plain_step, graphdef=graphdef, mask_id=Vocabulary.of(text.encoding).mask_id)
    compiled, compile_seconds = _compile(step, state, next(batches), key)
    state, warm = _run(compiled, state, batches, SPEED_UPDATES, key, emit)
    updates = max(SPEED_UPDATES + 1, round(SPEED_UPDATES * 60 * minutes / warm))
    emit("message", text=f"the plain recipe: {updates:,} updates in {minutes:g} minutes")
    state["updates"] = jnp.float32(updates)
    state, rest = _run(compiled, state, batches, updates, key, emit)
    tokens = updates * PLAIN_ROWS * text.train.shape[1]
    return Trained(nnx.merge(graphdef, state["model_state"]), updates, tokens, warm + rest, compile_seconds)


def shortened(config: Config, updates: int) -> Config:
    """The configuration with another number of updates, of which the same share is the decay at the end.

    >>> shortened(Config().replace(train={"max_steps": 1000, "cooldown_steps": 500}), 300).train.cooldown_steps
    150
    """
    share = config.train.cooldown_steps / config.train.max_steps
    return config.replace(train={"max_steps": updates, "cooldown_steps": round(share * updates)})


def race(
    config: Config,
    store: Store,
    *,
    minutes: float = 10.0,
    updates: Sequence[int] = (100, 150, 200, 300, 400),
    emit: Emit = lambda *_, **__: None,
) -> dict[str, Any]:
    """How much sooner the configuration reaches the bound that a plain recipe reaches in so many minutes.

    The plain recipe is that of nanodlm/plain.py: a transformer of 4 layers of width 128, rows of 128 tokens, 32 to an
    update. Then the configuration, for each number of updates a whole run with a schedule of its own, until one is at
    least as good. Both train on the same shards and are scored on the same held-out tokens, each cut into rows of its
    own length.

    Args:
        config: The recipe that is to be faster.
        store: Where the tokens lie, or will.
        minutes: Training of the plain recipe.
        updates: Numbers of updates to try, from the fewest on.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        `plain` and, in a list, `ours`, each with `updates`, `tokens`, `seconds` (of training), `compile_seconds`,
        `bits_per_byte`, `stderr`. `ratio` of the seconds of both, and `ratio_with_compilation`; None when the plain
        bound was never reached.

    Raises:
        UsageError: For a time or numbers of updates that are not positive.

    Example:
        race(nanodlm.PRESETS["demo"], Store("data/store"), minutes=10)["ratio"]
    """
    if minutes <= 0:
        raise UsageError(f"the plain recipe needs time, not {minutes:g} minutes: raise --minutes")
    if not updates or min(updates) < 1:
        raise UsageError(f"--updates lists numbers of updates, 1 and more, not {list(updates)}")
    text = load_text(config, store, emit)

    def result(trained: Trained, text: Text, objective: Objective, name: str) -> dict[str, Any]:
        bits, stderr = _bits(text, trained.model, objective, config, emit)
        emit("message", text=f"{name}: {trained.updates:,} updates, {trained.seconds:.1f} s, {bits:.4f} ± {stderr:.4f}")
        cost = {key: value for key, value in trained._asdict().items() if key != "model"}
        return {**cost, "bits_per_byte": bits, "stderr": stderr}

    recut = text.recut(PLAIN_LENGTH)
    objective = Objective(make_schedule("linear"), Vocabulary.of(text.encoding).mask_id)
    slow = result(train_plain(recut, minutes, emit), recut, objective, "plain")
    ours: list[dict[str, Any]] = []
    for number in sorted(updates):
        chosen = shortened(config, number)
        trained = Trainer(chosen, text)(chosen, emit)
        ours.append(result(trained, text, make_objective(chosen, Vocabulary.of(text.encoding)), "ours"))
        if ours[-1]["bits_per_byte"] <= slow["bits_per_byte"]:
            break
    won = ours[-1]["bits_per_byte"] <= slow["bits_per_byte"]
    whole = [row["seconds"] + row["compile_seconds"] for row in (slow, ours[-1])]
    return {
        "plain": slow,
        "ours": ours,
        "ratio": slow["seconds"] / ours[-1]["seconds"] if won else None,
        "ratio_with_compilation": whole[0] / whole[1] if won else None,
    }


# Ablations

PRESET = "preset"


def variants(updates: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What is changed, by name: the groups for `Config.replace`, in runs of so many updates.

    >>> variants(100)["decay-20"]
    {'train': {'lr_schedule': 'warmup_stable_decay', 'cooldown_steps': 20}}
    """

    def decay(share: float) -> dict[str, dict[str, Any]]:
        return {"train": {"lr_schedule": "warmup_stable_decay", "cooldown_steps": round(share * updates)}}

    return {
        PRESET: {},
        "adamw-4e-3": {"train": {"optimizer": "adamw", "lr": 4e-3}},
        "adamw-8e-3": {"train": {"optimizer": "adamw", "lr": 8e-3}},
        "qk-norm": {"model": {"qk_norm": True}},
        "no-qk-norm": {"model": {"qk_norm": False}},
        "no-zero-init": {"model": {"zero_init": False}},
        "no-conv": {"model": {"conv_width": 0}},
        "untied": {"model": {"tie_embeddings": False}},
        "cosine": {"train": {"lr_schedule": "warmup_cosine"}},
        "decay-20": decay(0.2),
        "decay-50": decay(0.5),
        "decay-all": decay(1.0),
        "ema-0.99": {"train": {"ema_decay": 0.99}},
        "ema-0.999": {"train": {"ema_decay": 0.999}},
        "weights-bound": {"objective": {"weighting": "bound"}},
        "weights-uniform": {"objective": {"weighting": "uniform"}},
        "continuous": {"objective": {"estimator": "continuous"}},
        "count": {"objective": {"estimator": "count"}},
        "constant-count": {"objective": {"estimator": "constant_count"}},
        "independent-times": {"objective": {"times": "independent"}},
        "bfloat16": {"model": {"dtype": "bfloat16"}},
    }


def ablation(
    config: Config,
    store: Store,
    *,
    seeds: int = 3,
    updates: int | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
    emit: Emit = lambda *_, **__: None,
) -> list[dict[str, Any]]:
    """Train variants of a configuration on the same tokens with several seeds, and score each on held-out rows.

    A seed is that of the noise, of the initial parameters and of the order of the rows at once; all variants see the
    same ones, so differences are taken seed by seed. Variants that equal the configuration itself are left out.

    Args:
        config: The preset; `eval.max_rows` held-out rows are scored.
        store: Where the tokens lie, or will.
        seeds: Runs of each variant.
        updates: Of each run; `train.max_steps` by default.
        only: Names of `variants`; all by default. The preset is always there.
        out: A file to which each run is appended as a line of JSON. Runs that are in it already, with the same settings
            on the same tokens, are not repeated; runs of other code or devices are not told apart.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        Rows from the best to the worst: `variant`, `seeds`, `bits_per_byte` (mean), `sd` (over seeds), `difference` (to
        the preset) and `difference_stderr`, `seconds` (of training, mean). What a single seed does not tell is None, as
        are the numbers of a variant of which a run diverged.

    Raises:
        UsageError: For an unknown variant, or no seeds or updates.

    Example:
        ablation(nanodlm.PRESETS["demo"], Store("data/store"), updates=300, only=["no-conv"], out=Path("runs.jsonl"))
    """
    if seeds < 1 or (updates is not None and updates < 1):
        raise UsageError("an ablation takes one seed and one update at least: raise --seeds or --updates")
    config = shortened(config, updates or config.train.max_steps)
    table = variants(config.train.max_steps)
    if unknown := [name for name in only if name not in table]:
        raise UsageError(f"no variant {unknown[0]!r}: choose from {', '.join(table)}")
    chosen = {name: config.replace(**table[name]) for name in table if name in (PRESET, *(only or table))}
    chosen = {name: c for name, c in chosen.items() if name == PRESET or c != config}
    text = load_text(config, store, emit)
    known = _read(out)
    records: dict[str, list[dict[str, Any]]] = {}
    for i, (name, variant) in enumerate(chosen.items()):
        trainer = None
        for seed in range(seeds):
            seeded = variant.replace(
                train={"seed": config.train.seed + seed},
                model={"init_seed": config.model.init_seed + seed},
                data={"shuffle_seed": config.data.shuffle_seed + seed},
            )
            identity = {"tokens": text.digest, **seeded.model_dump(exclude={"exp", "sample"})}
            fingerprint = fingerprint_of(identity)
            if fingerprint not in known:
                trainer = trainer or Trainer(variant, text)
                known[fingerprint] = {"fingerprint": fingerprint, "variant": name, "seed": seed}
                known[fingerprint] |= _measure(trainer, seeded, text, emit)
                if out:
                    _append(out, known[fingerprint])
            record = known[fingerprint]
            records.setdefault(name, []).append(record)
            bits = "diverged" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.4f} bits per byte"
            emit("message", text=f"{i * seeds + seed + 1}/{len(chosen) * seeds} {name}, seed {seed}: {bits}")
    rows = [_compare(name, runs, records[PRESET]) for name, runs in records.items()]
    return sorted(rows, key=lambda row: math.inf if row["bits_per_byte"] is None else row["bits_per_byte"])


def _read(out: Path | None) -> dict[str, dict[str, Any]]:
    """Finished runs of a file by fingerprint; a line that a kill cut short is none."""
    runs = {}
    for line in out.read_text().splitlines() if out and out.exists() else ():
        if not line.startswith('{"fingerprint"'):
            raise UsageError(f"{out} holds lines that are no runs: name another file with --out")
        with contextlib.suppress(ValueError):
            run = json.loads(line)
            runs[run["fingerprint"]] = run
    return runs


def _append(out: Path, run: dict[str, Any]) -> None:
    """Add a line to a file, of which the last one may have been cut short."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cut = out.exists() and out.read_bytes()[-1:] not in (b"", b"\n")
    with out.open("a") as file:
        file.write("\n" * cut + json.dumps(run) + "\n")


def _measure(trainer: Trainer, config: Config, text: Text, emit: Emit) -> dict[str, Any]:
    """Train and score one run."""
    trained = trainer(config, emit)
    bits, stderr = _bits(text, trained.model, make_objective(config, Vocabulary.of(text.encoding)), config, emit)
    sound = math.isfinite(bits)
    return {
        "bits_per_byte": bits if sound else None,
        "stderr": stderr if sound else None,
        "updates": trained.updates,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "device": jax.devices()[0].device_kind,
    }


def _compare(name: str, runs: list[dict[str, Any]], preset: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table."""
    row = {"variant": name, "seeds": len(runs), "seconds": float(np.mean([run["seconds"] for run in runs]))}
    row |= dict.fromkeys(("bits_per_byte", "sd", "difference", "difference_stderr"))
    bits, base = ([run["bits_per_byte"] for run in of] for of in (runs, preset))
    if None in bits:
        return row
    row["bits_per_byte"] = float(np.mean(bits))
    if len(bits) > 1:
        row["sd"] = float(np.std(bits, ddof=1))
    if name != PRESET and None not in base:
        differences = np.subtract(bits, base)
        row["difference"] = float(differences.mean())
        if len(bits) > 1:
            row["difference_stderr"] = float(differences.std(ddof=1)) / math.sqrt(len(bits))
    return row
