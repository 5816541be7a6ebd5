"""Loading a trained model from an artifact, a checkpoint or a folder."""

import hashlib
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tiktoken
from flax import nnx
from jax.experimental.multihost_utils import process_allgather

from nanodlm.build import make_model
from nanodlm.checkpoints.exported import load_exported
from nanodlm.checkpoints.finding import is_exported, step_name, step_of
from nanodlm.config import Config, differences, explain, parse_address, training_settings
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.model.transformer import Transformer
from nanodlm.provenance import changed_since, remark
from nanodlm.store import Artifact, Store
from nanodlm.store.cache import keep_compiled


def load(uri: str) -> tuple[Transformer, tiktoken.Encoding]:
    """Load a trained model and its tokenizer.

    Args:
        uri: A train artifact's URI, that of an artifact made from it, a checkpoint's folder, or an exported folder.
            When the run kept an average of the parameters, that is what is loaded.

    Example:
        model, tokenizer = nanodlm.load("data/store/train/3f2a…")
        logits = model(x_t, t)
    """
    keep_compiled()
    folder, step, artifact = locate(uri)
    if artifact and (changed := changed_since(artifact)):
        warnings.warn(f"{artifact.uri} was {remark(changed)}", stacklevel=2)
    return load_exported(folder) if step is None else load_folder(folder, step)


def locate(uri: str) -> tuple[Path, int | None, Artifact | None]:
    """Return a model's verified folder, its checkpoint (None if it was exported) and, in a store, its artifact."""
    if is_exported(uri):
        return Path(uri), None, None
    folder, store, stage, fingerprint, step = parse_address(uri)
    is_artifact = store and re.fullmatch(r"[0-9a-f]{4,64}", fingerprint)
    artifact = Store(store).find(stage, fingerprint) if is_artifact else None
    if artifact is None and is_artifact and step is None:  # it may be the beginning of a fingerprint
        artifact = Store(store).open(f"{stage}/{fingerprint}")
    if artifact is None:
        if step is not None and Path(folder).is_dir():  # of a run under way, or a copy of a run's folder
            return Path(folder), step, None
        known = "an artifact, as data/store/train/3f2a, a checkpoint's folder or an exported one"
        raise NanodlmError(f"no model at {uri!r}: name {known}")
    if artifact.stage != "train":
        inputs = dict(artifact.inputs)
        if "train" not in inputs:
            raise NanodlmError(f"{uri} is a {artifact.stage} artifact, made before any model")
        artifact = artifact.store.open(f"train/{inputs['train']}")
    return *fetch(artifact, step), artifact


def load_artifact(artifact: Artifact, step: int | None = None) -> tuple[Transformer, tiktoken.Encoding]:
    """Load one checkpoint (the last by default) of a train artifact; no more of it is read than that."""
    return load_folder(*fetch(artifact, step))


def fetch(artifact: Artifact, step: int | None = None) -> tuple[Path, int]:
    """Return the folder with the verified files of one checkpoint (the last by default), and which one it is."""
    paths = [file["path"] for file in artifact.files("checkpoints/")]
    steps = sorted({step_of(path.split("/")[1]) for path in paths})
    step = steps[-1] if step is None else step
    if step not in steps:
        have = ", ".join(f"step_{number}" for number in steps)
        raise NanodlmError(f"no checkpoint step_{step} in {artifact.uri}: there are {have}")
    folder = step_name(step)
    item = "ema_state" if any(path.startswith(f"{folder}/ema_state/") for path in paths) else "model_state"
    return artifact.local("config.json", "tokenizer/", f"{folder}/{item}/", f"{folder}/_"), step


def read_config(folder: Path) -> Config:
    """Read the settings that lie beside a run's checkpoints; what an earlier version has not written is as it was."""
    try:
        return Config.model_validate_json((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'config.json'} is not a valid config: {explain(error)}") from error


def load_folder(folder: Path, step: int) -> tuple[Transformer, tiktoken.Encoding]:
    """Load one checkpoint in a run's folder, beside its config and tokenizer."""
    config = read_config(folder)
    encoding = tokenizer.load(folder / "tokenizer")
    checkpoint = (folder / step_name(step)).absolute()
    if not checkpoint.is_dir():
        raise NanodlmError(f"no checkpoint step_{step} in {folder}")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(config, Vocabulary.of(encoding))))
    shape = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    target = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), nnx.to_pure_dict(abstract))
    item = "ema_state" if (checkpoint / "ema_state").exists() else "model_state"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        remembered = (checkpointer.metadata(checkpoint).custom_metadata or {}).get("config")  # not by earlier versions
        now, names = training_settings(config), ("model", "objective", "schedule")
        if remembered and (changed := differences({n: remembered[n] for n in names}, {n: now[n] for n in names})):
            fields = "; ".join(f"{field}: {values}" for field, values in changed.items())
            what = f"{folder / 'config.json'} is not what the checkpoint was trained with"
            raise NanodlmError(f"{what} ({fields}): put it right")
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})  # type: ignore[call-arg]
        params = checkpointer.restore(checkpoint, args=args)[item]
    model = nnx.merge(graphdef, params)
    return model, encoding


def parameters_sha256(params: Any) -> str:
    """Return the sha256 over the bytes of all parameters, in the order of their paths; every process calls it."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    digest = hashlib.sha256()
    for _, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0], simple=True, separator="/")):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = process_allgather(leaf, tiled=True)
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
