import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from nanodlm.build import make_objective
from nanodlm.config import PRESETS, Config, differences, explain, load_config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.kinds import KINDS, KindName
from nanodlm.errors import UsageError

GROUPS = list(Config.model_fields)


def refusal(**groups: dict[str, Any]) -> str:
    """The one line that says why these settings are refused."""
    with pytest.raises(ValidationError) as caught:
        PRESETS["demo"].replace(**groups)
    return explain(caught.value)


def test_the_groups_are_those_of_the_original_flags() -> None:
    assert GROUPS == ["data", "model", "schedule", "objective", "train", "eval", "sample", "exp"]


def test_a_config_can_be_read_without_importing_jax() -> None:
    code = "import sys, nanodlm.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_json(name: str) -> None:
    text = PRESETS[name].model_dump_json()
    assert Config.model_validate_json(text) == PRESETS[name] == Config.model_validate(json.loads(text))


def test_every_setting_has_a_help_text() -> None:
    def undocumented(group: type[BaseModel]) -> list[str]:
        return [f"{group.__name__}.{name}" for name, field in group.model_fields.items() if not field.description]

    assert [name for group in GROUPS for name in undocumented(Config.model_fields[group].annotation)] == []  # type: ignore[arg-type]


def test_replace_changes_the_named_fields_and_leaves_the_original_alone() -> None:
    demo = PRESETS["demo"]
    before = demo.model_dump()
    changed = demo.replace(train={"lr": 0.5}, data={"source": ["a.txt", "b.txt"]}).model_dump()
    data, train = {**before["data"], "source": ("a.txt", "b.txt")}, {**before["train"], "lr": 0.5}
    assert changed == {**before, "data": data, "train": train}
    assert demo.model_dump() == before


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["demo"].train.lr = 1.0  # type: ignore[misc]


def test_an_unknown_field_or_group_is_refused_by_name() -> None:
    for group in GROUPS:
        assert refusal(**{group: {"no_such_field": 1}}) == f"{group}.no_such_field: Extra inputs are not permitted"
    assert refusal(optimizer={"lr": 1}) == "optimizer: Extra inputs are not permitted"


@pytest.mark.parametrize(("d_model", "n_heads", "try_"), [(130, 4, 128), (4, 4, 8), (3, 1, 4), (2, 16, 32)])
def test_a_width_that_heads_do_not_divide_evenly_is_refused_with_one_that_works(
    d_model: int, n_heads: int, try_: int
) -> None:
    message = refusal(model={"d_model": d_model, "n_heads": n_heads})
    assert f"d_model ({d_model}) must be divisible by n_heads ({n_heads}) with an even quotient" in message
    assert message.endswith(f"try --model.d_model {try_}")
    assert PRESETS["demo"].replace(model={"d_model": try_, "n_heads": n_heads}).model.d_model == try_


@pytest.mark.parametrize("revision", ["main", "012345", "0" * 41, "ABCDEF0", "0123456\n"])
def test_a_revision_is_a_commit_not_a_branch(revision: str) -> None:
    assert refusal(data={"source": "hf://a/b", "revision": revision}).startswith("data.revision: ")


def test_files_in_place_of_a_data_set_of_the_hub_need_no_second_setting() -> None:
    config = PRESETS["owt"].replace(data={"source": "train-*.parquet"})
    assert (config.data.source, config.data.revision) == (("train-*.parquet",), "")


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("data", "val_tokens", 0),
        ("data", "split_seed", 2**63),
        ("data", "tokenizer", "gpt3"),
        ("train", "lr", float("nan")),
        ("train", "max_steps", 1.5),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(group: str, field: str, value: object) -> None:
    assert refusal(**{group: {field: value}}).startswith(f"{group}.{field}: ")


