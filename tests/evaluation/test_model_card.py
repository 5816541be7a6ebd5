"""The card of a shared model: the numbers of its evaluation, with their units, and of no other's."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

import nanodlm
from nanodlm.checkpoints.exported import export
from nanodlm.checkpoints.loading import load_artifact
from nanodlm.evaluation.compare import made_from
from nanodlm.evaluation.model_card import licence_of, model_card
from nanodlm.stages.run import run_stage
from nanodlm.store import Artifact, Store
from tests.support.training import tiny, untrained


def test_a_card_tells_the_numbers_the_data_and_the_limits_of_the_model(trained: Artifact, models: Store) -> None:
    config = tiny(exp={"run_name": "mine"})
    run_stage("evaluate", tiny(), models)
    m = made_from(trained)["evaluate"][-1].metrics  # the newest, whoever made it
    card = model_card(config, load_artifact(trained)[0], trained)
    low, high = m["val_bits_per_byte_interval"]
    bound = f"{m['val_bits_per_byte']:.4f} ± {m['val_bits_per_byte_stderr']:.4f}"
    interval = f"{low:.4f} to {high:.4f}, over {m['val_stderr_over']}"
    row = f"| held out | {bound} | {interval} | {m['val_nats_per_token']:.4f} | {m['scored_tokens']} tokens |"
    assert "# mine" in card.splitlines()
    assert row in card.splitlines()
    for part in ("bound, bits per byte", f"{m['val_unigram_bits_per_byte']:.4f}", "never trained on", "d_model 16"):
        assert part in card
    assert not re.search(r"\n[ \n]*\n[ \n]*\n", card), "one empty line at a time"
    assert "writes no more than 32 at a time" in card
    assert trained.metrics["parameters_sha256"] in card


def test_numbers_of_other_parameters_are_not_told(trained: Artifact, models: Store) -> None:
    run_stage("evaluate", tiny(), models)
    for model, artifact in ((nanodlm.load(f"{trained.uri}/step_10")[0], trained), (load_artifact(trained)[0], None)):
        card = model_card(tiny(), model, artifact)
        assert "It was not evaluated where it was exported." in card
        assert "held out" not in card


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_snippets_of_a_card_run(trained: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    model, encoding = load_artifact(trained)
    export(model, encoding, tiny(), tmp_path / "shared", model_card(tiny(), model, trained))
    snippets = re.findall(r"```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(), re.DOTALL)
    ours, pytorch, tokens = ({} for _ in snippets)
    for code, names in zip(snippets, (ours, pytorch, tokens), strict=True):
        exec(code.replace("FOLDER", str(tmp_path / "shared")), names)
    ids = ours["tokenizer"].encode_ordinary("We the people")
    assert tokens["tokenizer"].encode_ordinary("We the people") == ids == pytorch["tokenizer"].encode("We the people")
    expected = np.asarray(ours["model"](jnp.array([ids]), jnp.zeros(1)))
    np.testing.assert_allclose(pytorch["logits"].detach(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_licence_is_told_only_where_it_is_that_of_every_source() -> None:
    stories = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/1/data/train.parquet"
    assert licence_of((stories, stories)) == ("CDLA-Sharing 1.0", "cdla-sharing-1.0")
    assert licence_of((stories, "mine.txt")) == licence_of(("mine.txt",)) == ("not recorded: ask its source", "")


def test_front_matter_is_yaml_that_tells_the_licence_where_it_is_known() -> None:
    model = untrained()
    for source, licence in (("roneneldan/TinyStories/a.parquet", "cdla-sharing-1.0"), ("mine.txt", None)):
        card = model_card(tiny(data={"source": (source,)}), model, None)
        assert yaml.safe_load(card.split("---\n")[1]).get("license") == licence
    assert yaml.safe_load(model_card(tiny(), model, None).split("---\n")[1])["license_name"] == "public-domain"


def test_a_name_is_text_in_the_card_and_settings_are_words_of_json() -> None:
    name = "a_b_ *bold* [x](y) <b>&amp; `code` ~~z~~ https://x.org\n# h #"
    card = model_card(tiny(exp={"run_name": name}), untrained(), None)
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card)
    heading = tokens[1 + next(i for i, t in enumerate(tokens) if t.tag == "h1")]
    assert "".join(child.content for child in heading.children or []) == " ".join(name.split())
    assert {child.type for child in heading.children or []} <= {"text", "text_special"}
    settings = card.split("## Settings")[1].split("The parameters")[0]
    assert not re.search(r"\b(None|True|False)\b", settings)
    assert re.search(r"\b(null|true|false)\b", settings)
    assert "\n\n\n" not in card
