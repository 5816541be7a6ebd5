"""Commands that measure this machine: how fast it trains, samples and reads."""

from tempfile import gettempdir
from typing import Annotated

from typing_extensions import Doc

from nanodlm.cli.arguments import Output, Settings
from nanodlm.cli.console import Console
from nanodlm.config import Config
from nanodlm.errors import UsageError, full_disk_named


def train(config: Settings, *, steps: Annotated[int, Doc("Updates to time.")] = 10, out: Output) -> None:
    """Time updates of the network on random tokens."""
    _measure("train", out, config, steps=steps)


def sample(config: Settings, *, repeats: Annotated[int, Doc("Draws of all texts to time.")] = 5, out: Output) -> None:
    """Time the sampler, with a network that has learned nothing."""
    _measure("sample", out, config, repeats=repeats)


def loader(config: Settings, *, batches: Annotated[int, Doc("Batches to time.")] = 2000, out: Output) -> None:
    """Time how fast training rows are read."""
    _measure("loader", out, config, batches=batches)


def data(
    config: Settings, *, tokens: Annotated[int, Doc("Tokens of each corpus, about.")] = 10_000_000, out: Output
) -> None:
    """Time preparing ids and texts, stage by stage, beside libraries alone."""
    from nanodlm.bench.data import data as measure

    with out.showing("bench") as emit, full_disk_named(f"the temporary folder {gettempdir()}"):
        found = measure(config, tokens=tokens, emit=emit)
    out.text(f"{'':<28} {'M tokens/s per core':>20} {'MB':>7}  of the reference")
    for kind, names in found.items():
        for name, m in names.items():
            speed = m["tokens_per_second_per_core"] / 1e6
            memory = f"{m['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in m else ""
            ratio = f"{m['of_reference']:.2f} of {m['reference']}" if "reference" in m else ""
            out.text(f"{kind:<5} {name:<22} {speed:>20,.2f} {memory:>7}  {ratio}".rstrip())
    out.json(**found)


def _measure(what: str, out: Console, config: Config, **options: int) -> None:
    from nanodlm.bench import speed

    for name, value in options.items():
        if value <= 0:
            raise UsageError(f"--{name} must be above 0, not {value}")
    with out.showing("bench") as emit, full_disk_named(f"the temporary folder {gettempdir()}"):
        result = getattr(speed, what)(config, **options, emit=emit)
    for name, value in result.items():
        number = f"{value:,.6g}" if isinstance(value, float) else value
        out.text(f"{name:<20} {'unknown' if value is None else number}")
    out.json(**result)
