"""Commands that measure this machine: how fast it trains, samples and reads."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from typing_extensions import Doc

from nanodlm.cli.arguments import Output, Settings
from nanodlm.cli.console import Console

Baseline = Annotated[bool, Doc("Also time updates of the plain recipe, of the same sizes, in turn with ours.")]
Against = Annotated[float | None, Doc("Tokens per second that a trainer takes, to compare with.")]


def train(
    config: Settings, *, steps: Annotated[int, Doc("Updates to time.")] = 10, baseline: Baseline = False, out: Output
) -> None:
    """Time updates of the network on random tokens."""
    from nanodlm.bench import speed

    _measure(partial(speed.train, config, steps=steps, baseline=baseline), out)


def sample(
    config: Settings, *, repeats: Annotated[int, Doc("Draws to time, of sample.num_samples texts.")] = 5, out: Output
) -> None:
    """Time the sampler, with a network that has learned nothing."""
    from nanodlm.bench import speed

    _measure(partial(speed.sample, config, repeats=repeats), out)


def loader(
    config: Settings, *, batches: Annotated[int, Doc("Batches to time.")] = 200, against: Against = None, out: Output
) -> None:
    """Time how fast training rows are read."""
    from nanodlm.bench import speed

    _measure(partial(speed.loader, config, batches=batches, against=against), out)


def _measure(measure: Callable[..., dict[str, Any]], out: Console) -> None:
    with out.showing("bench") as emit:
        result = measure(emit=emit)
    for name, value in result.items():
        number = f"{value:,.6g}" if isinstance(value, float) else value
        out.text(f"{name:<20} {'unknown' if value is None else number}")
    out.json(**result)
