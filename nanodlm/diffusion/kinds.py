"""The one table of what a kind of objective is: what its network reads, and what it can be combined with.

    kind            the network is given               the bound is a mean of weighted
    absorbing       masked rows                        cross-entropies at masked positions
    block           masked blocks, clean ones before   the same within each block, summed over blocks
    autoregressive  the tokens before                  cross-entropies at all positions: -log p itself
    uniform         rows with random tokens            divergences between the true and the model's reverse step
    hybrid          rows with both                     the same

A new kind is a row of `KINDS`, its noise in `Objective.corrupt` and its loss in `Objective.row_nats`: settings,
training, evaluation and generation read the table. Nothing here imports JAX.
"""

from dataclasses import dataclass
from typing import Literal, get_args

KindName = Literal["absorbing", "uniform", "hybrid", "block", "autoregressive"]
JumpingSchedule = Literal["loglinear", "linear_clipped", "cosine_clipped", "sqrt_clipped"]  # not from 0 to 1
ScheduleName = Literal["linear", "cosine", "sqrt", "poly", JumpingSchedule]
Estimator = Literal["continuous", "discrete", "count", "constant_count"]
Weighting = Literal["bound", "clipped", "uniform"]
Times = Literal["systematic", "stratified", "independent"]
InOrder = Literal["spread", "ancestral", "ancestral_skip", "first_hitting"]
ByScore = Literal["confidence", "margin", "entropy", "threshold"]
Remasking = Literal["remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop"]
Sampler = Literal[InOrder, ByScore, Remasking]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


@dataclass(frozen=True)
class Kind:
    """What one kind of objective is."""

    # What a position of its network reads: the row, its block and the clean ones before, or what is before its target.
    reads: Literal["row", "block", "before"]
    masks: bool  # whether noise masks tokens
    random_tokens: bool  # whether noise replaces tokens by random ones
    estimators: tuple[Estimator, ...]  # those that its bound has, the one to train with first
    samplers: tuple[Sampler, ...] = ("ancestral",)  # those that write its texts, the one to write with first
    guidance: bool = False  # whether they can be guided, which takes masks to hide the prompt with and no cache of it
    row_cache: bool = False  # whether what it makes of a row can be kept while part of the row is filled in
    any_length: bool = False  # whether its texts can be longer than the rows it was trained on
    edges_known: bool = False  # whether what was read tells where documents end, so that scoring may tell it as well

    def block_size(self, chosen: int) -> int:
        """Return the block size of its network, 0 for one that reads whole rows, given the one that was chosen."""
        return {"row": 0, "block": chosen, "before": 1}[self.reads]


_OF_MASKS: tuple[Estimator, ...] = ("constant_count", "count", "continuous", "discrete")
_OF_RANDOM_TOKENS: tuple[Estimator, ...] = ("count", "continuous")

KINDS: dict[KindName, Kind] = {
    "absorbing": Kind("row", True, False, _OF_MASKS, SAMPLERS, guidance=True, row_cache=True),
    "uniform": Kind("row", False, True, _OF_RANDOM_TOKENS),
    "hybrid": Kind("row", True, True, _OF_RANDOM_TOKENS, guidance=True),
    "block": Kind("block", True, False, _OF_MASKS, SAMPLERS, any_length=True),
    "autoregressive": Kind("before", False, False, ("count",), any_length=True, edges_known=True),
}
