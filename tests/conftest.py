"""Shared set-up: shapes and types are checked while tests run, and nothing reaches a network or a user's folders."""

import os
from pathlib import Path

import pytest

os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")
os.environ.pop("NANODLM_STORE", None)

from jaxtyping import install_import_hook

CHECKED = [f"nanodlm.{name}" for name in ("schedules", "diffusion", "losses", "samplers", "model")]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANODLM_CACHE", str(tmp_path / "cache"))
