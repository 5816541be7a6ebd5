import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from nanodlm.config import PRESETS, Config, DataConfig, explain, load_config
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


def test_the_owt_preset_is_the_original_projects_data_and_shape() -> None:
    owt = PRESETS["owt"]
    assert owt.data.source == ("hf://NeelNanda/openwebtext-tokenized-9b",)
    assert (owt.data.column, owt.data.pretokenized, owt.data.tokenizer) == ("tokens", True, "gpt2")
    assert (owt.model.seq_len, owt.model.n_layers, owt.model.n_heads, owt.model.d_model) == (1024, 12, 12, 768)


def test_the_owt_1b_preset_is_the_same_data_in_a_larger_network() -> None:
    owt, large = PRESETS["owt"], PRESETS["owt-1b"]
    assert large.data == owt.data
    assert large.train.batch_size % 64 == 0
    assert (large.model.n_layers, large.model.d_model, large.train.fsdp) == (24, 2048, 1)


def test_every_setting_has_a_help_text() -> None:
    def undocumented(group: type[BaseModel]) -> list[str]:
        return [f"{group.__name__}.{name}" for name, field in group.model_fields.items() if not field.description]

    assert [name for group in GROUPS for name in undocumented(Config.model_fields[group].annotation)] == []  # type: ignore[arg-type]


def test_replace_changes_the_named_fields_and_leaves_the_original_alone() -> None:
    demo = PRESETS["demo"]
    before = demo.model_dump()
    changed = demo.replace(train={"lr": 0.5, "max_steps": 9000}, data={"source": ["a.txt", "b.txt"]})
    expected = {**before, "train": {**before["train"], "lr": 0.5, "max_steps": 9000}}
    expected["data"] = {**before["data"], "source": ("a.txt", "b.txt")}
    assert changed.model_dump() == expected
    assert demo.model_dump() == before


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["demo"].train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_field_is_refused_by_name(group: str) -> None:
    assert refusal(**{group: {"no_such_field": 1}}) == f"{group}.no_such_field: Extra inputs are not permitted"


def test_an_unknown_group_is_refused_by_name() -> None:
    assert refusal(optimizer={"lr": 1}) == "optimizer: Extra inputs are not permitted"


@pytest.mark.parametrize(
    ("d_model", "n_heads", "try_"), [(130, 4, 128), (100, 8, 96), (4, 4, 8), (30, 2, 32), (3, 1, 4), (2, 16, 32)]
)
def test_a_width_that_heads_do_not_divide_evenly_is_refused_with_one_that_works(
    d_model: int, n_heads: int, try_: int
) -> None:
    message = refusal(model={"d_model": d_model, "n_heads": n_heads})
    assert f"d_model ({d_model}) must be divisible by n_heads ({n_heads}) with an even quotient" in message
    assert message.endswith(f"try --model.d_model {try_}")
    assert PRESETS["demo"].replace(model={"d_model": try_, "n_heads": n_heads}).model.d_model == try_


def test_an_even_convolution_is_refused_with_the_next_odd_width() -> None:
    assert refusal(model={"conv_width": 4}) == "model: conv_width (4) must be odd: try 5"
    assert [PRESETS["demo"].replace(model={"conv_width": w}).model.conv_width for w in (0, 1, 5)] == [0, 1, 5]


def test_a_hub_data_set_needs_a_pinned_commit_and_other_sources_none() -> None:
    assert "needs a pinned commit: set --data.revision" in refusal(data={"source": "hf://a/b"})
    assert "needs a pinned commit" in refusal(data={"source": "a.txt", "revision": "0123456"})
    pinned = PRESETS["demo"].replace(data={"source": "hf://a/b", "revision": "0123456"})
    assert pinned.data.source == ("hf://a/b",)


@pytest.mark.parametrize("revision", ["main", "012345", "0" * 41, "ABCDEF0", "0123456\n"])
def test_a_revision_is_a_commit_not_a_branch(revision: str) -> None:
    assert refusal(data={"source": "hf://a/b", "revision": revision}).startswith("data.revision: ")


@pytest.mark.parametrize("source", ["", "  ", [], ["a.txt", ""]])
def test_an_empty_source_is_refused(source: object) -> None:
    assert refusal(data={"source": source}).startswith("data: source is empty: name sotu")


def test_the_built_in_corpus_and_the_hub_stand_alone() -> None:
    for source in (["sotu", "a.txt"], ["a.txt", "hf://a/b"]):
        assert "must be the only source" in refusal(data={"source": source, "revision": "0123456"})


def test_rows_of_token_ids_need_the_tokenizer_that_made_them() -> None:
    message = refusal(data={"pretokenized": True, "tokenizer": "bpe"})
    assert message == "data: pretokenized rows need the tokenizer that made them: set --data.tokenizer gpt2 or bytes"
    assert PRESETS["demo"].replace(data={"pretokenized": True, "tokenizer": "gpt2"}).data.pretokenized


