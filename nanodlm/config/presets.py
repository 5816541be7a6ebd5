"""Complete configurations by name, and what is changed of one: in a file, or by a flow."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from nanodlm.config.differences import explain, flat
from nanodlm.config.settings import Config
from nanodlm.errors import UsageError

FILES = (".json", ".yaml", ".yml")  # of settings
_DECAY = {"lr_schedule": "warmup_stable_decay", "warmup_steps": 50, "cooldown_steps": 1000}
_DEMO = Config().replace(
    data={"part_mb": 2.0},
    model={"n_layers": 2, "conv_width": 5, "tie_embeddings": True, "qk_norm": False, "dtype": "auto"},
    objective={"weighting": "uniform"},
    train={"batch_size": 32, "max_steps": 2000, "optimizer": "muon", "lr": 8e-3, "weight_decay": 0.0, **_DECAY},
    sample={"temperature": 0.6},
)

_LARGE = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "dtype": "bfloat16"}
_LONG = {"warmup_steps": 2000, "ema_decay": 0.9999}
_RARELY = {"log_every": 50, "save_every": 1000}

# The original project's data and sizes: 9B GPT-2 tokens of OpenWebText, for one or many GPUs.
_TOKENS = {"source": ("hf://NeelNanda/openwebtext-tokenized-9b",), "column": "tokens", "pretokenized": True}
_TOKENS["revision"] = "5a711cc"  # the upload of the last of its 37 files
_UPDATES = {"batch_size": 64, "grad_acc_steps": 8, "max_steps": 50_000}
_OWT = Config().replace(
    data={**_TOKENS, "tokenizer": "gpt2", "part_mb": 512.0},
    model={**_LARGE, "seq_len": 1024},
    train={**_UPDATES, **_LONG, "lr": 6e-4, "min_lr": 6e-5},
    eval={"batch_size": 32},
    sample={"num_steps": 1000},
    exp=_RARELY,
)

# Characters, held out as published: see data/README.md.
_PLAYS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SHAKESPEARE = Config().replace(
    data={"source": _PLAYS, "tokenizer": "chars", "split": "last"},
    model={"seq_len": 256, "n_layers": 6, "n_heads": 6, "d_model": 384, "d_ff": 1536, "dtype": "auto"},
    train={"batch_size": 64, "max_steps": 5000, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100},
    sample={"num_steps": 256},
)
_TEXT8 = _SHAKESPEARE.replace(
    data={"source": "zip://text8::http://mattmahoney.net/dc/text8.zip", "val_share": 0.05},
    model=_LARGE,
    train={**_LONG, "batch_size": 512, "max_steps": 500_000, "lr": 3e-4, "min_lr": 3e-5},
    exp=_RARELY,
)

# Files of the hub at a commit, in GPT-2 ids: what each is and is held against is told in data/README.md.
_FILES = "https://huggingface.co/datasets/{}.parquet".format
_WIKITEXT = "Salesforce/wikitext/resolve/b08601e04326c79dfdd32d625aee71d232d685c3/wikitext-103-raw-v1/"
_STORIES = "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/data/"
_STORIES_PARTS = ("0-of-00004-2d5a1467fff1081b", "1-of-00004-5852b56a2bd28fd9")
_STORIES_PARTS += ("2-of-00004-a26307300439e943", "3-of-00004-d243063613e5a057")
_FINEWEB = "HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/"
_WEB = _OWT.replace(
    data={"source": [_FILES(f"{_FINEWEB}{i:03}_00000") for i in range(14)], "column": "text", "pretokenized": False}
)
_SENTENCES = {"batch_size": 512, "grad_acc_steps": 1, "max_steps": 1_000_000, "lr_schedule": "warmup_constant"}

Preset = Literal[
    "demo", "owt", "owt-1b", "shakespeare", "text8", "enwik8", "wikitext103", "tinystories", "lm1b", "fineweb-edu"
]
PRESETS: dict[str, Config] = {
    "demo": _DEMO,
    "owt": _OWT,
    # 1.31B parameters, 20 tokens for each. Any number of devices that divides 128 can share it; --train.fsdp cuts what
    # each holds, and remat="dots" is faster where there is memory.
    "owt-1b": _OWT.replace(
        model={"n_layers": 24, "n_heads": 16, "d_model": 2048, "d_ff": 8192, "tie_embeddings": True},
        train={"batch_size": 128, "max_steps": 25_000, "lr": 2e-4, "min_lr": 2e-5, "remat": "full"},
        eval={"batch_size": 128},
    ),
    "shakespeare": _SHAKESPEARE,
    "text8": _TEXT8,
    "enwik8": _TEXT8.replace(data={"tokenizer": "bytes", "source": "zip://enwik8::http://mattmahoney.net/dc/enwik8.zip"}),
    "wikitext103": _WEB.replace(
        data={
            "source": [_FILES(f"{_WIKITEXT}train-0000{i}-of-00002") for i in range(2)],
            "validation": _FILES(f"{_WIKITEXT}validation-00000-of-00001"),
            "part_mb": 64.0,
        },
        train={"grad_acc_steps": 1},
    ),
    "tinystories": _WEB.replace(
        data={
            "source": [_FILES(f"{_STORIES}train-0000{part}") for part in _STORIES_PARTS],
            "validation": _FILES(f"{_STORIES}validation-00000-of-00001-869c898b519ad725"),
            "part_mb": 64.0,
        },
        model={"seq_len": 512, "n_layers": 8, "n_heads": 8, "d_model": 512, "d_ff": 2048},
        train={"grad_acc_steps": 1, "lr": 1e-3, "min_lr": 1e-4},
        sample={"num_steps": 512},
    ),
    "lm1b": _WEB.replace(
        data={"source": "hf://billion-word-benchmark/lm1b", "revision": "8d52bfd3cc2819fc1166dbb8144c328e2690de3e"},
        model={"seq_len": 128},
        train={**_SENTENCES, "warmup_steps": 2500, "lr": 3e-4, "beta2": 0.999, "weight_decay": 0.0},
        sample={"num_steps": 128},
    ),
    "fineweb-edu": _WEB,
}  # fmt: skip
_KNOWN = " or ".join(", ".join(PRESETS).rsplit(", ", 1))


def load_config(name: str) -> Config:
    """Look up a preset, or read a file of settings, JSON or YAML, or JSON that is given instead of its path.

    What a file does not set is as in the preset that it names under `preset`, else as in `demo`.
    """
    if name in PRESETS:
        return PRESETS[name]
    is_json = name.startswith("{")
    if not is_json and not name.endswith(FILES):
        raise UsageError(f"unknown preset {name!r}: choose {_KNOWN}, or name a config.json that a run has written")
    try:
        text = name if is_json else Path(name).read_text()
        given = yaml.safe_load(text) if name.endswith(FILES[1:]) else json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("Input should be a valid dictionary of settings")
        return changed(given.pop("preset", "demo"), given)
    except OSError as error:
        raise UsageError(f"cannot read config {name}: {error.strerror or error}") from error
    except (ValueError, UsageError, yaml.YAMLError) as error:
        what = "the configuration" if is_json else name
        raise UsageError(f"{what} is not a valid config: {explain(error)}") from error


def changed(preset: str, changes: dict[str, Any]) -> Config:
    """Return a preset with settings changed, which are named in groups, `{"train": {"lr": 0.1}}`, or `train.lr`."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}: choose {_KNOWN}")
    settings = PRESETS[preset].model_dump()
    for name, value in flat(changes).items():
        group, _, field = name.partition(".")
        if field or value is not None:  # not a group whose settings are commented out
            settings.setdefault(group, {})[field] = value
    try:
        return Config.model_validate(settings)
    except ValueError as error:
        raise UsageError(explain(error)) from error


def as_changes(config: Config) -> tuple[str, dict[str, Any]]:
    """Return the preset most like a configuration, and what it changes of that, as `("owt", {"train.lr": 0.001})`."""
    wanted = flat(config.model_dump(mode="json"))
    found = []
    for preset, known in PRESETS.items():
        has = flat(known.model_dump(mode="json"))
        found.append((preset, {name: value for name, value in wanted.items() if has[name] != value}))
    return min(found, key=lambda one: len(one[1]))


class _Form:
    """The JSON schema of changes, for forms and servers: that of `Config` without defaults, which a form would send."""

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema, dotted = handler(Config.__pydantic_core_schema__), {}
        del schema["additionalProperties"]
        for name, group in schema["properties"].items():
            del group["default"]
            for field, setting in handler.resolve_ref_schema(group)["properties"].items():
                setting.pop("default", None)
                dotted[rf"^{name}\.{field}$"] = setting
        known = "|".join([*dotted, *(f"^{name}$" for name in schema["properties"])])
        others = {f"^(?!{known})": {"not": {"description": "there is no such setting"}}}  # what its refusal quotes
        return {**schema, "patternProperties": dotted | others}


Changes = Annotated[dict[str, Any], _Form()]
