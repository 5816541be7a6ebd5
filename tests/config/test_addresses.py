"""Addresses: one parser for stores, artifacts, manifests and checkpoints."""

import re

import pytest
from pydantic import TypeAdapter

from nanodlm.config import StoreUrl, parse_address
from nanodlm.errors import UsageError


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("train/3f2a", ("", "train", "3f2a", None)),
        ("/train/3f2a", ("/", "train", "3f2a", None)),
        ("/data/store/train/3f2a/manifest.json", ("/data/store", "train", "3f2a", None)),
        ("gs://bucket/runs/train/3f2a/manifest.json", ("gs://bucket/runs", "train", "3f2a", None)),
        ("file:///data/store/train/3f2a", ("file:///data/store", "train", "3f2a", None)),
        ("train/3f2a/step_100", ("", "train", "3f2a", 100)),
        ("/data/store/train/3f2a/checkpoints/step_000100", ("/data/store", "train", "3f2a", 100)),
        ("s3://bucket/runs/train/3f2a/attempts/2026T1/checkpoints/step_7/", ("s3://bucket/runs", "train", "3f2a", 7)),
    ],
)  # fmt: skip
def test_an_address_says_its_store_stage_fingerprint_and_checkpoint(address: str, parts: tuple) -> None:
    assert parse_address(address)[1:] == parts


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("s3://bucket//x/train/3f2a", "s3://bucket/x/train/3f2a"),
        ("s3://bucket//train//3f2a/", "s3://bucket/train/3f2a"),
        ("file:////data//store/train/3f2a", "file:///data/store/train/3f2a"),
        ("data//store/train/3f2a//checkpoints//step_7", "data/store/train/3f2a/checkpoints/step_7"),
    ],
)
def test_repeated_slashes_are_another_spelling_of_one_place(address: str, same: str) -> None:
    assert parse_address(address) == parse_address(same)


@pytest.mark.parametrize("address", ["s3://bucket", "gs://bucket/store/", "memory://store", "store"])
def test_the_address_of_a_store_is_not_taken_for_an_artifacts(address: str) -> None:
    assert parse_address(address)[1:] == ("", "", "", None)


@pytest.mark.parametrize(
    ("address", "folder"),
    [("/step_100", "."), ("a/attempts/b/checkpoints/step_1", "a/attempts/b")],
)
def test_a_checkpoint_is_found_from_the_folder_that_its_address_begins_with(address: str, folder: str) -> None:
    assert parse_address(address).folder == folder


def test_an_address_with_secrets_is_refused() -> None:
    with pytest.raises(UsageError, match="credentials come from the environment only"):
        parse_address("s3://me:hunter2@bucket/train/3f2a")
    pattern = TypeAdapter(StoreUrl).json_schema()["pattern"]  # so that a server can refuse it in a form
    assert re.fullmatch(pattern, "s3://bucket/store") and not re.fullmatch(pattern, "s3://me:hunter2@bucket/store")
