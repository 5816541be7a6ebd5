"""The precision that is faster here: measured once, kept, and part of what a configuration is."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanodlm import precision
from nanodlm.cli.arguments import parse
from nanodlm.cli.run import run
from nanodlm.config import PRESETS
from nanodlm.precision import fastest, machine, measured
from nanodlm.stages.lookup import identify
from nanodlm.stages.table import STAGES
from tests.support.commands import nanodlm
from tests.support.training import tiny


@pytest.fixture(autouse=True)
def kept() -> Iterator[Path]:
    """Where the choice is kept, and nothing is yet."""
    fastest.cache_clear()
    file = Path(os.environ["NANODLM_CACHE"]) / "precision" / machine()
    file.unlink()
    yield file
    fastest.cache_clear()


def test_products_are_timed_once_and_the_choice_is_kept(kept: Path) -> None:
    chosen = fastest()
    assert chosen in ("float32", "bfloat16")
    assert kept.read_text() == chosen
    other = "bfloat16" if chosen == "float32" else "float32"
    kept.write_text(other)
    fastest.cache_clear()
    assert fastest() == other


def test_auto_is_replaced_by_the_choice_and_what_is_given_stays(kept: Path) -> None:
    kept.write_text("bfloat16")
    assert measured(tiny(model={"dtype": "auto"})).model.dtype == "bfloat16"
    assert measured(tiny(model={"dtype": "float32"})).model.dtype == "float32"
    assert PRESETS["demo"].model.dtype == PRESETS["shakespeare"].model.dtype == "auto"


def test_a_trained_models_identity_names_the_choice(kept: Path) -> None:
    kept.write_text("float32")
    identities = [identify(STAGES["train"], tiny(model={"dtype": dtype}), {}) for dtype in ("auto", "float32")]
    assert identities[0] == identities[1]
    assert identify(STAGES["train"], tiny(model={"dtype": "bfloat16"}), {}) != identities[0]


def test_neither_the_words_of_run_nor_looking_up_data_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fastest", lambda: pytest.fail("it was asked"))
    call = parse("run", run, [])
    assert call.keywords["config"].model.dtype == "auto"
    assert identify(STAGES["download"], call.keywords["config"], {}).fingerprint


def test_threads_that_ask_at_once_time_products_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, time_products = [], precision.subprocess.run
    monkeypatch.setattr(precision.subprocess, "run", lambda *a, **k: asked.append(1) or time_products(*a, **k))
    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(lambda _: fastest(), range(2))}) == len(asked) == 1


def test_config_shows_auto() -> None:
    assert "dtype: auto" in nanodlm("config", "demo").stdout


def test_a_machine_that_cannot_time_products_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.sys, "executable", "/bin/false")
    with pytest.raises(precision.NanodlmError, match=r"set --model\.dtype to float32 or bfloat16"):
        fastest()
