"""Each thing that is taken from inside Prefect still does what it is taken for; a new version may change it."""

import pytest
from prefect import flow, get_client, tags, task
from prefect.context import TagsContext
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed

from nanodlm.flows.internals import end_of_run, untagged


def test_a_task_of_a_tagged_flow_has_no_tags() -> None:
    with tags("nanodlm"):
        with untagged():
            assert TagsContext.get().current_tags == set()
        assert TagsContext.get().current_tags == {"nanodlm"}


def test_a_flow_ends_in_the_state_that_it_was_given_and_proposes_none(prefect_server: dict[str, str]) -> None:
    ids: list[str] = []

    @task
    def idle() -> None:
        pass

    @flow
    def told() -> None:
        idle()
        ids.append(flow_run.id)
        with get_client(sync_client=True) as client:
            state = client.set_flow_run_state(flow_run.id, Failed(message="as told")).state
        raise end_of_run("as told", state)

    with temporary_settings({PREFECT_API_URL: prefect_server["PREFECT_API_URL"]}):
        with pytest.raises(BaseException, match="as told"):
            told()
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(ids[0]).state
    assert state is not None
    assert (state.name, state.message) == ("Failed", "as told")
