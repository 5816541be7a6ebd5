"""What XLA has compiled is kept for the next process, within a bound, and never stands in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanodlm.store import cache
from tests.support.commands import environment

NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
CODE = """
import {first}
from nanodlm.store.cache import keep_compiled
keep_compiled()
import jax
jax.monitoring.register_event_listener(lambda event, **_: print(event.split("/")[-1]))
print(jax.jit(lambda x: 2 * x + 1)(20.5))
"""


@pytest.fixture
def no_jax_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported JAX, of a user who has set nothing of it."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def said(first: str, **variables: str) -> list[str]:
    """What a process says that compiles a program: the events of JAX's cache, and the result."""
    env = {name: value for name, value in environment().items() if name not in NAMES} | variables
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE.format(first=first)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_process_finds_what_another_has_compiled_whether_or_not_it_has_loaded_jax_before(tmp_path: Path) -> None:
    place = str(tmp_path / "cache")
    assert {"cache_misses", "42.0"} < set(said("os", NANODLM_CACHE=place))
    again = said("jax", NANODLM_CACHE=place)
    assert {"cache_hits", "42.0"} < set(again)
    assert "cache_misses" not in again


@pytest.mark.parametrize("turned_off", [True, False])
def test_without_a_folder_that_can_be_written_programs_are_compiled_all_the_same(
    tmp_path: Path, turned_off: bool
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "mine" if turned_off else tmp_path / "file" / "cache"
    of_jax = {"JAX_COMPILATION_CACHE_DIR": ""} if turned_off else {}
    told = said("os", NANODLM_CACHE=str(place), **of_jax)
    assert "42.0" in told
    assert not {"cache_hits", "cache_misses"} & set(told)
    assert not place.exists()


@pytest.mark.usefixtures("no_jax_yet")
def test_what_was_read_longest_ago_goes_until_the_rest_is_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    monkeypatch.setenv("NANODLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "COMPILED", 250)
    for number, read in enumerate((30, 10, 40, 20)):
        (folder / f"jit_{number}-cache").write_bytes(bytes(100))
        os.utime(folder / f"jit_{number}-cache", (read, 5))
    cache.keep_compiled()
    assert sorted(path.name for path in folder.iterdir()) == ["jit_0-cache", "jit_2-cache"]
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)


def test_a_folder_that_the_user_has_named_to_jax_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANODLM_CACHE", str(tmp_path / "mine"))
    before = dict(os.environ)
    assert before["JAX_COMPILATION_CACHE_DIR"]
    cache.keep_compiled()
    assert dict(os.environ) == before
    assert not (tmp_path / "mine").exists()
