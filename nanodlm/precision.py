"""Which precision multiplies faster on this machine: timed once in another process, and kept in the cache folder."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock

from nanodlm.config import Config
from nanodlm.errors import NanodlmError
from nanodlm.store.cache import cache_dir

DTYPES = ("float32", "bfloat16")
CHOOSING = Lock()  # a second thread finds what the first has kept
GAIN = 1.25  # by which bfloat16 must be faster to be worth its rounding; machines are far from it on either side


def measured(config: Config) -> Config:
    """Return a configuration that says which precision it is in, where it said `auto`.

    What is chosen is part of a model's identity, so it is said before a model is looked up or made. Whoever hands work
    on to another machine chooses by this one, unless the precision is given.
    """
    return config.replace(model={"dtype": fastest()}) if config.model.dtype == "auto" else config


@cache
def fastest() -> str:
    """Return the precision that is faster here, `float32` or `bfloat16`, as it was found when first asked."""
    with CHOOSING:
        return _kept_or_timed()


def _kept_or_timed() -> str:
    kept = cache_dir() / "precision" / machine()
    with suppress(OSError):
        if (chosen := kept.read_text()) in DTYPES:
            return chosen
    done = subprocess.run([sys.executable, "-P", "-m", __name__], capture_output=True, text=True)
    chosen = done.stdout.strip()
    if done.returncode or chosen not in DTYPES:
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise NanodlmError(f"cannot time products here ({why}): set --model.dtype to float32 or bfloat16")
    with suppress(OSError):  # where nothing can be kept, it is timed again
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(chosen)
    return chosen


def machine() -> str:
    """Return a name for all that the choice depends on: the processor, accelerators, and JAX."""
    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    accelerators = sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))
    said = [processor, *accelerators, os.environ.get("JAX_PLATFORMS", ""), version("jax")]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _time_products() -> str:
    """Time two products in turn, as the network does them, and return the precision of the faster."""
    import jax
    import jax.numpy as jnp

    from nanodlm.model.layers import product

    products, least = {}, dict.fromkeys(DTYPES, float("inf"))
    a, b = jnp.ones((2048, 512)), jnp.ones((512, 1024))
    for dtype in DTYPES:
        x, y = a.astype(dtype), b.astype(dtype)
        products[dtype] = jax.jit(lambda x=x, y=y, dtype=dtype: product("nd,de->ne", jnp.dtype(dtype), x, y))
    for _ in range(40):  # other work on the machine must not decide
        for dtype, multiply in products.items():
            began = time.perf_counter()
            jax.block_until_ready(multiply())
            least[dtype] = min(least[dtype], time.perf_counter() - began)
    return "bfloat16" if least["bfloat16"] * GAIN < least["float32"] else "float32"


if __name__ == "__main__":
    sys.stdout.write(_time_products())
