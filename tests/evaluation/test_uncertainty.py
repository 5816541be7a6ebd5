"""The standard error by document, against pairs written out, clusters, and the spread of repeated samples."""

import itertools
import math

import numpy as np
import pytest

from nanodlm.evaluation.uncertainty import count_documents, documents_in, interval, ratio_stderr

END = 9


def stream(rng: np.random.Generator, documents: int, mean_length: int, row: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return rows cut from documents of random lengths, and the nats of each row: each document has its own level."""
    lengths = rng.integers(1, 2 * mean_length, documents)
    tokens = np.concatenate([[*np.zeros(n - 1, int), END] for n in lengths])
    nats = np.repeat(rng.normal(3.0, 1.0, documents), lengths) + rng.normal(0.0, 0.5, len(tokens))
    starts = range(0, len(tokens), row)
    return [tokens[i : i + row] for i in starts], np.array([nats[i : i + row].sum() for i in starts])


def test_the_standard_error_is_the_sum_over_all_pairs_of_rows_that_share_a_document() -> None:
    rows, nats = stream(np.random.default_rng(0), documents=12, mean_length=9, row=7)
    chosen = np.arange(0, len(rows), 2)  # a sample of rows keeps the numbers that its documents have among all rows
    documents, sizes, nats = documents_in(rows, END)[chosen], np.array([len(r) for r in rows])[chosen], nats[chosen]
    errors = nats - nats.sum() / sizes.sum() * sizes
    touched = [set(range(first, last + 1)) for first, last in documents]
    pairs = itertools.product(zip(errors, touched, strict=True), repeat=2)
    total = max(sum(error * other for (error, x), (other, y) in pairs if x & y), np.square(errors).sum())
    n = min(len(chosen), len(set.union(*touched)))
    assert ratio_stderr(nats, sizes, documents) == pytest.approx(math.sqrt(total * n / (n - 1)) / sizes.sum())


def test_rows_within_one_document_each_are_clusters() -> None:
    rng = np.random.default_rng(1)
    values, sizes = rng.normal(3, 1, 60), rng.uniform(1, 2, 60)
    documents = np.repeat(np.arange(12), 5)
    by_document = ratio_stderr(values.reshape(12, 5).sum(1), sizes.reshape(12, 5).sum(1))
    assert ratio_stderr(values, sizes, np.stack([documents, documents], 1)) == pytest.approx(by_document)


def test_without_documents_it_is_the_standard_error_of_a_mean_of_equal_rows() -> None:
    values = np.random.default_rng(2).normal(3, 1, 50)
    assert ratio_stderr(values, np.ones(50)) == pytest.approx(values.std(ddof=1) / math.sqrt(50))


@pytest.mark.parametrize(("mean_length", "row"), [(120, 16), (16, 16), (5, 16)])
def test_it_is_the_spread_of_results_over_samples_of_documents_of_any_length(mean_length: int, row: int) -> None:
    rng = np.random.default_rng(3)
    ratios, by_document, by_row = [], [], []
    for _ in range(300):
        rows, nats = stream(rng, documents=60, mean_length=mean_length, row=row)
        sizes = np.array([len(r) for r in rows])
        ratios.append(nats.sum() / sizes.sum())
        by_document.append(ratio_stderr(nats, sizes, documents_in(rows, END)))
        by_row.append(ratio_stderr(nats, sizes))
    assert np.sqrt(np.mean(np.square(by_document))) == pytest.approx(np.std(ratios), rel=0.12)
    if mean_length > row:
        assert np.mean(by_row) < 0.5 * np.std(ratios), "rows are no sample of documents"


def test_a_row_ends_with_the_document_whose_mark_it_holds_last() -> None:
    rows = [np.array(row) for row in ([0, 0], [0, END], [0, END], [END, 0], [0, 0])]
    assert documents_in(rows, END).tolist() == [[0, 0], [0, 0], [1, 1], [2, 3], [3, 3]]


def test_few_rows_that_share_documents_have_no_less_than_the_error_of_independent_ones() -> None:
    values, sizes = np.array([120.0, 90.0, 130.0]), np.full(3, 50.0)
    chained = np.array([[0, 1], [1, 2], [2, 3]])
    assert ratio_stderr(values, sizes, chained) >= ratio_stderr(values, sizes) > 0


def test_one_document_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="one document"):
        ratio_stderr(np.array([1.0, 2.0]), np.ones(2), np.zeros((2, 2), int))


@pytest.mark.parametrize("documents", [6, 40])
def test_intervals_cover_the_truth_at_the_stated_rate(documents: int) -> None:
    rng, covered = np.random.default_rng(4), 0
    for _ in range(200):
        rows, nats = stream(rng, documents=documents, mean_length=30, row=16)
        sizes, shared = np.array([len(r) for r in rows]), documents_in(rows, END)
        n = min(len(rows), count_documents(shared))
        low, high = interval(nats.sum() / sizes.sum(), ratio_stderr(nats, sizes, shared), n)
        covered += low <= 3.0 <= high
    assert 0.9 * 200 <= covered <= 0.99 * 200


def test_an_interval_holds_no_number_of_bits_that_cannot_be() -> None:
    low, high = interval(1.8, 0.3, 2)
    assert low == 0 < 1.8 < high
    low, high = interval(1.8, 0.3, 40)
    assert 1.8 - low == pytest.approx(high - 1.8), "elsewhere it is as wide to both sides"
