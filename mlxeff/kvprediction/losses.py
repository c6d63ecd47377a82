"""What training minimises. Shapes: B batch, N tokens, C of them a continuation, V vocabulary.

paper    as in CoreNet's `cross_entropy_for_kv_prediction.py`: the base runs on all tokens with its own keys and values
         replaced by predicted ones, and

             loss = CE + z + α (CE_A + z_A) + λ Σ_layers (mean |K̂ - K| + mean |V̂ - V|),  z = 1e-4 · mean logsumexp²

         with keys after the base's norm and before rotation, and A the auxiliary as a language model of its own.
distill  trains what happens at inference, with the base's own distributions as targets and not the text: the last C
         tokens attend to a predicted prompt and to their own keys and values, and

             loss = mean over C + 1 positions of KL(base ‖ base on the predicted prompt) + α (CE_A + z_A) + λ Σ_layers …

         with keys as the cache holds them, normed and rotated.

λ is 1 / base layers for the paper's loss, as the paper chose, and 0 for `distill`; α = 1. Where the auxiliary is not
tuned, its term is a constant and left out. The sums leave out the layers that base and auxiliary share.
"""

from typing import NamedTuple

import mlx.core as mx

from ..ops import attention, cross_entropy, log_softmax
from ..running import EXACT, RunOptions, Tally
from .predictor import Pairs, Predictor, Reading, reading

LOSSES = ("paper", "distill")
Z_LOSS = 1e-4


class Truth(NamedTuple):
    """What the base itself computes of token ids: its `logits` (B, C + 1, V) of the continuation, None for the paper's
    loss, and as `pairs` the true keys and values of those tokens whose keys and values are predicted."""

    logits: mx.array | None
    pairs: Pairs


class PredictedLayer:
    """The cache of a layer, filled with predicted keys and values.

    With `grows` they are those of a prompt, and tokens that follow it attend to them and to their own. Without, they
    are those of the very tokens that attend, whose own keys and values are discarded.
    """

    def __init__(self, keys: mx.array, values: mx.array, window: int | None, grows: bool):
        self.keys, self.values, self.window, self.grows = keys, values, window, grows
        self.length = keys.shape[2] if grows else 0

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, _options: RunOptions = EXACT
    ) -> mx.array:
        """Causal attention of queries (B, H, N, E)."""
        held = self.keys, self.values
        if self.grows:
            held = (mx.concatenate(both, axis=2) for both in zip(held, (keys, values), strict=True))
        return attention(queries, *held, scale, self.window)


class PredictedCache:
    """A `PredictedLayer` for each layer of `base`; `placed`: keys and values as `base.placed_kv` returns them."""

    def __init__(self, base, placed: Pairs, grows: bool = False):
        windows = [base.window(i) for i in range(len(base.layers))]
        self.layers = [PredictedLayer(*pair, window, grows) for pair, window in zip(placed, windows, strict=True)]
        self.length, self.tally = self.layers[0].length, Tally()


def predicted_logits(predictor: Predictor, read: Reading, base, tokens: mx.array) -> tuple[mx.array, Pairs]:
    """Token ids (B, N), and what was read of the auxiliary for them → (the base's logits (B, N, V) with all keys and
    values predicted; these keys and values, raw)."""
    predicted = predictor(read)
    return base(tokens, PredictedCache(base, base.placed_kv(predicted, 0))), predicted


def continued_logits(predictor: Predictor, read: Reading, base, tokens: mx.array) -> tuple[mx.array, Pairs]:
    """Token ids (B, C + 1), and what was read of the auxiliary for the prompt before them → (the base's logits
    (B, C + 1, V) after the predicted prompt; the prompt's predicted keys and values as a cache holds them)."""
    placed = base.placed_kv(predictor(read), 0)
    return base(tokens, PredictedCache(base, placed, grows=True)), placed


def truth(base, tokens: mx.array, kind: str, continuation: int) -> Truth:
    """The base's own answer to token ids (B, N), evaluated."""
    cache = base.new_cache()
    if kind == "paper":
        found = Truth(None, base.normed_kv(base.raw_kv(tokens, cache)))
    else:
        known = predicted_part(tokens, kind, continuation)
        prompt = known.shape[1]
        cache.reserve(tokens.shape[1])
        base.last_logits(known, cache)
        logits = base(tokens[:, prompt:], cache)
        found = Truth(logits, [tuple(part[:, :, :prompt] for part in layer.state()) for layer in cache.layers])
    mx.eval(found)
    return found


def predicted_part(tokens: mx.array, kind: str, continuation: int) -> mx.array:
    """Those of the token ids (B, N) whose keys and values are predicted: all of them, or the prompt."""
    return tokens if kind == "paper" else tokens[:, : -continuation - 1]


def loss(
    predictor: Predictor,
    auxiliary,
    base,
    tokens: mx.array,
    true: Truth,
    consistency: float,
    auxiliary_loss: float = 0,
    read: Reading | None = None,
) -> mx.array:
    """The loss for token ids (B, N + 1): the first N are inputs, for which `true` holds what the base computes, and the
    last N are what follows each of them.

    `consistency` is λ, `auxiliary_loss` is α. `read`: what the predictor reads of the auxiliary; with None the
    auxiliary runs here, so that it gets gradients.
    """
    inputs, kind = tokens[:, :-1], "paper" if true.logits is None else "distill"
    continuation = 0 if kind == "paper" else true.logits.shape[1] - 1
    known = predicted_part(inputs, kind, continuation)
    if read is None:
        cache = auxiliary.new_cache()
        states, own_logits = auxiliary.states_and_logits(known, cache, *predictor.asked)
        read = reading(predictor.mapped, predictor.inputs, predictor.shared, states)
    if kind == "paper":
        logits, predicted = predicted_logits(predictor, read, base, inputs)
        total, predicted = language_loss(logits, tokens[:, 1:]), base.normed_kv(predicted)
    else:
        logits, predicted = continued_logits(predictor, read, base, inputs[:, known.shape[1] :])
        total = divergence(true.logits, logits)
    if consistency:
        total = total + consistency * distance(predicted[predictor.shared :], true.pairs[predictor.shared :])
    if auxiliary_loss:
        total = total + auxiliary_loss * language_loss(own_logits, tokens[:, 1 : known.shape[1] + 1])
    return total


def language_loss(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean cross-entropy plus z-loss of logits (B, N, V), for the ids (B, N) that follow."""
    entropy = cross_entropy(logits, targets)
    # logsumexp = entropy + the target's logit
    z = entropy + mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return entropy.mean() + Z_LOSS * (z * z).mean()


def divergence(true: mx.array, found: mx.array) -> mx.array:
    """Mean of KL(true ‖ found), in nats, of the distributions that logits (…, V) stand for; float32."""
    true, found = (log_softmax(logits.astype(mx.float32)) for logits in (true, found))
    return (mx.exp(true) * (true - found)).sum(axis=-1).mean()


def distance(predicted: Pairs, true: Pairs) -> mx.array:
    """Mean |predicted - true| of the keys, and of the values, of each layer; all summed."""
    return sum(
        (
            mx.abs(mine - theirs).mean()
            for pair, true_pair in zip(predicted, true, strict=True)
            for mine, theirs in zip(pair, true_pair, strict=True)
        ),
        start=mx.array(0.0),
    )
