"""Walks from noise to text: to the end in one compiled loop, or step by step from Python, for people to watch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanodlm.diffusion.checks import finite_tokens
from nanodlm.diffusion.noise import Tokens


class State(NamedTuple):
    """Hold texts on their way from noise."""

    step: Int[Array, ""]  # steps so far
    tokens: Tokens  # x_t; -1 in rows that have ended, for nothing can be drawn from logits that are not finite
    confidence: Float[Array, "B L"]  # what the model gave each token when it was drawn; 1 for the prompt, 0 for masks
    calls: Int[Array, ""]  # of the network so far
    memory: Any = ()  # what else is kept from step to step, such as a cache


class Walk(NamedTuple):
    """Hold one way from noise to text: where it starts, whether it goes on from a state, and a step of it."""

    start: State
    more: Callable[[State], Bool[Array, ""]]
    body: Callable[[State], State]


def to_end(walk: Walk) -> State:
    """Take all steps of a walk in one loop."""
    return jax.lax.while_loop(walk.more, walk.body, walk.start)


def step_by_step(walk_of: Callable[..., Walk]) -> Callable[..., Iterator[State]]:
    """Return a function that takes the walk of its arguments, and yields its states, the start's first.

    Both the start and the step are compiled once for all arguments of the same shapes and types, whatever their values,
    so a network's parameters should be among them. The last state is that of `to_end`. Logits that are not finite end
    in a ValueError.

    >>> from nanodlm.diffusion.sampling import reverse_process
    >>> always_1 = lambda x_t, t: 50 * jax.nn.one_hot(jnp.ones_like(x_t), 3)
    >>> steps = step_by_step(lambda key, prompt: reverse_process(
    ...     always_1, key, shape=(1, 3), mask_id=2, schedule="linear", sampler="first_hitting", prompt=prompt))
    >>> [int((state.tokens == 2).sum()) for state in steps(jax.random.key(0), jnp.array([[2, 0, 2]]))]
    [2, 1, 0]
    """

    # Given all arguments, it leaves the start where they lie; elsewhere, the first step would be compiled for itself.
    @partial(jax.jit, keep_unused=True)
    def begin(*arguments: Any) -> tuple[State, Bool[Array, ""]]:
        walk = walk_of(*arguments)
        return walk.start, walk.more(walk.start)

    @jax.jit
    def step(state: State, *arguments: Any) -> tuple[State, Bool[Array, ""]]:
        walk = walk_of(*arguments)
        state = walk.body(state)
        return state, walk.more(state)

    def steps(*arguments: Any) -> Iterator[State]:
        state, more = begin(*arguments)
        yield state
        while more:
            state, more = step(state, *arguments)
            finite_tokens(state.tokens)
            yield state

    return steps


def start_of(tokens: Tokens, given: Bool[Array, "B L"], memory: Any = ()) -> State:
    """Return the state before the first step."""
    return State(jnp.int32(0), tokens, given.astype(jnp.float32), jnp.int32(0), memory)


def end_rows(tokens: Tokens, mask_id: int) -> Tokens:
    """Return tokens without masks in rows that have ended: there all that is not known becomes -1.

    >>> end_rows(jnp.array([[-1, 5, 9], [4, 5, 9]]), 9).tolist()
    [[-1, 5, -1], [4, 5, 9]]
    """
    return jnp.where((tokens < 0).any(axis=1, keepdims=True) & (tokens == mask_id), -1, tokens)


def any_sound(tokens: Tokens) -> Bool[Array, ""]:
    """Return whether any row has not ended."""
    return (tokens >= 0).all(axis=1).any()
