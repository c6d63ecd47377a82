"""The two losses with which a predictor is trained: `paper` and `distill`.

paper    The loss of CoreNet's `cross_entropy_for_kv_prediction.py`. The base runs on all tokens, with predicted keys
         and values in place of its own:

             loss = CE + z + α (CE_A + z_A) + λ Σ_layers (mean |K̂ - K| + mean |V̂ - V|),  z = 1e-4 · mean logsumexp²

         CE is the cross-entropy of the next tokens and z a penalty on large logits. The index A denotes the same terms
         for the auxiliary as a language model. K̂, V̂ are the predicted keys and values, K, V the base's own. Keys are
         compared after the base's normalisation and before rotation.
distill  The base's own distributions are the targets, in the situation of inference: the last prompt token and the C
         tokens that continue the prompt attend to the predicted keys and values of the tokens before, and to their own:

             loss = mean over C + 1 positions of KL(base ‖ base on the predicted prompt) + α (CE_A + z_A) + λ Σ_layers …

         The sum over layers is the same, but its keys are compared as the cache holds them: normalised and rotated.

By default λ is 1 / base layers for `paper`, as the paper chose, and 0 for `distill`; α is 1. For an auxiliary that is
not tuned, the terms with α are constant and left out. The sum over layers leaves out those that base and auxiliary
share. This module draws no batches and updates no weights (see `train`).

Shapes: B batch, N tokens, C tokens of the continuation, V vocabulary, H query heads, G KV heads, E head size.
"""

import sys
from typing import NamedTuple

import mlx.core as mx

from ..ops import attention, cross_entropy, log_softmax
from ..running import EXACT, RunOptions, Tally
from .predictor import Pairs, Predictor, Reading, reading

LOSSES = ("paper", "distill")
Z_LOSS = 1e-4  # factor of the penalty z


class Truth(NamedTuple):
    """The targets, computed by the base itself: `logits` (B, C + 1, V) of the last prompt token and the continuation,
    None for the loss `paper`, and `pairs`, the base's keys and values (B, G, S, E) of each layer for the S tokens whose
    keys and values are predicted."""

    logits: mx.array | None
    pairs: Pairs


class PredictedLayer:
    """The cache of one layer, filled with predicted keys and values.

    With `grows`, these belong to a prompt: the tokens that follow it attend to them and to their own keys and values.
    Without, they belong to the same tokens whose queries attend, and replace these tokens' own keys and values.
    """

    def __init__(self, keys: mx.array, values: mx.array, window: int | None, grows: bool):
        self.keys, self.values, self.window, self.grows = keys, values, window, grows
        self.length = keys.shape[2] if grows else 0

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, _options: RunOptions = EXACT
    ) -> mx.array:
        """Causal attention of queries (B, H, N, E) for keys and values (B, G, N, E): (B, H, N, E). Stores nothing."""
        held = self.keys, self.values
        if self.grows:
            held = (mx.concatenate(both, axis=2) for both in zip(held, (keys, values), strict=True))
        return attention(queries, *held, scale, self.window)


class PredictedCache:
    """A cache of one `PredictedLayer` for each layer of `base`. `placed`: the result of `base.placed_kv`."""

    def __init__(self, base, placed: Pairs, grows: bool = False):
        windows = [base.window(i) for i in range(len(base.layers))]
        self.layers = [PredictedLayer(*pair, window, grows) for pair, window in zip(placed, windows, strict=True)]
        self.length, self.tally = self.layers[0].length, Tally()
        self.checked = sys.maxsize  # no memory is asked for: what it holds is there already


def predicted_logits(predictor: Predictor, read: Reading, base, tokens: mx.array) -> tuple[mx.array, Pairs]:
    """Token ids (B, N), and the auxiliary's reading of them → (the base's logits (B, N, V) with all keys and values
    predicted; the predicted keys and values, raw)."""
    predicted = predictor(read)
    return base(tokens, PredictedCache(base, base.placed_kv(predicted, 0))), predicted


def continued_logits(predictor: Predictor, read: Reading, base, tokens: mx.array) -> tuple[mx.array, Pairs]:
    """Token ids (B, C + 1), and the auxiliary's reading of the prompt before them → (the base's logits (B, C + 1, V)
    after the predicted prompt; the prompt's predicted keys and values, with keys normalised and rotated)."""
    placed = base.placed_kv(predictor(read), 0)
    return base(tokens, PredictedCache(base, placed, grows=True)), placed


def truth(base, tokens: mx.array, kind: str, continuation: int) -> Truth:
    """The targets for token ids (B, N) and the loss `kind`, evaluated. `continuation` is C, of no effect for
    `paper`."""
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
    """The part of the token ids (B, N) whose keys and values are predicted: all of them for `paper`; for `distill` the
    prompt without its last token, (B, N - C - 1)."""
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
    """The loss, a scalar, for token ids (B, N + 1): the first N are the inputs, the last N the tokens that follow them.

    true            the result of `truth` for the inputs; whether it has logits selects the loss
    consistency     λ
    auxiliary_loss  α; if it is not 0, `read` must be None
    read            the auxiliary's reading of the tokens to predict; with None the auxiliary runs here, and gets
                    gradients
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
    """Mean cross-entropy, in nats, plus the penalty z of logits (B, N, V) for the next tokens `targets` (B, N)."""
    entropy = cross_entropy(logits, targets)
    # z is the logsumexp of the logits: cross-entropy = logsumexp - the target's logit.
    z = entropy + mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return entropy.mean() + Z_LOSS * (z * z).mean()


def divergence(true: mx.array, found: mx.array) -> mx.array:
    """Mean KL(true ‖ found), in nats, between the distributions of two arrays of logits (…, V); float32."""
    true, found = (log_softmax(logits.astype(mx.float32)) for logits in (true, found))
    return (mx.exp(true) * (true - found)).sum(axis=-1).mean()


def distance(predicted: Pairs, true: Pairs) -> mx.array:
    """The sum over layers, and over keys and values, of the mean |predicted - true|."""
    return sum(
        (
            mx.abs(mine - theirs).mean()
            for pair, true_pair in zip(predicted, true, strict=True)
            for mine, theirs in zip(pair, true_pair, strict=True)
        ),
        start=mx.array(0.0),
    )
