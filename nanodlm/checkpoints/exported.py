"""The folder that `nanodlm export` writes, as `load` reads it: verified, its parameters by PyTorch's names.

    config.json           the shape for `transformers`; under "nanodlm" the sealed record that `load` reads
    model.safetensors     the parameters, as PyTorch names and holds them
    tokenizer.tiktoken    the tokens and their ids

The record holds the run's settings and the sha256 of both these files. The others are for other programs, and people.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from safetensors.numpy import load_file

from nanodlm.build import make_model
from nanodlm.config import Config, explain
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import Damaged, UsageError
from nanodlm.model.transformer import Transformer
from nanodlm.store import Json
from nanodlm.store.disk import sha256_of
from nanodlm.store.manifest import is_sealed

CONFIG, WEIGHTS, RANKS = "config.json", "model.safetensors", "tokenizer.tiktoken"
FORMAT = 1
Keys = tuple[Any, ...]  # of a parameter, in the tree of all


def load_exported(folder: Path) -> tuple[Transformer, tiktoken.Encoding]:
    """Load the model and the tokenizer of an exported folder, after checking that its files are those it was left with.

    Files that are missing, truncated, swapped or altered raise `Damaged`.
    """
    record, config = read_record(folder)
    for name, sha256 in record["files"].items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise Damaged(f"cannot read {folder / name}: {error.strerror}; copy the folder again") from error
        if found != sha256:
            what = f"{folder / name} is not what was exported: its sha256 is {found[:16]}…, not {sha256[:16]}…"
            raise Damaged(f"{what}; copy the folder again")
    encoding = tokenizer.make_encoding(config.data.tokenizer, tokenizer.read_ranks(folder / RANKS))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(config, Vocabulary.of(encoding))))
    return nnx.merge(graphdef, of_tensors(nnx.to_pure_dict(abstract), load_file(folder / WEIGHTS))), encoding


def read_record(folder: Path) -> tuple[Json, Config]:
    """Return what an exported folder says of itself, and its settings; its other files are not read."""
    path = folder / CONFIG
    try:
        record = json.loads(path.read_text())["nanodlm"]
        sound = is_sealed(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is not the config.json of an exported folder: copy the folder again") from error
    if not sound:
        raise Damaged(f'{path} has been altered under "nanodlm": its checksum is not that of its content')
    if record["format"] != FORMAT:
        raise UsageError(f"{path} is of format {record['format']}, and this version reads {FORMAT}: update nanodlm")
    try:
        return record, Config.model_validate(record["config"])
    except ValueError as error:
        raise UsageError(f"{path} holds no valid config: {explain(error)}") from error


def to_tensors(params: Json) -> dict[str, np.ndarray]:
    """Return the parameters of a network as PyTorch names and holds them: layers apart, matrices output by input.

    >>> to_tensors({"blocks": {"mlp_in": {"kernel": np.ones((1, 8, 3))}}})["blocks.0.mlp_in.weight"].shape
    (3, 8)
    """
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for name, layer in _places(path, leaf):
            array = np.asarray(leaf)[layer]
            tensors[name] = np.ascontiguousarray(array.T if _is_matrix(path) else array)
    return tensors


def of_tensors(abstract: Json, tensors: dict[str, np.ndarray]) -> Json:
    """Return the parameters that `to_tensors` was given, for a network's abstract ones, on the first device."""

    def gather(path: Keys, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        arrays = [tensors[name].T if _is_matrix(path) else tensors[name] for name, _ in _places(path, leaf)]
        return jnp.asarray(np.stack(arrays) if path[0].key == "blocks" else arrays[0])

    return jax.tree_util.tree_map_with_path(gather, abstract)


def _is_matrix(path: Keys) -> bool:
    return path[-1].key == "kernel"  # embeddings are held alike by both


def _places(path: Keys, leaf: Any) -> Iterator[tuple[str, Any]]:
    """Yield PyTorch's names of a parameter, with what of it each is: one of the layers, or the whole."""
    first, *modules = (key.key for key in path[:-1])
    last = "bias" if path[-1].key == "bias" else "weight"
    if first != "blocks":
        yield ".".join([first, *modules, last]), ...
    else:
        yield from ((".".join([first, str(layer), *modules, last]), layer) for layer in range(leaf.shape[0]))
