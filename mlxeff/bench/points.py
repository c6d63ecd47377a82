"""What is measured at one time, under the names of llama-bench: pp512, tg128, tg128 @ d4096."""

from dataclasses import dataclass

PROMPT, DECODE = "pp", "tg"
FILTERS = ("arm", "device", "batch", "tokens", "depth", "test")  # keys of --only


@dataclass(frozen=True)
class Point:
    """A pass: `batch` texts are read at once, and `tokens` tokens of each are timed.

    kind   "pp": the tokens of a prompt are computed; "tg": tokens are decoded one after the other
    depth  tokens that are in the KV cache before them
    """

    batch: int
    tokens: int
    depth: int = 0
    kind: str = PROMPT

    @property
    def test(self) -> str:
        """The name: "pp512", "tg128 @ d4096", with several texts at once "pp512 x4"."""
        after = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{after}" + (f" x{self.batch}" if self.batch > 1 else "")

    @property
    def prompt(self) -> int:
        """Tokens of each text that are read as a prompt. Decoding begins after one token at least."""
        return self.depth + self.tokens if self.kind == PROMPT else max(1, self.depth)

    @property
    def total(self) -> int:
        """Tokens of each text in the KV cache at the end."""
        return self.prompt + (self.tokens if self.kind == DECODE else 0)

    def fields(self, arm: str, device: str) -> dict:
        """The fields of a sample that say what was measured."""
        sizes = {"batch": self.batch, "tokens": self.tokens, "depth": self.depth}
        return {"arm": arm, "device": device, "test": self.test, **sizes}
