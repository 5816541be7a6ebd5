"""The data card: what is trained on and held out, how long and how frequent it is, what was left out, and examples."""

from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from tiktoken import Encoding

from nanodlm.data.documents import Documents
from nanodlm.data.tokenizer import END_OF_TEXT, token_sizes
from nanodlm.errors import counted
from nanodlm.store import Artifact, Json

CARD = "card.json"
EXAMPLES, BEGINNING, LETTERS = 10, 100, 200  # documents that are shown; tokens and letters of each, at most


class Glance:
    """What is kept of documents that pass: how many there are of each length, and how those begin that are shown."""

    def __init__(self) -> None:
        self.lengths = np.zeros(48, np.int64)  # the i-th counts documents of 2**i tokens and more, below 2**(i+1)
        self.beginnings: list[bytes] = []  # token ids, four bytes each

    def at(self, batches: Iterable[Documents]) -> Iterator[Documents]:
        """Yield tokenised documents, and look at them."""
        for batch in batches:
            self.lengths += np.bincount(np.frexp(batch.sizes)[1] - 1, minlength=len(self.lengths))
            ids, edges = batch.flat.astype("<u4"), (batch.offsets - batch.offsets[0]).tolist()
            found = {ids[start : min(start + BEGINNING, end)].tobytes() for start, end in pairwise(edges)}
            self.beginnings = first({*self.beginnings, *found})
            yield batch

    def info(self) -> Json:
        """Return it as JSON, for `card`."""
        return {"lengths": self.lengths.tolist(), "beginnings": [one.hex() for one in self.beginnings]}


def first(beginnings: set[bytes]) -> list[bytes]:
    """Return the examples among some beginnings by their hashes: the same, whatever the order and the parts."""
    return sorted(beginnings, key=lambda one: blake2b(one).digest())[:EXAMPLES]


def card(encoding: Encoding, inputs: dict[str, Artifact], shards: list[Json], frequencies: np.ndarray) -> Json:
    """Return the card of shards, from what each was finished with and the stages before have counted.

    `frequencies` is how often each token is trained on, (V,). Lengths are in tokens; rows that were cut from a stream
    have none. Of shards that an earlier version has finished, neither lengths nor examples are known.
    """
    download, held_out = inputs["download"].metrics, inputs["split"].metrics
    documents, dropped = (sum(shard[name] for shard in shards) for name in ("train_documents", "dropped_tokens"))
    sizes = [int(total) for total in (frequencies.sum(), *(frequencies @ token_sizes(encoding)))]
    training = dict(zip(("documents", "tokens", "bytes", "characters"), (documents, *sizes), strict=True))
    lengths = np.sum([shard.get("lengths", [0]) for shard in shards], axis=0) * ("row_size" not in download)
    bad = [download.get(f"bad_{side}rows", {"counts": {}, "first": []}) for side in ("", "validation_")]
    left_out = {f"rows, {why}": count for why, count in bad[0]["counts"].items()}
    left_out |= {f"validation rows, {why}": count for why, count in bad[1]["counts"].items()}
    cleaned = dict(download.get("cleaned", {}))
    mended = cleaned.pop("repaired", 0)
    left_out |= {f"documents, {why}": count for why, count in cleaned.items()}
    left_out |= {"tokens, in no row": dropped, "tokens, where the validation ends": held_out.get("val_dropped_tokens")}
    alike = sum((Counter(shard.get("contaminated")) for shard in shards), Counter())
    left_out |= {f"documents, with words of {name}": count for name, count in alike.items()}
    chosen = first({bytes.fromhex(beginning) for shard in shards for beginning in shard.get("beginnings", ())})
    texts = [encoding.decode(np.frombuffer(one, "<u4").tolist())[:LETTERS] for one in chosen]
    return {
        "training": training,
        "validation": {name: held_out.get(f"val_{name}") for name in training},
        "lengths": {str(2**i): int(count) for i, count in enumerate(lengths) if count},
        "frequent": [[encoding.decode([i]), int(frequencies[i])] for i in np.argsort(-frequencies, kind="stable")[:20]],
        "vocabulary": encoding.n_vocab,
        "never_trained_on": int((frequencies == 0).sum()),
        "left_out": {what: count for what, count in left_out.items() if count},
        "first_left_out": bad[0]["first"] + bad[1]["first"],
        "mended": mended,
        "examples": [text.removesuffix(END_OF_TEXT) for text in texts],
    }


def groups(card: Json) -> dict[str, list[str]]:
    """Return a card without its examples in words, by name, for people."""
    most, total = max(card["lengths"].values(), default=0), card["training"]["tokens"]
    sides = ("training", "validation")
    said = {side: [", ".join(counted(n, what) for what, n in card[side].items() if n)] for side in sides}
    bars = [f"{n:>12,} of {int(low):,} or more {'▇' * -(-24 * n // most)}" for low, n in card["lengths"].items()]
    said |= {"documents by tokens": bars}
    said |= {"frequent tokens": [", ".join(f"{text!r} {n / total:.2%}" for text, n in card["frequent"])]}
    said |= {"vocabulary": [f"{card['vocabulary']:,} tokens, {card['never_trained_on']:,} never trained on"]}
    if card["mended"]:
        said |= {"mended": [counted(card["mended"], "documents")]}
    left_out = [f"{count:,} {what}" for what, count in card["left_out"].items()]
    return said | {"left out": [*left_out, *(" ".join(text.split()) for text in card["first_left_out"])] or ["nothing"]}


def described(card: Json) -> list[tuple[str, str]]:
    """Return a card without its examples as names and values, for plain text; a name that goes on is empty."""
    return [(name if i == 0 else "", text) for name, texts in groups(card).items() for i, text in enumerate(texts)]
