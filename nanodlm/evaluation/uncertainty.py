"""The standard error of a ratio of sums over rows, when rows that share a document resemble each other.

A text of documents is cut into rows, so that a long document fills many rows, and a row holds many short documents.
What is reported is the ratio of two sums over rows, such as nats over bytes.
"""

import numpy as np
from jaxtyping import Float, Int


def documents_in(rows: list[np.ndarray], end_of_text: int) -> Int[np.ndarray, "N 2"]:
    """Return the number of the first and of the last document in each row of a stream of documents.

    An end-of-text mark belongs to the document that it ends.

    >>> documents_in([np.array([5, 5]), np.array([9, 5]), np.array([9, 9])], end_of_text=9).tolist()
    [[0, 0], [0, 1], [1, 2]]
    """
    ends = np.array([(row == end_of_text).sum() for row in rows])
    before = np.concatenate([[0], np.cumsum(ends)[:-1]])
    complete = np.array([row[-1] == end_of_text for row in rows])
    return np.stack([before, before + ends - complete], axis=1)


def count_documents(documents: Int[np.ndarray, "N 2"]) -> int:
    """Return how many documents rows touch, which are in the order of the stream."""
    first, last = documents.T
    return int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())


def ratio_stderr(
    values: Float[np.ndarray, "N"], sizes: Float[np.ndarray, "N"], documents: Int[np.ndarray, "N 2"] | None = None
) -> float:
    """Return the standard error of sum(values) / sum(sizes), for other documents of the same kind.

    With R the ratio and e_i = values_i - R sizes_i, it is the square root of the sum of e_i e_j over all pairs of rows
    that share a document, i = j among them, over sum(sizes). The factor n / (n - 1) is for n documents, or rows where
    there are fewer. This is the linearised variance of a ratio (Cochran, Sampling Techniques, 1977, chapter 6) with the
    sandwich for clusters that overlap (Aronow, Samii and Assenova, arXiv:1312.3398).

    Without `documents`, from `documents_in`, rows are taken as independent; with them it is never less than then, for
    in few rows the pairs may cancel all. One row or document is a ValueError: nothing then tells how others differ.

    >>> round(ratio_stderr(np.array([1.0, 3.0]), np.array([1.0, 1.0])), 4)
    1.0
    """
    if documents is None:
        documents = np.stack([np.arange(len(values))] * 2, axis=1)
    first, last = documents.T
    n = min(len(values), count_documents(documents))
    if n < 2:
        raise ValueError("rows of one document have no standard error")
    errors = values - values.sum() / sizes.sum() * sizes
    several = last > first
    numbers, shares = np.concatenate([first, last[several]]), np.concatenate([errors, errors[several]])
    # Two rows share one document at most: the square of its rows' sum, less their squares, is all pairs of its rows.
    pairs = np.square(np.bincount(numbers, shares)) - np.bincount(numbers, np.square(shares))
    variance = (np.square(errors).sum() + max(pairs.sum(), 0.0)) * n / (n - 1)
    return float(np.sqrt(variance) / sizes.sum())


def interval(value: float, stderr: float, n: int, share: float = 0.95) -> list[float]:
    """Return the interval that covers the true value so often, of n documents, or rows: Student's, with n - 1 degrees.

    It ends at 0, for what is bounded is never below: with two documents Student's t reaches 12.7 errors, past any use.
    To leave out what cannot be covers the truth no less often.

    >>> [round(end, 2) for end in interval(2.0, 0.1, 10)], [round(end, 2) for end in interval(2.0, 0.5, 2)]
    ([1.77, 2.23], [0.0, 8.35])
    """
    from scipy.special import stdtrit  # slow to load

    reach = stderr * float(stdtrit(n - 1, (1 + share) / 2))
    return [max(0.0, value - reach), value + reach]
