"""Orbax checkpoints as parts of an attempt, and loading a trained model back.

    checkpoints/step_000100/{model_state, ema_state, optimizer_state}

A checkpoint counts once its files are recorded with their sha256 (`Attempt.finish`); a killed save leaves none.
"""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tiktoken
from flax import nnx

from nanodlm import tokenizer
from nanodlm.config import Config, load_config
from nanodlm.errors import NanodlmError
from nanodlm.losses import Objective
from nanodlm.model import Transformer
from nanodlm.schedules import make_schedule

if TYPE_CHECKING:
    from nanodlm.store import Attempt

logging.getLogger("absl").setLevel(logging.ERROR)

State = dict[str, Any]  # {"model_state", "optimizer_state", "step"} and, when an average is kept, "ema_state"


def _items(state: State) -> dict[str, Any]:
    """What goes into a checkpoint, by the names of its folders."""
    items = {name: state[name] for name in ("model_state", "ema_state") if name in state}
    return {**items, "optimizer_state": {"optimizer": state["optimizer_state"], "step": state["step"]}}


class Checkpoints:
    """Saves in the background and keeps the last few; use as a context manager."""

    def __init__(self, attempt: "Attempt", keep: int):
        self._attempt, self._keep = attempt, keep
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._pending: tuple[str, dict[str, Any]] | None = None
        self._kept: list[str] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Record the save under way, even when the training failed after it."""
        try:
            self.finish()
        finally:
            self._checkpointer.close()

    def save(self, state: State, step: int, **info: Any) -> None:
        """Start saving after update `step`; the save before it is finished first.

        Args:
            state: The training state; it may be donated to the next update as soon as this returns.
            step: Updates done.
            **info: JSON that `restore` gives back.
        """
        self.finish()
        name = f"checkpoints/step_{step:06d}"
        args = {key: ocp.args.StandardSave(item) for key, item in _items(state).items()}  # type: ignore[call-arg]
        self._checkpointer.save((self._attempt.path / name).absolute(), args=ocp.args.Composite(**args))
        self._pending = (name, info)

    def finish(self) -> None:
        """Wait for the running save, record it, and drop the oldest beyond `keep`."""
        if self._pending is None:
            return
        (name, info), self._pending = self._pending, None
        self._checkpointer.wait_until_finished()
        folder = self._attempt.path / name
        files = [p.relative_to(self._attempt.path).as_posix() for p in folder.rglob("*") if p.is_file()]
        self._attempt.finish(name, files, **info)
        self._kept.append(name)
        for old in self._kept[: -self._keep]:
            self._attempt.forget(old)
        self._kept = self._kept[-self._keep :]

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest whole checkpoint of an earlier attempt and its info, or None.

        Args:
            abstract: Shapes, types and shardings of the state, as `jax.eval_shape` gives them.
        """
        names = [name for name in self._attempt.earlier if name.startswith("checkpoints/")]
        for name in sorted(names, key=_step_of, reverse=True):
            info = self._attempt.adopt(name)
            if info is not None:
                self._kept.append(name)
                return _restore(self._checkpointer, self._attempt.path / name, abstract), info
        return None


def _step_of(name: str) -> int:
    """Updates done at `…step_000100`."""
    return int(name.rpartition("_")[2])


def _restore(checkpointer: ocp.AsyncCheckpointer, folder: Path, abstract: State) -> State:
    args = {key: ocp.args.StandardRestore(item) for key, item in _items(abstract).items()}  # type: ignore[call-arg]
    items = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**args))
    state = {key: items[key] for key in args if key != "optimizer_state"}
    return {**state, "optimizer_state": items["optimizer_state"]["optimizer"], "step": items["optimizer_state"]["step"]}


def make_model(config: Config, encoding: tiktoken.Encoding) -> Transformer:
    """A freshly initialised network for a configuration and a tokenizer."""
    shape = config.model.model_dump(exclude={"init_seed", "seq_len"})
    block_size = {"block": config.objective.block_size, "autoregressive": 1}.get(config.objective.kind, 0)
    rngs = nnx.Rngs(config.model.init_seed)
    return Transformer(vocab_size=tokenizer.padded_vocab_size(encoding), block_size=block_size, **shape, rngs=rngs)


def make_objective(config: Config, encoding: tiktoken.Encoding) -> Objective:
    """The objective that a configuration trains on."""
    schedule = make_schedule(**config.schedule.model_dump())
    return Objective(schedule, encoding.n_vocab, **config.objective.model_dump())


def load(uri: str) -> tuple[Transformer, tiktoken.Encoding]:
    """Load a trained model and its tokenizer.

    Args:
        uri: A train artifact's URI, that of an artifact made from it, or a checkpoint's folder. When the run kept
            an average of the parameters, that is what is loaded.

    Raises:
        NanodlmError: When there is no model there.
        Damaged: When its files are not what their manifest says.

    Example:
        model, tokenizer = nanodlm.load("data/store/train/3f2a…")
        logits = model(x_t, t)
    """
    from nanodlm.store import Store

    base, _, tail = uri.rstrip("/").rpartition("/checkpoints/")
    if base and Path(base).is_dir():
        return load_folder(Path(base), tail)
    parts = uri.rstrip("/").removesuffix("/manifest.json").rsplit("/", 2)
    if len(parts) < 3:
        raise NanodlmError(
            f"no model at {uri!r}: name an artifact, as `nanodlm ls` prints it, or a checkpoint's folder"
        )
    artifact = Store(parts[0]).open(uri)
    if artifact.stage != "train":
        if "train" not in artifact.manifest["inputs"]:
            raise NanodlmError(f"{uri} is a {artifact.stage} artifact, made before any model")
        artifact = artifact.store.open(f"train/{artifact.manifest['inputs']['train']['fingerprint']}")
    return load_folder(artifact.local())


def load_folder(folder: Path, step: str = "") -> tuple[Transformer, tiktoken.Encoding]:
    """The model of one checkpoint (the last by default) in a run's folder, beside its config and tokenizer."""
    config = load_config(str(folder / "config.json"))
    encoding = tokenizer.load(folder / "tokenizer")
    steps = sorted((folder / "checkpoints").glob(step or "step_*"), key=lambda path: _step_of(path.name))
    if not steps:
        raise NanodlmError(f"no checkpoint {step} in {folder}/checkpoints")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(config, encoding)))
    device = jax.devices()[0]
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
        nnx.to_pure_dict(abstract),
    )
    item = "ema_state" if (steps[-1] / "ema_state").exists() else "model_state"
    with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})  # type: ignore[call-arg]
        params = checkpointer.restore(steps[-1].absolute(), args=args)[item]
    return nnx.merge(graphdef, params), encoding


def parameters_sha256(params: Any) -> str:
    """sha256 over the bytes of all parameters, in the order of their sorted paths.

    >>> import jax.numpy as jnp
    >>> parameters_sha256({"a": jnp.zeros(1)}) == parameters_sha256({"a": jnp.ones(1)})
    False
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    digest = hashlib.sha256()
    for _, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0], simple=True, separator="/")):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