def test_a_decay_that_would_rise_is_refused() -> None:
    assert "min_lr (0.5) is larger than lr (0.1)" in refusal(train={"lr": 0.1, "min_lr": 0.5})


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("data", "val_tokens", 0),
        ("data", "vocab_size", 256),
        ("data", "split_seed", -1),
        ("data", "split_seed", 2**63),
        ("data", "part_mb", 0),
        ("data", "tokenizer", "gpt3"),
        ("model", "seq_len", 1),
        ("model", "dtype", "float16"),
        ("train", "batch_size", 0),
        ("train", "beta2", 1.0),
        ("train", "lr", float("nan")),
        ("train", "max_steps", 1.5),
        ("sample", "temperature", -0.1),
        ("exp", "keep", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(group: str, field: str, value: object) -> None:
    assert refusal(**{group: {field: value}}).startswith(f"{group}.{field}: ")


def test_several_mistakes_are_told_in_one_line() -> None:
    message = refusal(train={"lr": -1}, data={"val_tokens": -1})
    assert "train.lr: " in message
    assert "data.val_tokens: " in message
    assert "\n" not in message


# Files


def test_a_config_that_a_run_has_written_is_read_back(tmp_path: Path) -> None:
    config = PRESETS["demo"].replace(data={"source": ["a.txt", "b.txt"]}, train={"lr": 0.25}, exp={"run_name": "é"})
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(indent=1))
    assert load_config(str(path)) == config
    assert load_config("demo") is PRESETS["demo"]


def test_an_unknown_preset_is_a_usage_error_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=f"unknown preset .dmeo.: choose {' or '.join(PRESETS)}") as caught:
        load_config("dmeo")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a valid config: Expecting value"),
        ("[]", "is not a valid config"),
        ('{"train": {"lr": "fast"}}', "is not a valid config: train.lr: Input should be a valid number"),
        ('{"train": {"speed": 1}}', "is not a valid config: train.speed: Extra inputs"),
    ],
)
def test_a_file_that_is_no_config_is_a_usage_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path} {message}")


def test_a_config_file_that_is_not_there_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read config .*absent\.json: No such file"):
        load_config(str(tmp_path / "absent.json"))


def test_a_single_source_may_be_given_as_a_text() -> None:
    assert DataConfig.model_validate({"source": "a.txt"}).source == ("a.txt",)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"objective": {"kind": "uniform", "estimator": "discrete"}}, "uniform has no discrete estimator"),
        ({"objective": {"kind": "hybrid", "estimator": "constant_count"}}, "hybrid has no constant_count estimator"),
        ({"objective": {"kind": "autoregressive", "estimator": "continuous"}}, "autoregressive has no continuous"),
        ({"objective": {"kind": "block", "block_size": 65}}, "block_size (65) is larger than model.seq_len (64)"),
        ({"objective": {"kind": "uniform"}, "schedule": {"kind": "loglinear"}}, "needs a schedule from 0 to 1"),
        ({"objective": {"kind": "hybrid"}, "sample": {"sampler": "margin"}}, "hybrid models have no margin sampler"),
        ({"objective": {"kind": "block"}, "sample": {"guidance": 1.0}}, "sampled without guidance"),
        ({"objective": {"kind": "uniform"}, "sample": {"guidance": 1.0}}, "sampled without guidance"),
        ({"objective": {"kind": "block", "block_size": 40}, "sample": {"length": 99}}, "texts cannot be longer"),
        ({"sample": {"length": 65}}, "absorbing models write at most model.seq_len (64) tokens"),
    ],
)
def test_a_choice_that_an_objective_does_not_have_is_refused(groups: dict, message: str) -> None:
    assert message in refusal(**groups)


def test_every_objective_works_with_the_demo_as_it_is() -> None:
    for kind in ("absorbing", "uniform", "hybrid", "block", "autoregressive"):
        assert PRESETS["demo"].replace(objective={"kind": kind}).objective.estimator is None


def test_the_choices_are_those_of_the_modules_that_have_them() -> None:
    from nanodlm.config import ObjectiveConfig, SampleConfig, ScheduleConfig
    from nanodlm.diffusion import noise, objective, sampling, schedules

    def choices(group: type, field: str) -> tuple[str, ...]:
        annotation = group.model_fields[field].annotation
        named = [part for part in get_args(annotation) if get_origin(part) is Literal]  # when None is a choice as well
        return get_args(named[0] if named else annotation)

    assert choices(ScheduleConfig, "kind") == schedules.KINDS
    assert choices(SampleConfig, "sampler") == sampling.SAMPLERS
    for field, names in (
        ("kind", objective.Kind),
        ("estimator", objective.Estimator),
        ("weighting", objective.Weighting),
        ("times", noise.Times),
    ):
        assert set(choices(ObjectiveConfig, field)) == set(names.__args__)
