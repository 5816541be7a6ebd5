"""Tell how far each product of an update is from the fastest that this machine multiplies, and what the rest costs.

    python -m benchmarks.roofline demo
    python -m benchmarks.roofline demo --model.dtype bfloat16 --train.batch_size 16

The products are those of the compiled update, as XLA lays them out. Each is timed alone, the best of several times, for
within the update some are done at once.
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from nanodlm.bench.flops import synthetic_encoding
from nanodlm.config import PRESETS, Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.precision import measured
from nanodlm.training.step import make_program

DOT = re.compile(r"= (\w+)\[[\d,]*\]\S* dot\(%?([\w.-]+), %?([\w.-]+)\), (.*?)(?:, metadata=.*)?$")
AXES = ("contracting", "batch")
TYPES = {"f32": "float32", "bf16": "bfloat16", "f64": "float64"}


class Dot(NamedTuple):
    """A product of two arrays: their type and that of the result, their shapes, and what is summed over and shared."""

    types: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    summed: tuple[tuple[int, ...], tuple[int, ...]]
    shared: tuple[tuple[int, ...], tuple[int, ...]]
    fast: bool  # whether XLA gives it to its library of fast kernels

    @property
    def flops(self) -> int:
        """Twice the multiplications."""
        out = np.prod(self.shapes[1]) / np.prod([self.shapes[1][i] for i in self.summed[1] + self.shared[1]])
        return int(2 * np.prod(self.shapes[0]) * out)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def dots(hlo: str) -> Counter[Dot]:
    """Count how often each product of a compiled program is done."""
    shapes = {name: (kind, of) for name, kind, of in re.findall(r"%?([\w.-]+)(?: =|:) (\w+)\[([\d,]*)\]", hlo)}
    found: dict[str, list[Dot]] = {}
    callers: dict[str, list[tuple[str, int]]] = {}
    computation = ""
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = re.sub(r"^ENTRY ", "", line).split()[0].lstrip("%")
            if line.startswith("ENTRY"):
                callers[computation] = []
        trips = int((re.findall(r'known_trip_count":\{"n":"(\d+)"', line) or ["1"])[0])
        for called in re.findall(r"(?:calls|body|to_apply)=%?([\w.-]+)", line):
            callers.setdefault(called, []).append((computation, trips if "body=" in line else 1))
        if dot := DOT.search(line):
            kind, left, right, rest = dot.groups()
            axes = {name: _numbers(of) for name, of in re.findall(r"(\w+)=\{([\d,]*)\}", rest)}
            summed, shared = ((axes.get(f"lhs_{of}_dims", ()), axes.get(f"rhs_{of}_dims", ())) for of in AXES)
            (operand, one), (_, other) = shapes[left], shapes[right]
            types, fast = (TYPES[operand], TYPES[kind]), "fused" in computation
            found.setdefault(computation, []).append(Dot(types, (_numbers(one), _numbers(other)), summed, shared, fast))

    def times(name: str) -> int:
        return sum(times(caller) * trips for caller, trips in callers[name]) if callers[name] else 1

    counted: Counter[Dot] = Counter()
    for computation, products in found.items():
        for product in products:
            counted[product] += times(computation)
    return counted


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of the fastest call, the first one not counted."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def alone(dot: Dot, repeats: int) -> float:
    """Return the least seconds of a product done alone."""
    values = [jnp.ones(shape, dot.types[0]) for shape in dot.shapes]
    multiply = jax.jit(
        lambda a, b: jax.lax.dot_general(a, b, (dot.summed, dot.shared), preferred_element_type=jnp.dtype(dot.types[1]))
    )
    return least_seconds(lambda: multiply(*values), repeats)


def roofline(
    config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"], repeats: int = 10
) -> dict[str, float]:
    """Print each product of an update with its speed, and the seconds of the update that are no product.

    Args:
        config: The configuration whose update it is.
        repeats: How often each product, and the update, is timed.

    Returns:
        Seconds of the `update`, of its `products` alone, and of the products at the speed of the `fastest`.
    """
    config = measured(config)
    encoding = synthetic_encoding(config)
    program, key = make_program(config, Vocabulary.of(encoding)), jax.random.key(0)
    compiled: Any = program.compile(0)
    tokens = np.random.default_rng(0).integers(0, encoding.n_vocab, program.rows.shape, np.int32)
    with jax.set_mesh(program.mesh):
        state = program.initialise()

    def update() -> Any:
        nonlocal state
        state, scalars = compiled(state, jax.device_put(tokens, program.rows.sharding), key)
        return scalars

    whole = least_seconds(update, repeats)
    rows = [(dot, count, alone(dot, repeats)) for dot, count in dots(compiled.func.as_text()).items()]
    fastest = max(dot.flops / seconds for dot, _, seconds in rows)
    print(f"{'product':<52} {'types':<20} {'times':>5} {'ms each':>8} {'GFLOP/s':>8} {'of best':>8}  kernel")
    for dot, count, taken in sorted(rows, key=lambda row: -row[1] * row[2]):
        name = (
            " x ".join(str(list(shape)) for shape in dot.shapes) + f" over {list(dot.summed[0])}, {list(dot.summed[1])}"
        )
        speed, types = dot.flops / taken, f"{dot.types[0]} > {dot.types[1]}"
        print(
            f"{name:<52} {types:<20} {count:>5} {1e3 * taken:>8.2f} {speed / 1e9:>8.0f} {speed / fastest:>8.0%}  "
            + ("fast" if dot.fast else "plain")
        )
    products = sum(count * seconds for _, count, seconds in rows)
    ideal = sum(count * dot.flops for dot, count, _ in rows) / fastest
    seconds = {"update": whole, "products": products, "fastest": ideal}
    print("ms: " + ", ".join(f"{name} {1e3 * value:,.1f}" for name, value in seconds.items()))
    return seconds


if __name__ == "__main__":
    tyro.cli(roofline, use_underscores=True)
