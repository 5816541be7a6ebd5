"""Writing a model as one folder that people share: `load`, `transformers`, `tokenizers` and `tiktoken` read it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiktoken
from flax import nnx
from safetensors.numpy import save_file

from nanodlm.checkpoints.exported import CONFIG, FORMAT, RANKS, WEIGHTS, to_tensors
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import Config
from nanodlm.data import tokenizer
from nanodlm.data.huggingface import tokenizer_config, tokenizer_json
from nanodlm.errors import UsageError, full_disk_named
from nanodlm.model.transformer import Transformer
from nanodlm.store import Json, sealed
from nanodlm.store.disk import sha256_of

CARD = "README.md"
MODELING = Path(__file__).with_name("modeling_nanodlm.py")
SHAPE = ("n_layers", "n_heads", "d_model", "d_ff", "conv_width", "time_conditioning", "tie_embeddings", "qk_norm")


def export(model: Transformer, encoding: tiktoken.Encoding, config: Config, folder: Path, card: str) -> None:
    """Write a model, its tokenizer, its settings and its card into a new folder, which appears once it is whole.

    A folder that holds something is refused. A killed export leaves one beside it, named `.NAME.export`, which the
    next replaces and in which `config.json`, the last file to be written, is missing: nothing loads it.
    """
    with _new(folder) as new, full_disk_named(str(folder)):
        save_file(to_tensors(nnx.to_pure_dict(nnx.state(model))), new / WEIGHTS, metadata={"format": "pt"})
        tokenizer.write_ranks(encoding, new / RANKS)
        shutil.copymode(new / RANKS, new / WEIGHTS)  # which its library writes for nobody else to read
        _write(new / "tokenizer.json", tokenizer_json(encoding))
        _write(new / "tokenizer_config.json", tokenizer_config(model.seq_len))
        shutil.copyfile(MODELING, new / MODELING.name)
        (new / CARD).write_text(card)
        _write(new / CONFIG, settings(model, encoding, config, new))


def settings(model: Transformer, encoding: tiktoken.Encoding, config: Config, folder: Path) -> Json:
    """Return the `config.json` of a folder that holds the other files: what `transformers` reads, then our record."""
    record = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "tokenizer": {"pattern": encoding._pat_str, "special_tokens": encoding._special_tokens},
        "parameters_sha256": parameters_sha256(nnx.to_pure_dict(nnx.state(model))),
        "files": {name: sha256_of(folder / name) for name in (WEIGHTS, RANKS)},
    }
    named = {"AutoConfig": "NanodlmConfig", "AutoModel": "NanodlmModel", "AutoModelForMaskedLM": "NanodlmModel"}
    return {
        "model_type": "nanodlm",
        "architectures": ["NanodlmModel"],
        "auto_map": {auto: f"{MODELING.stem}.{ours}" for auto, ours in named.items()},
        "dtype": "float32",
        "vocab_size": model.embedding.num_embeddings,
        **config.model.model_dump(include=set(SHAPE)),
        "block_size": model.block_size,
        "mask_token_id": encoding.n_vocab,
        "eos_token_id": encoding.eot_token,
        "nanodlm": sealed(record),
    }


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which becomes the one that is named when the block ends well, and goes when not."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is there already: name a new folder, or an empty one")
    whole = Path(os.path.abspath(folder))
    new = whole.with_name(f".{whole.name}.export")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        new.rename(whole)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(file: Path, value: Json) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False))
