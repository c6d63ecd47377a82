"""The token ids that a benchmark reads: random ones, which are the same in every run, or those of a text.

What a model computes takes equally long for any ids. Drafts of speculative decoding do not: how many are accepted
depends on the text.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import MlxeffError

SEED = 0
# Ids are drawn from this share of the vocabulary, its beginning: the last ids are often special or unused.
VOCABULARY_SHARE = 0.9


class Prompts:
    """Prompts for benchmarks. `ids`: the tokens of a text; None: random ones. `origin`: where they come from."""

    def __init__(self, ids: Sequence[int] | None = None, origin: str = f"random tokens, seed {SEED}"):
        self.text, self.origin = ids, origin

    def __call__(self, batch: int, tokens: int, vocabulary: int) -> np.ndarray:
        """Ids (batch, tokens) below `vocabulary`. Of a text they are its first tokens, the same in each row. Raises
        MlxeffError for a text with fewer tokens."""
        if self.text is None:
            drawn = np.random.default_rng([SEED, batch, tokens])
            return drawn.integers(0, max(1, int(vocabulary * VOCABULARY_SHARE)), (batch, tokens))
        if len(self.text) < tokens:
            raise MlxeffError(f"{self.origin}: wanted a text of {tokens} tokens at least, got {len(self.text)}")
        return np.tile(np.asarray(self.text[:tokens]), (batch, 1))

    def described(self, shapes: Sequence[tuple[int, int]], vocabulary: int) -> dict:
        """Where the prompts come from, and a hash of all ids of the shapes (batch, tokens)."""
        hashed = hashlib.sha256()
        for batch, tokens in sorted(set(shapes)):
            hashed.update(self(batch, tokens, vocabulary).astype("<u4").tobytes())
        return {"origin": self.origin, "sha256": hashed.hexdigest()[:12]}
