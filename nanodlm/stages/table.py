"""The seven stages and their report, as data; and those of a judge, which a configuration may ask for.

Each stage is a function from verified input artifacts and its own part of the configuration to files in a folder.
Its fingerprint covers just those, so a changed setting rebuilds what depends on it and nothing else.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.config import Config, evaluation_settings, sampling_settings, training_settings, twin
from nanodlm.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    build: str  # `module:function` of this package that does the work; see `run`
    reads: tuple[str, ...]  # stages whose artifacts it reads; see `inputs`
    parameters: Callable[[Config], dict[str, Any]]  # the settings that determine its bytes, given the inputs
    version: int = 1  # raised when the function's output changes for equal inputs
    own_process: bool = False  # whether it uses JAX, and so runs in a process of its own beside an orchestrator
    volatile: tuple[str, ...] = ()  # prefixes of its files that hold times or logs
    of: Callable[[Config], Config] = lambda config: config  # what it builds, given the configuration of the run
    as_stage: str = ""  # the stage that it is, of another configuration, where it is no stage of its own

    @property
    def folder(self) -> str:
        """The folder of its artifacts in the store."""
        return self.as_stage or self.name

    def inputs(self, config: Config) -> tuple[str, ...]:
        """Return the stages whose artifacts it reads: a tokenizer reads the text only to be trained on it."""
        if self.name == "judge" and config.sample.judge.startswith("hf:"):
            return ("tokenizer", "shard", "sample")
        fixed = self.name == "tokenizer" and config.data.tokenizer in ("gpt2", "bytes")
        judged = self.name == "report" and config.sample.judge
        return () if fixed else (*self.reads, *(("judge",) if judged else ()))

    def is_wanted(self, config: Config) -> bool:
        """Say if a run of a configuration goes through it: all are, but for those of a judge, and a frontier."""
        asked = {"twin": config.sample.judge == "twin", "judge": bool(config.sample.judge), "frontier": False}
        return asked.get(self.name, True)

    @property
    def module(self) -> str:
        """The module of `build`, which with all it imports makes the stage's results."""
        return "nanodlm." + self.build.partition(":")[0]

    def run(self, *arguments: Any) -> dict[str, Any]:
        """Call `build`, imported now, with `(config, inputs, attempt, emit)`; it returns the stage's metrics."""
        return getattr(import_module(self.module), self.build.partition(":")[2])(*arguments)


def _settings(group: str, *names: str) -> Callable[[Config], dict[str, Any]]:
    """Return a function that takes settings of one group out of a configuration: all of them without names."""
    return lambda config: getattr(config, group).model_dump(include=set(names) or None)


def _source(config: Config) -> dict[str, Any]:
    from nanodlm.data import sources

    return sources.identity(config.data)


def _tokenizer(config: Config) -> dict[str, Any]:
    fields = {"tokenizer", "vocab_size", *HELD_OUT} if config.data.tokenizer == "bpe" else {"tokenizer"}
    return config.data.model_dump(include=fields)


def _shard(config: Config) -> dict[str, Any]:
    names = {"decontaminate", "weights", "rows", *(["variable_share"] if config.data.rows == "document" else ())}
    chosen = config.data.model_dump(mode="json", include=names, exclude_defaults=True)
    if config.data.decontaminate:
        chosen |= _sets(config)
    return {"seq_len": config.model.seq_len, **chosen}


def _sets(config: Config) -> dict[str, Any]:
    from nanodlm.data.sets import identity

    found = [identity(word, config.data) for word in config.eval.sets]
    return {"sets": found} if found else {}


def _training(config: Config) -> dict[str, Any]:
    if not config.exp.resume_path:
        return training_settings(config)
    return {**training_settings(config), "started_from": find_checkpoint(config.exp.resume_path).digest}


def _evaluation(config: Config) -> dict[str, Any]:
    return evaluation_settings(config) | _sets(config)


def _judging(config: Config) -> dict[str, Any]:
    from nanodlm.evaluation.hub_judge import identity

    options = config.sample
    return {"prompt": options.prompt, **(identity(options) if options.judge.startswith("hf:") else {})}


