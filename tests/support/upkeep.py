"""What the tests of upkeep share."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanodlm.cli import main
from nanodlm.config import Config
from nanodlm.stages import run
from nanodlm.store import Artifact, Store, new_attempt, sealed
from nanodlm.upkeep import verify
from tests.support.helpers import fill, identity

CHAIN = ["download", "tokenizer", "split", "shard", "train", "sample"]
EVERYTHING = -60.0  # a grace that nothing is young enough for


def statuses(config: Config, store: Store, names: list[str] = CHAIN) -> dict[str, str]:
    return {name: run.run_stage(name, config, store)[1]["status"] for name in names}


@dataclass(frozen=True)
class Made:
    """A store and what was built in it."""

    store: Store
    config: Config
    artifacts: dict[str, Artifact]

    def check(self, *, deep: bool = False, repair: bool = False, of: str = "sample") -> dict[str, verify.Checked]:
        """What is said of each artifact in a chain, by stage."""
        chain = verify.chain(self.store, (of, self.artifacts[of].fingerprint))
        return {found.stage: found for found in verify.check(self.store, chain, deep=deep, repair=repair)}

    def first(self, stage: str, pattern: str) -> Path:
        return sorted(Path(self.artifacts[stage].folder).glob(pattern))[0]

    def manifest(self, stage: str) -> Path:
        return Path(self.artifacts[stage].uri) / "manifest.json"


def age(path: Path, seconds: float = 7200.0) -> None:
    """Make a file look as if it had not changed for so long."""
    os.utime(path, (time.time() - seconds,) * 2)


def made_from(store: Store, stage: str, fingerprint: str, *sources: Artifact, ago: float = 0.0) -> Artifact:
    """An artifact with one file, made so long ago from these."""
    with new_attempt(store, stage, fingerprint) as attempt:
        fill(attempt, {"x.bin": fingerprint.encode()})
        attempt.finish("x", ["x.bin"])
        inputs = {source.stage: {"digest": source.digest, "fingerprint": source.fingerprint} for source in sources}
        artifact = attempt.commit(identity={**identity(stage), "inputs": inputs}, metrics={})
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))
    store.write_json(store.path(stage, fingerprint, "manifest.json"), sealed({**artifact.manifest, "created": created}))
    for path in Path(store.path(stage, fingerprint)).rglob("*"):
        age(path, ago)
    return store.open(f"{stage}/{fingerprint}")


def files(store: Store) -> dict[str, bytes]:
    root = Path(store.root)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    """What a command prints, and says on standard error."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(words))
    out, error = capsys.readouterr()
    assert ended.value.code == code, error
    assert len(error.splitlines()) == (code != 0), error
    return out, error


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """The object that `--json` prints."""
    return json.loads(said(capsys, *words, "--json", code=code)[0].splitlines()[-1])
