"""A model as a folder that people share: read back bit for bit, refused when it is not what was exported."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiktoken.load import load_tiktoken_bpe

import nanodlm
from nanodlm.build import make_model
from nanodlm.checkpoints.exported import export
from nanodlm.checkpoints.finding import find_model
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.cli.main import main
from nanodlm.config import Config
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Store, sealed
from tests.support.commands import full
from tests.support.training import tiny

ALL = {"conv_width": 3, "time_conditioning": True, "tie_embeddings": True, "qk_norm": False}
FILES = {"README.md", "config.json", "model.safetensors", "modeling_nanodlm.py"}
FILES |= {"tokenizer.json", "tokenizer.tiktoken", "tokenizer_config.json"}


@cache
def drawn(config: Config) -> Transformer:
    """A network whose parameters are all random: of a fresh one many are zero, or one."""
    graphdef, state = nnx.split(make_model(config, Vocabulary.of(tokenizer.plain_bytes())))
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, noisy))


def sha256_of(model: Transformer) -> str:
    return parameters_sha256(nnx.to_pure_dict(nnx.state(model)))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(drawn(tiny()), tokenizer.plain_bytes(), tiny(), tmp_path / "shared", "# A card")
    return tmp_path / "shared"


def test_a_folder_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    config = tiny(model={**ALL, "n_layers": 3})
    ours = drawn(config)
    export(ours, tokenizer.plain_bytes(), config, tmp_path / "shared", "# A card")
    assert {file.name for file in (tmp_path / "shared").iterdir()} == FILES
    theirs, encoding = nanodlm.load(str(tmp_path / "shared"))
    assert sha256_of(theirs) == sha256_of(ours)
    assert (theirs.objective.mask_id, theirs.seq_len, theirs.padding) == (257, 32, None)
    assert theirs.sampling.temperature == config.sample.temperature != 1
    assert encoding.encode_ordinary("é") == [0xC3, 0xA9]


def test_tiktoken_reads_the_tokenizer_as_the_card_says(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    record = json.loads((exported / "config.json").read_text())["nanodlm"]
    found = load_tiktoken_bpe(str(exported / "tokenizer.tiktoken"), record["files"]["tokenizer.tiktoken"])
    assert found == tokenizer.plain_bytes()._mergeable_ranks
    assert record["tokenizer"] == {"pattern": tokenizer.PATTERN, "special_tokens": {"<|endoftext|>": 256}}


def swap(path: Path) -> None:
    """The weights of another model of the same shape."""
    other = path.parent / "other"
    export(drawn(tiny(model={"init_seed": 5})), tokenizer.plain_bytes(), tiny(), other, "")
    (other / "model.safetensors").replace(path / "model.safetensors")


def edit(path: Path, old: str, new: str) -> None:
    text = (path / "config.json").read_text()
    assert old in text
    (path / "config.json").write_text(text.replace(old, new))


def seal_again(path: Path, **changed: Any) -> None:
    """Change the record, or without a value take of it what is named, and seal it as `export` does."""
    settings = json.loads((path / "config.json").read_text())
    record = {name: value for name, value in (settings["nanodlm"] | changed).items() if value is not None}
    record.pop("checksum")
    (path / "config.json").write_text(json.dumps(settings | {"nanodlm": sealed(record)}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: seal_again(path, files=None), r"no sha256 of model.safetensors and tokenizer.tiktoken"),
        (lambda path: seal_again(path, files={}), r"no sha256 of model.safetensors and tokenizer.tiktoken"),
        (lambda path: seal_again(path, files={"tokenizer.tiktoken": "0"}), r"no sha256 of model.safetensors: copy"),
        (lambda path: seal_again(path, format=None), "is of format None, and this version reads 1"),
        (lambda path: seal_again(path, config=None), "holds no valid config"),
        (
            lambda path: os.truncate(path / "model.safetensors", 1000),
            "safetensors is not what was exported, by its sha256",
        ),
        (swap, "safetensors is not what was exported, by its sha256"),
        (lambda path: (path / "tokenizer.tiktoken").write_text("AA== 0\n"), "tiktoken is not what was exported"),
        (lambda path: (path / "tokenizer.tiktoken").unlink(), "tiktoken is not what was exported"),
        (lambda path: edit(path, '"seq_len": 32', '"seq_len": 64'), 'has been altered under "nanodlm"'),
        (lambda path: (path / "config.json").write_text("{}"), "is not the config.json of an exported folder"),
        (lambda path: (path / "config.json").unlink(), "no model at .*: name an artifact"),
    ],
)
def test_what_is_not_as_it_was_exported_is_refused(exported: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(exported)
    with pytest.raises(NanodlmError, match=said):
        nanodlm.load(str(exported))


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    model, encoding = drawn(tiny()), tokenizer.plain_bytes()
    (tmp_path / "mine").mkdir()
    export(model, encoding, tiny(), tmp_path / "mine", "")
    with pytest.raises(UsageError, match="is there already: name a new folder, or an empty one"):
        export(model, encoding, tiny(), tmp_path / "mine", "")
    for taken in (tmp_path / "mine" / "README.md", tmp_path / "mine" / "README.md" / "below"):
        with pytest.raises(UsageError, match=r"cannot write .*: Not a directory"):
            export(model, encoding, tiny(), taken, "")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model = drawn(tiny())
    with full(8000), pytest.raises(NanodlmError, match=r"nothing more fits into .*shared"):
        export(model, tokenizer.plain_bytes(), tiny(), tmp_path / "shared", "")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_loads_and_the_next_replaces_it(trained: Artifact, tmp_path: Path) -> None:
    code = f"""import os, signal, sys
    from nanodlm.cli.main import main
    def kill(event, args):
        if event == "open" and str(args[0]).endswith(".export/config.json") and args[1] == "w":
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(kill)
    main(["export", {trained.uri!r}, "shared"])""".replace("\n    ", "\n")
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=200)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert {file.name for file in left.iterdir()} == FILES - {"config.json"}
    with pytest.raises(NanodlmError, match="no model at"):
        nanodlm.load(str(left))
    model, encoding = nanodlm.load(trained.uri)
    export(model, encoding, tiny(), tmp_path / "shared", "")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_the_command_exports_the_newest_model_or_the_one_named_and_others_take_the_folder(
    trained: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for model, folder in ((), "a"), ((f"{trained.uri}/step_8",), "b"), (("a",), "c"):  # the last of them exports again
        with pytest.raises(SystemExit) as ended:
            main(["export", *model, folder, "--store", trained.store.uri(), "--json"])
        assert ended.value.code == 0
        said = capsys.readouterr()
        newest = f"{trained.name}, absorbing, {trained.metrics['updates']} updates, the newest\n"
        assert said.err == ("" if model else newest)
        result = json.loads(said.out)
        assert (result["model"], result["folder"]) == (*(model or (trained.uri,)), str(tmp_path / folder))
        sha256 = sha256_of(nanodlm.load(folder)[0])
        assert (sha256 == trained.metrics["parameters_sha256"]) == (folder != "b")
    assert find_model("a", Store(trained.store.root)) == "a"
    with pytest.raises(SystemExit) as ended:
        main(["export", "--store", trained.store.uri()])
    assert ended.value.code == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("kind", "model"), [("absorbing", {}), ("autoregressive", {**ALL, "qk_norm": True}), ("block", ALL)]
)
def test_transformers_gives_the_same_logits(
    kind: str, model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    import torch
    from transformers import AutoModel, PreTrainedTokenizerFast

    config = tiny(model={"n_layers": 2, **model}, objective={"kind": kind, "block_size": 4})
    ours = drawn(config)
    export(ours, tokenizer.plain_bytes(), config, tmp_path / "shared", "")
    theirs = AutoModel.from_pretrained(tmp_path / "shared", trust_remote_code=True)
    random = np.random.default_rng(0)
    x_t, x_0 = random.integers(0, 258, (2, 3, 18))
    segments = np.cumsum(random.random((3, 18)) < 0.2, axis=1)
    calls: list[dict[str, Any]] = [{"t": random.random(3)}, {"t": random.random(3), "segment_ids": segments}]
    if kind == "block":
        calls.append({"t": random.random((3, 5)), "context": x_0, "segment_ids": segments})
    for call in calls:
        call["t"] = call["t"].astype(np.float32)
        expected = np.asarray(ours(jnp.asarray(x_t), **{name: jnp.asarray(value) for name, value in call.items()}))
        with torch.no_grad():
            found = theirs(torch.tensor(x_t), **{name: torch.tensor(value) for name, value in call.items()}).logits
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="not attention_mask"):
        theirs(torch.tensor(x_t), attention_mask=torch.ones(3, 18))
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path / "shared")
    assert (read.encode("é\n  x"), read.mask_token_id) == ([0xC3, 0xA9, 10, 32, 32, 120], 257)