def test_a_config_that_a_run_has_written_is_read_back(tmp_path: Path) -> None:
    config = PRESETS["demo"].replace(data={"source": ["a.txt", "b.txt"]}, train={"lr": 0.25}, exp={"run_name": "é"})
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(indent=1))
    assert load_config(str(path)) == config
    assert load_config("demo") is PRESETS["demo"]
    path.write_text(path.read_text().replace('"use_wandb"', '"use_tensorboard": true,\n"use_wandb"'))
    assert load_config(str(path)) == config, "as earlier versions have written it"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dmeo", None, r"unknown preset 'dmeo': choose demo, .* or fineweb-edu, or name a config\.json"),
        ("absent.json", None, r"cannot read config absent\.json: No such file"),
        ("mine.json", "", r"mine\.json is not a valid config: Expecting value"),
        ("mine.yaml", "train: {lr: [}", r"mine\.yaml is not a valid config: while parsing"),
        ("mine.yaml", "", r"mine\.yaml is not a valid config: Input should be a valid dictionary"),
        ("mine.json", "[]", r"mine\.json is not a valid config"),
        ("mine.json", '{"train": {"lr": "fast"}}', "train.lr: Input should be a valid number"),
    ],
)
def test_what_is_no_config_is_a_usage_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_config(name)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"source": "  "}}, "data.source is empty: name sotu"),
        ({"data": {"source": ["a.txt", "hf://a/b"], "revision": "0123456"}}, "must be the only source"),
        ({"data": {"source": "hf://a/b"}}, "needs a pinned commit: set --data.revision"),
        ({"data": {"pretokenized": True}}, "need the tokenizer that made them: set --data.tokenizer gpt2 or bytes"),
        ({"model": {"conv_width": 4}}, "model.conv_width (4) must be odd"),
        ({"train": {"lr": 0.1, "min_lr": 0.5}}, "min_lr (0.5) is larger than lr (0.1): a decay must not rise"),
        ({"train": {"lr": -1}, "data": {"val_tokens": -1}}, "; train.lr: Input should be greater than 0"),
        ({"objective": {"kind": "uniform", "estimator": "discrete"}}, "uniform has no discrete estimator"),
        ({"objective": {"kind": "block", "block_size": 65}}, "block_size (65) is larger than model.seq_len (64)"),
        ({"objective": {"kind": "uniform"}, "schedule": {"kind": "loglinear"}}, "needs a schedule from 0 to 1"),
        ({"objective": {"kind": "hybrid"}, "sample": {"sampler": "margin"}}, "hybrid models have no margin sampler"),
        ({"objective": {"kind": "block"}, "sample": {"guidance": 1.0}}, "sampled without guidance"),
        (
            {"objective": {"kind": "hybrid"}, "sample": {"cache_block": 8}},
            "hybrid models have no cache for parts of a row",
        ),
        ({"sample": {"guidance": 1.0, "cache_block": 8}}, "guidance needs the whole row in each step"),
        ({"sample": {"cache_block": 9}}, "sample.cache_block (9) does not divide texts of 64 tokens"),
        ({"objective": {"kind": "block", "block_size": 40}, "sample": {"length": 99}}, "texts cannot be longer"),
        ({"sample": {"length": 65}}, "absorbing models write at most model.seq_len (64) tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(groups: dict, message: str) -> None:
    assert message in refusal(**groups)


def test_every_kind_of_objective_has_a_row_in_the_table_and_works_with_the_demo_as_it_is() -> None:
    assert tuple(KINDS) == get_args(KindName)
    for name, kind in KINDS.items():
        config = PRESETS["demo"].replace(objective={"kind": name})
        assert make_objective(config, Vocabulary(9, 8)).estimator == kind.estimators[0]
        for sampler in kind.samplers:
            config.replace(sample={"sampler": sampler})


def test_a_setting_that_is_none_is_told_apart_from_one_that_is_absent() -> None:
    settings = PRESETS["demo"].model_dump(mode="json")
    fewer = {**settings, "eval": {**settings["eval"], "max_rows": 64}}
    whole = {**settings, "eval": {**settings["eval"], "max_rows": None}}
    assert differences(whole, fewer) == {"eval.max_rows": "none -> 64"}
    fewer["eval"].pop("seed")
    assert differences(fewer, whole)["eval.seed"] == f"absent -> {settings['eval']['seed']}"
