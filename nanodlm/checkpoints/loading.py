"""Loading a trained model from an artifact, a checkpoint or a folder."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tiktoken
from flax import nnx
from jax.experimental.multihost_utils import process_allgather

from nanodlm.build import make_model
from nanodlm.checkpoints.saving import _step_of
from nanodlm.config import load_config, refuse_secrets
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError
from nanodlm.model.transformer import Transformer

if TYPE_CHECKING:
    from nanodlm.store import Artifact


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

    base, _, step = refuse_secrets(uri).rstrip("/").removesuffix("/manifest.json").partition("/checkpoints/")
    address = re.sub(r"/attempts/[^/]+$", "", base)  # that of the artifact, when a run has committed its folder
    parts = address.rsplit("/", 2)
    artifact = Store(parts[0]).find(parts[1], parts[2]) if len(parts) == 3 and _is_hex(parts[2]) else None
    if artifact is None:
        if step and Path(base).is_dir():  # of a run under way, or a copy of a run's folder
            return load_folder(Path(base), step)
        raise NanodlmError(
            f"no model at {uri!r}: name an artifact, as `nanodlm ls` prints it, or a checkpoint's folder"
        )
    if artifact.stage != "train":
        if "train" not in artifact.manifest["inputs"]:
            raise NanodlmError(f"{uri} is a {artifact.stage} artifact, made before any model")
        artifact = artifact.store.open(f"train/{artifact.manifest['inputs']['train']['fingerprint']}")
    return load_artifact(artifact, step)


def _is_hex(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{8,64}", text) is not None


def load_artifact(artifact: "Artifact", step: str = "") -> tuple[Transformer, tiktoken.Encoding]:
    """The model of one checkpoint (the last by default) of a train artifact; no more of it is read than that.

    Raises:
        NanodlmError: When it has no such checkpoint.
        Damaged: When a file is not what the manifest says.
    """
    if step.removeprefix("step_").isdecimal():
        step = f"step_{_step_of(step):06d}"  # step_100 names it as well
    paths = [file["path"] for file in artifact.files("checkpoints/")]
    steps = sorted({path.split("/")[1] for path in paths}, key=_step_of)
    if not steps or (step and step not in steps):
        raise NanodlmError(f"no checkpoint {step} in {artifact.uri}: there are {', '.join(steps) or 'none'}")
    folder = f"checkpoints/{step or steps[-1]}"
    item = "ema_state" if any(path.startswith(f"{folder}/ema_state/") for path in paths) else "model_state"
    local = artifact.local("config.json", "tokenizer/", f"{folder}/{item}/", f"{folder}/_")
    return load_folder(local, step or steps[-1])


def load_folder(folder: Path, step: str = "") -> tuple[Transformer, tiktoken.Encoding]:
    """The model of one checkpoint (the last by default) in a run's folder, beside its config and tokenizer."""
    config = load_config(str(folder / "config.json"))
    encoding = tokenizer.load(folder / "tokenizer")
    if step.removeprefix("step_").isdecimal():
        step = f"step_{_step_of(step):06d}"  # step_100 names it as well
    steps = sorted((folder / "checkpoints").glob(step or "step_*"), key=lambda path: _step_of(path.name))
    if not steps:
        raise NanodlmError(f"no checkpoint {step} in {folder}/checkpoints")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(config, Vocabulary.of(encoding))))
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
    """sha256 over the bytes of all parameters, in the order of their sorted paths; every process must call it.

    >>> import jax.numpy as jnp
    >>> parameters_sha256({"a": jnp.zeros(1)}) == parameters_sha256({"a": jnp.ones(1)})
    False
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    digest = hashlib.sha256()
    for _, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0], simple=True, separator="/")):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = process_allgather(leaf, tiled=True)
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
