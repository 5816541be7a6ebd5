"""What the ids of a tokenizer, and of the networks that read them, mean."""

from dataclasses import dataclass

import tiktoken


@dataclass(frozen=True)
class Vocabulary:
    """The meaning of ids: real tokens from 0 on, then the mask, then padding.

    >>> from nanodlm.data.tokenizer import gpt2
    >>> vocabulary = Vocabulary.of(gpt2())
    >>> vocabulary.size, vocabulary.end_of_text, vocabulary.mask_id, vocabulary.padded_size
    (50257, 50256, 50257, 50304)
    """

    size: int  # of the real tokens, the end-of-text mark among them
    end_of_text: int

    @classmethod
    def of(cls, encoding: tiktoken.Encoding) -> "Vocabulary":
        return cls(encoding.n_vocab, encoding.eot_token)

    @property
    def mask_id(self) -> int:
        """Id of a masked token: the first after the real ones."""
        return self.size

    @property
    def padded_size(self) -> int:
        """Number of ids that a network embeds and scores: mask included, filled up to a multiple of 128."""
        return -(-(self.size + 1) // 128) * 128
