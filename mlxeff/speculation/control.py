"""`Controller`: how many tokens to draft next."""

from collections import Counter
from collections.abc import Mapping

PLAIN = 8  # tokens that are decoded plainly to measure what one costs
PROBES = 3  # rounds that are drafted to measure a width
FIRST = 4  # tokens of the first drafts
KEEP = 0.9  # weight of the past in the running means of seconds
KEEP_SHARE = 0.98  # and in those of acceptance
PRIOR = 0.8, 4.0  # share of drafted tokens that are expected to be accepted, and the weight of that expectation
HOPELESS = 2.0  # a round that takes so many times the time of its tokens decoded plainly needs no second look
LONGEST_REST = 256  # tokens that are decoded plainly at most before drafting is tried again
LOOK = 6  # drafts, of which one has another width than the best known one
MARGIN = 1.02  # a width has to beat plain decoding by this factor
PROMISE = 1.15  # drafting is tried where it could be so much faster than plain decoding


class Controller:
    """Chooses the width, the number of tokens to draft in a round, so that most tokens are committed in a second: from
    the measured seconds of a round of each width, and the measured share of tokens that are accepted at each place of a
    draft. The width 0 is plain decoding. Where it is the best, drafting rests, and is tried again after some tokens:
    after twice as many each time that it still does not pay. Now and then a width beside the best one is tried, since a
    cost that was measured once, perhaps beside other work of the machine, would never be corrected otherwise.

    most    the largest width
    fixed   always this width; None: the controller decides
    known   width → seconds of a round, from an earlier run of the same model on the same machine

    `share` is what drafting a token costs at least, in steps of plain decoding, as far as the bytes tell. Where even
    drafts that are always right, and verified in the time of one step, would gain less than PROMISE, none is tried.
    """

    def __init__(self, most: int, fixed: int | None = None, known: Mapping[int, float] | None = None):
        self.most, self.fixed = most, fixed
        self.costs = {width: cost for width, cost in (known or {}).items() if width <= most}
        self.widths: Counter[int] = Counter()  # rounds of each width
        self._rounds = Counter(dict.fromkeys(self.costs, 2))  # rounds that the costs are means of
        self._right, self._tried = [PRIOR[0] * PRIOR[1]] * most, [PRIOR[1]] * most
        self.share = 0.0
        self._probes = 0 if self.costs.get(0) and len(self.costs) > 1 else PROBES
        self._rest = PLAIN

    def width(self) -> int:
        """The width of the next round."""
        if self.fixed is not None:
            return self.fixed
        if 0 not in self.costs or self.cannot_pay:
            return 0
        if self._probes:
            return min(FIRST, self.most) if self.widths.total() <= PROBES else self._best(1)
        return self._beside(self._best(0))

    def _beside(self, best: int) -> int:
        """The width `best`, or in turn, each LOOK-th time, the next one above or below it."""
        drafts = self.widths.total() - self.widths[0]
        if not best or drafts % LOOK:
            return best
        return min(max(1, best + (1 if drafts // LOOK % 2 else -1)), self.most)

    def rest(self) -> int:
        """Tokens to decode plainly in a round of width 0."""
        return PLAIN if 0 not in self.costs else LONGEST_REST if self.cannot_pay else self._rest

    @property
    def cannot_pay(self) -> bool:
        """Whether no draft could gain PROMISE."""
        return (self.most + 1) / (1 + self.most * self.share) < PROMISE

    def note(self, width: int, drafted: int, accepted: int, seconds: float) -> None:
        """A round of this width took so many seconds; of `drafted` tokens, perhaps fewer, `accepted` were right."""
        self.widths[width] += 1
        for place in range(min(accepted + 1, drafted, self.most)):
            self._right[place] = KEEP_SHARE * self._right[place] + (place < accepted)
            self._tried[place] = KEEP_SHARE * self._tried[place] + 1
        self._cost(drafted, seconds)
        slow = seconds > HOPELESS * (drafted + 1) * self.costs.get(0, seconds)
        hopeless = slow and self._rounds[drafted] > 1  # the first round often has something to set up
        self._probes = 0 if hopeless else max(0, self._probes - 1)

    def note_plain(self, tokens: int, seconds: float) -> None:
        """`tokens` tokens were decoded plainly in so many seconds."""
        self.widths[0] += 1
        rested = 0 in self.costs
        self._cost(0, seconds / tokens)
        if rested and not self._probes and not self.cannot_pay:
            self._probes, self._rest = 1, min(2 * self._rest, LONGEST_REST)

    def expected(self, width: int) -> float:
        """Tokens that a round of this width commits, by the acceptance so far."""
        total = reached = 1.0
        for right, tried in zip(self._right[:width], self._tried[:width], strict=True):
            reached *= right / tried
            total += reached
        return total

    def cost(self, width: int) -> float:
        """Seconds of a round: measured, or on the line through the measured widths on both sides."""
        if width in self.costs:
            return self.costs[width]
        below = max((w for w in self.costs if w < width), default=None)
        above = min((w for w in self.costs if w > width), default=None)
        if above is None:  # as if another token cost what those cost that were measured
            base = self.costs[0]
            slope = (self.costs[below] - base) / below if below else base / 4
            return self.costs[below] + slope * (width - below)
        share = (width - below) / (above - below)
        return self.costs[below] + share * (self.costs[above] - self.costs[below])

    @property
    def off(self) -> bool:
        """Whether plain decoding is the best now."""
        if self.fixed is not None or 0 not in self.costs:
            return False
        return self.cannot_pay or (len(self.costs) > 1 and self._best(0) == 0)

    def _best(self, least: int) -> int:
        """The width with the most tokens a second, at least `least`."""
        speed = {width: self.expected(width) / self.cost(width) for width in range(least, self.most + 1)}
        best = max(speed, key=speed.get)
        return best if least or speed[best] > MARGIN * speed[0] else 0

    def _cost(self, width: int, seconds: float) -> None:
        """Take a round into the mean of its width. The first one often has something to set up: the second replaces
        it."""
        self._rounds[width] += 1
        weight = 1 if self._rounds[width] <= 2 else max(1 / (self._rounds[width] - 1), 1 - KEEP)
        self.costs[width] = (1 - weight) * self.costs.get(width, 0) + weight * seconds
