"""How samples measure beside held-out text, for people: the measures of `judge.py` in order, with units and meaning."""

from typing import Any

from nanodlm.errors import counted

MEASURES = {  # of each its name for people, and what it is
    "gen_nats_per_token": ("nats per token", "-log p under the judge: loops are low too"),
    "gen_perplexity": ("perplexity a token", "e to the nats per token"),
    "gen_text_perplexity": ("perplexity a text", "mean over texts, as SEDD has it"),
    "gen_nats_per_byte": ("nats per byte", "whatever the judge's tokens are"),
    "gen_mauve": ("MAUVE", "likeness to real texts by the judge's features"),
    "entropy": ("entropy", "nats, of each text: low in loops"),
    "pooled_entropy": ("pooled entropy", "nats, of all texts together"),
    "distinct_1": ("distinct 1", "different tokens over tokens, of all texts"),
    "distinct_2": ("distinct 2", "the same of pairs of tokens"),
    "distinct_3": ("distinct 3", "the same of three tokens"),
    "repetition": ("repetition", "share of 4-grams met before in their text"),
    "self_bleu": ("self BLEU", "BLEU-4 against the others: 1 if all alike"),
    "copied": ("copied", "share of 8-grams that training rows hold"),
}
NONE = "–"


def table(quality: dict[str, Any], judged: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the measures that samples have: name, value of the samples and of held-out text, and what it is.

    `quality` is that of a sample stage's metrics, and `judged` the metrics of a judge stage; either may be empty.

    >>> quality = {"samples": {"entropy": 3.5, "entropy_stderr": 0.04}, "held_out": {"entropy": None}}
    >>> table(quality, {})
    [('entropy', '3.500 ± 0.040', '–', 'nats, of each text: low in loops')]
    """
    real = {name.removeprefix("held_out_"): value for name, value in judged.items() if name.startswith("held_out_")}
    samples, real = quality.get("samples", {}) | judged, quality.get("held_out", {}) | real
    known = [(name, *told) for name, told in MEASURES.items() if name in samples]
    return [(called, _shown(samples, name), _shown(real, name), what) for name, called, what in known]


def _shown(metrics: dict[str, Any], name: str) -> str:
    """Return a measure with its standard error, where it has one, to as many digits."""
    digits = 1 if name.endswith("perplexity") else 3
    value, error = (metrics.get(of) for of in (name, f"{name}_stderr"))
    numbers = [f"{number:.{digits}f}" for number in (value, error) if number is not None]
    return NONE if value is None else " ± ".join(numbers)


def measured_on(quality: dict[str, Any], judge: str) -> str:
    """Return what was measured, and by which judge, if there was one; nothing of what had no measures."""
    said = []
    if quality:
        samples, real = (
            f"{counted(of['texts'], 'texts')} of together {counted(of['tokens'], 'tokens')}"
            for of in (quality["samples"], quality["held_out"])
        )
        said.append(f"Samples: {samples}. Held out: {real}. ± is the standard error over texts.")
        said.append(f"Copies were looked for in {counted(quality['searched_tokens'], 'tokens')} of training.")
    return " ".join([*said, *([f"The judge is {judge}."] if judge else [])])
