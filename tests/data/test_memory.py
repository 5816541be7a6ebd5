"""Memory of preparing data stays small, whatever the documents are like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment

PREPARE = """
import sys
from nanodlm.bench.memory import peak_memory
from nanodlm.config import PRESETS
from nanodlm.stages.run import run_stage
from nanodlm.store import Store
config = PRESETS["demo"].replace(data={"source": sys.argv[1], "tokenizer": "gpt2", "val_tokens": 20_000})
for stage in ("download", "tokenizer", "split", "shard"):
    run_stage(stage, config, Store(sys.argv[2]))
print(peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one of 50 MB", "a million"])
def test_documents_of_any_size_are_prepared_within_the_promised_memory(kind: str, tmp_path: Path) -> None:
    huge, small = "The people of these States, in Congress. " * 1_250_000, "a line of text"
    texts = [huge, *map(str, range(30_000))] if kind == "one of 50 MB" else (f"{small} {i}" for i in range(1_000_000))
    source = tmp_path / "texts.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    command = [sys.executable, "-c", PREPARE, str(source), str(tmp_path / "store")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 1.2e9