OfEveryRun = Literal["download", "tokenizer", "split", "shard", "train", "evaluate", "sample"]
StageName = Literal[OfEveryRun, "twin", "judge", "report"]
HELD_OUT = ("split", "val_tokens", "val_share", "split_seed")  # the settings that decide it
DOCUMENTS = ("download", "tokenizer")
LOGS = ("checkpoints/", "config.json", "logs.json")
COUNTS = ("counts.npy", "card.json")
RESULTS = ("train", "evaluate", "sample")
PAGES = ("report.html", "report.md")
ALL = (
    # Since version 3, its parts hold the hash of each document, which makes the keys of the split.
    Stage("download", "data.download:download", (), _source, 3),
    Stage("tokenizer", "data.split:build_tokenizer", ("download",), _tokenizer, 3),
    Stage("split", "data.split:build_split", DOCUMENTS, _settings("data", *HELD_OUT), 3),
    # Since version 3, rows of ids are joined before they are cut.
    Stage("shard", "data.shard:build_shards", (*DOCUMENTS, "split"), _shard, 3, volatile=COUNTS),
    Stage("train", "training.loop:train", ("shard", "tokenizer"), _training, own_process=True, volatile=LOGS),
    # Since version 4, it keeps the nats of every row, and says the interval and the draws; since 5, its profile.
    Stage("evaluate", "evaluation.evaluate:evaluate", ("shard", "train"), _evaluation, 5, own_process=True),
    # Since version 2, it keeps the steps of the first texts, and measures all beside texts that were held out; since 3,
    # a seed draws other texts.
    Stage("sample", "generation.generate:generate", ("shard", "train"), sampling_settings, 3, own_process=True),
    Stage(
        "twin",
        "training.loop:train",
        ("shard", "tokenizer"),
        lambda config: _training(twin(config)),
        own_process=True,
        volatile=LOGS,
        of=twin,
        as_stage="train",
    ),
    # Since version 2, it counts bytes.
    Stage("judge", "evaluation.judge:judge", ("shard", "sample", "twin"), _judging, 2, own_process=True),
    Stage("frontier", "evaluation.frontier:frontier", ("train",), lambda _: {}),  # only people ask for it, by `bench`
    # Since version 2, its digest is that of its results alone.
    Stage("report", "evaluation.report:build", RESULTS, _settings("exp", "run_name"), 2, volatile=PAGES),
)
STAGES = {stage.name: stage for stage in ALL}
NAMES: tuple[str, ...] = get_args(OfEveryRun)


def until(last: str, config: Config | None = None) -> tuple[str, ...]:
    """Return the names of the stages up to one; the report comes with the samples, as does a judge that is asked for.

    >>> until("split")
    ('download', 'tokenizer', 'split')
    """
    names = tuple(STAGES) if last == "sample" else tuple(STAGES)[: [*STAGES].index(last) + 1]
    return tuple(name for name in names if STAGES[name].is_wanted(config or Config()))


def needed(config: Config, last: str) -> list[str]:
    """Return the names of the stages that one needs, and of those that these need, in order; its own comes last."""
    names = {last}
    for name in reversed(until(last, config)):
        if name in names:
            names |= set(STAGES[name].inputs(config))
    return [name for name in until(last, config) if name in names]


def check_rebuild(config: Config, rebuild: str | None, last: str) -> None:
    """Raise a `UsageError` when a run lacks such a stage, or the one to rebuild, `changed` being any, is too late."""
    for flag, name in (("until", last), ("rebuild", rebuild)):
        if name in ("twin", "judge") and not STAGES[name].is_wanted(config):
            why = f"its judge is {config.sample.judge}" if config.sample.judge else "set --sample.judge twin"
            raise UsageError(f"--{flag} {name}: this run has none: {why}")
    if rebuild not in (None, "changed", *until(last, config)):
        raise UsageError(f"--rebuild {rebuild} comes after --until {last}: nothing would be rebuilt")


def check(config: Config, stages: Iterable[str]) -> None:
    """Refuse settings that would stop one of these stages, as far as they tell before anything is started or built."""
    from nanodlm.data import clean, sets
    from nanodlm.data.held_out import check_rows, check_size
    from nanodlm.evaluation import hub_judge
    from nanodlm.training.trackers import check_packages

    if "download" in stages:
        clean.check(config.data)
    if "split" in stages:
        check_size(config.data)
    tokens, length = config.data.val_tokens, config.model.seq_len
    if "shard" in stages and tokens and config.data.rows == "stream":
        check_rows(config.data, -(-tokens // length), tokens, length)
    if "train" in stages:
        check_packages(config)
    if "evaluate" in stages:
        for word in config.eval.sets:
            sets.find(word, config.data)
    if "judge" in stages and config.sample.judge.startswith("hf:"):
        hub_judge.check(config.sample)
