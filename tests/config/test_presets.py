"""Changes of a preset, as flows and files give them: taken as the command line takes its flags, or refused by name."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate
from pydantic import TypeAdapter

import nanodlm
from nanodlm.cli.main import HELP
from nanodlm.config import PRESETS, Changes, Config, Preset, as_changes, changed, load_config
from nanodlm.config.differences import flat
from nanodlm.errors import UsageError

ROOT = Path(nanodlm.__file__).parents[1]
SETTINGS = sorted(flat(Config().model_dump()))


def accepts(config: Changes) -> None:
    """A flow's parameter, of which Prefect makes a schema."""


def test_each_preset_has_a_name_that_forms_offer() -> None:
    assert set(get_args(Preset)) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_pinned_where_a_commit_can_be_and_documented(preset: str) -> None:
    data = PRESETS[preset].data
    on_hub = [url for url in (*data.source, *data.validation) if "huggingface.co" in url]
    assert all(
        re.fullmatch(r"https://[^/]+/datasets/[^/]+/[^/]+/resolve/[0-9a-f]{40}/.+\.parquet", url) for url in on_hub
    )
    assert len(set(on_hub)) == len(on_hub)
    assert f"`{preset}`: " in (ROOT / "data/README.md").read_text() or preset == "owt-1b"
    assert f" {preset}" in HELP.replace("\n", " ")


@pytest.mark.parametrize("changes", [{"train": {"max_steps": 20}, "data": None}, {"train.max_steps": 20}])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_not_changed_is_as_in_the_preset(preset: str, changes: dict[str, Any]) -> None:
    assert changed(preset, changes) == PRESETS[preset].replace(train={"max_steps": 20})


def test_a_whole_configuration_is_what_it_says_whatever_the_preset() -> None:
    assert changed("demo", PRESETS["owt"].model_dump(mode="json")) == PRESETS["owt"]


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 99), st.floats(1e-6, 1, exclude_min=True), st.booleans())
def test_as_changes_and_changed_are_inverse(preset: str, steps: int, lr: float, resume: bool) -> None:
    config = PRESETS[preset].replace(train={"max_steps": steps, "lr": lr, "min_lr": 0.0}, exp={"resume": resume})
    assert changed(*as_changes(config)) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"lr": -1}}, "train.lr: Input should be greater than 0"),
        ({"train.lr": -1}, "train.lr: Input should be greater than 0"),
        ({"train.lrr": 1}, "train.lrr: Extra inputs are not permitted"),
        ({"trian": {"lr": 1}}, "trian: Extra inputs are not permitted"),
        ({"train": 3}, "train.: Extra inputs are not permitted"),
    ],
)
def test_a_change_of_no_setting_or_out_of_bounds_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        changed("demo", changes)


@pytest.mark.parametrize(
    ("text", "preset"), [("train: {max_steps: 20}", "demo"), ("preset: owt\ntrain.max_steps: 20", "owt")]
)
def test_a_file_of_some_settings_changes_the_preset_that_it_names_else_the_demo(
    text: str, preset: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(str(tmp_path / "mine.yaml")) == PRESETS[preset].replace(train={"max_steps": 20})


@pytest.mark.parametrize("preset", ['"dmeo"', '["owt"]'])
def test_a_file_that_names_no_preset_of_ours_is_refused(preset: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(f'{{"preset": {preset}}}')
    with pytest.raises(UsageError, match=r"mine\.json is not a valid config: unknown preset .* choose demo"):
        load_config(str(tmp_path / "mine.json"))


# The form


def test_a_form_has_no_defaults_to_send_and_describes_every_setting() -> None:
    schema = parameter_schema(accepts)
    groups = schema.properties["config"]["properties"]
    assert set(groups) == set(Config.model_fields)
    for group in groups.values():
        assert "default" not in group
        fields = schema.definitions[group["$ref"].rpartition("/")[2]]["properties"]
        assert all("default" not in field and field["description"] for field in fields.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_server_takes_every_setting_nested_or_dotted(preset: str) -> None:
    schema, settings = parameter_schema(accepts).model_dump(), PRESETS[preset].model_dump(mode="json")
    assert sorted(flat(settings)) == SETTINGS
    for config in (settings, flat(settings)):
        assert validate({"config": config}, schema, raise_on_error=True) == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"train": {"lr": -1}}, "config.train.lr"),
        ({"train.lr": -1}, r"config\['train.lr'\]"),
        ({"train": {"lrr": 1}}, "'lrr' was unexpected"),
        ({"train.lrr": 1}, r"config\['train.lrr'\].*there is no such setting"),
        ({"trian": {"lr": 1}}, "config.trian.*there is no such setting"),
    ],
)
def test_a_server_refuses_what_is_no_setting_or_out_of_bounds_by_name(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as refusal:
        validate({"config": config}, parameter_schema(accepts).model_dump(), raise_on_error=True)
    assert len(str(refusal.value)) < 200


def test_changes_are_a_dict_of_anything_else() -> None:
    assert TypeAdapter(Changes).validate_python({"train.lr": 1}) == {"train.lr": 1}
