"""Where a bound comes from: the positions of a row, and how much of it was noise. The scores of the bound tell both."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

BINS = 16  # of the share of noise, all equally wide


class Profile:
    """Sum a bound up by position and by noise, batch by batch.

    Both are means in nats per token which, weighted by their numbers of tokens, give the bound back. Under masks the
    mean of rows with n of L tokens masked, each of which weighs L / n, is the cross-entropy of a masked token.
    """

    def __init__(self, length: int, unit: int):
        """Expect rows of at most `length` tokens, in each `unit` tokens of which noise is drawn for itself."""
        self._unit = unit
        self._position = np.zeros((2, length))  # nats and tokens
        self._noise = np.zeros((3, BINS))  # nats, tokens and draws

    def add(self, nats: Float[np.ndarray, "B L"], scored: Bool[np.ndarray, "B L"], noise: Float[np.ndarray, "B K"]):
        """Add the nats of rows, which are 0 where none are scored, and the shares that were noise in their units."""
        starts = np.arange(0, nats.shape[1], self._unit)
        self._position[:, : nats.shape[1]] += nats.sum(axis=0, dtype=np.float64), scored.sum(axis=0)
        tokens = np.add.reduceat(scored, starts, axis=1, dtype=int)
        of, drawn = np.add.reduceat(nats, starts, axis=1, dtype=np.float64), tokens > 0
        bins = np.clip(np.ceil(noise[drawn] * BINS - 1e-4).astype(int) - 1, 0, BINS - 1)  # (0, 1/16], and so on
        for total, values in zip(self._noise, (of, tokens, drawn), strict=True):
            total += np.bincount(bins, values[drawn], BINS)

    def described(self, *, noisy: bool) -> dict[str, Any]:
        """Return the means as lists, None where there is no token; without noise none by noise.

        >>> profile = Profile(2, 2)
        >>> profile.add(np.array([[2.0, 0.0]]), np.full((1, 2), True), np.array([[0.5]]))
        >>> profile.described(noisy=False)
        {'by_position': [2.0, 0.0], 'position_tokens': [1, 1], 'by_noise': None}
        """
        (by_position, n), (by_noise, tokens, draws) = self._position, self._noise
        of_noise = {
            "masked_share": ((np.arange(BINS) + 0.5) / BINS).tolist(),
            "nats_per_token": _means(by_noise, tokens),
            "tokens": tokens.astype(int).tolist(),
            "draws": draws.astype(int).tolist(),
        }
        positions = {"by_position": _means(by_position, n), "position_tokens": n.astype(int).tolist()}
        return {**positions, "by_noise": of_noise if noisy else None}


def _means(sums: Float[np.ndarray, "N"], counts: Float[np.ndarray, "N"]) -> list[float | None]:
    return [total / n if n else None for total, n in zip(sums.tolist(), counts.tolist(), strict=True)]
