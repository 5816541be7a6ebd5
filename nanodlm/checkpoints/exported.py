"""A model as one folder to share: `export` writes it; `load`, `transformers`, `tokenizers` and `tiktoken` read it.

    config.json           the shape for `transformers`; under "nanodlm" the sealed record that `load` reads
    model.safetensors     the parameters, as PyTorch names and holds them
    tokenizer.tiktoken    the tokens and their ids

The record holds the run's settings and the sha256 of both these files. The others are for other programs, and people.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from safetensors.numpy import load_file, save_file

from nanodlm.build import make_model
from nanodlm.config import Config, explain
from nanodlm.data import tokenizer
from nanodlm.data.huggingface import tokenizer_config, tokenizer_json
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import Damaged, UsageError, full_disk_named
from nanodlm.model.transformer import Transformer
from nanodlm.store import Json, sealed
from nanodlm.store.disk import sha256_of
from nanodlm.store.manifest import is_sealed

CONFIG, WEIGHTS, RANKS, CARD = "config.json", "model.safetensors", "tokenizer.tiktoken", "README.md"
MODELING = Path(__file__).with_name("modeling_nanodlm.py")
FORMAT = 1
SHAPE = {"n_layers", "n_heads", "d_model", "d_ff", "conv_width", "time_conditioning", "tie_embeddings", "qk_norm"}
Keys = tuple[Any, ...]  # of a parameter, in the tree of all


def export(model: Transformer, encoding: tiktoken.Encoding, config: Config, folder: Path, card: str) -> None:
    """Write a model, its tokenizer, its settings and its card into a new folder, which appears once it is whole.

    A folder that holds something is refused. A killed export leaves one beside it, named `.NAME.export`, which the
    next replaces; until `config.json`, the last file, is written, nothing loads it.
    """
    with _new(folder) as new, full_disk_named(str(folder)):
        save_file(to_tensors(nnx.to_pure_dict(nnx.state(model))), new / WEIGHTS, metadata={"format": "pt"})
        tokenizer.write_ranks(encoding, new / RANKS)
        shutil.copymode(new / RANKS, new / WEIGHTS)  # which its library writes for nobody else to read
        shutil.copyfile(MODELING, new / MODELING.name)
        (new / CARD).write_text(card)
        settings = {
            "model_type": "nanodlm",
            "architectures": ["NanodlmModel"],
            "auto_map": {f"Auto{what}": f"{MODELING.stem}.Nanodlm{what}" for what in ("Config", "Model")},
            "dtype": "float32",
            "vocab_size": model.embedding.num_embeddings,
            **config.model.model_dump(include=SHAPE),
            "block_size": model.block_size,
            "mask_token_id": encoding.n_vocab,
            "eos_token_id": encoding.eot_token,
        }
        record = {"format": FORMAT, "config": config.model_dump(mode="json")}
        record["tokenizer"] = {"pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
        record["files"] = {name: sha256_of(new / name) for name in (WEIGHTS, RANKS)}
        (new / "tokenizer.json").write_text(json.dumps(tokenizer_json(encoding), ensure_ascii=False))
        (new / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(model.seq_len), indent=1))
        (new / CONFIG).write_text(json.dumps(settings | {"nanodlm": sealed(record)}, indent=1))


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which becomes the one that is named when the block ends well, and goes when not."""
    whole = Path(os.path.abspath(folder))
    new = whole.with_name(f".{whole.name}.export")
    try:
        if whole.exists() and any(whole.iterdir()):
            raise UsageError(f"{folder} is there already: name a new folder, or an empty one")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        new.rename(whole)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_exported(folder: Path) -> tuple[Transformer, tiktoken.Encoding]:
    """Load the model and the tokenizer of an exported folder; a file that is not what was exported raises `Damaged`."""
    record, config = read_record(folder)
    for name in (WEIGHTS, RANKS):
        sha256 = record["files"][name]
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise Damaged(f"{folder / name} is not what was exported, by its sha256: copy the folder again")
    encoding = tokenizer.make_encoding(config.data.tokenizer, tokenizer.parse_ranks((folder / RANKS).read_bytes()))
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
        raise Damaged(f'{path} has been altered under "nanodlm": copy the folder again')
    if record.get("format") != FORMAT:
        raise UsageError(f"{path} is of format {record.get('format')}, and this version reads {FORMAT}: update nanodlm")
    if lacking := sorted({WEIGHTS, RANKS} - (record.get("files") or {}).keys()):
        raise Damaged(f"{path} has no sha256 of {' and '.join(lacking)}: copy the folder again")
    try:
        return record, Config.model_validate(record.get("config"))
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
