"""All that is taken from inside Prefect where it has no public way; `tests/flows/test_internals.py` holds each."""

from contextlib import AbstractContextManager
from typing import Any

from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.exceptions import Abort


def untagged() -> AbstractContextManager[Any]:
    """Let tasks of the block have no tags: of each, Prefect would ask a server that may be busy for a limit."""
    return TagsContext(current_tags=set())


def end_of_run(why: str, state: State | None) -> BaseException:
    """Return what a flow raises to end in the state that the server has by now, without another and a traceback."""
    end = Abort(why)
    end.state = state  # type: ignore[attr-defined]  # which the run's log tells
    return end
