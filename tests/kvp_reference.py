"""KV Prediction in NumPy float64, from the formulas of the paper and of CoreNet's code: an oracle that shares no code
with MLX. For one sequence; the logits of its last token, which alone the base computes.

Shapes: S tokens, H query heads, G KV heads, E head size.
"""

from dataclasses import dataclass

import numpy as np

from reference_models import attention, rms_norm, rotate, rotation_tables, silu


@dataclass
class Family:
    """What tells the two families apart: names, and how raw queries, keys and values come to be."""

    weights: dict
    config: dict

    def __post_init__(self):
        self.openelm = self.config["model_type"] == "openelm"
        c = self.config
        self.count = c["num_transformer_layers" if self.openelm else "num_hidden_layers"]
        self.size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.eps = 1e-6 if self.openelm else c["rms_norm_eps"]
        self.base = c["rope_freq_constant"] if self.openelm else c["rope_theta"]
        self.prefix = "transformer." if self.openelm else "model."

    def weight(self, name):
        return self.weights[self.prefix + name + ".weight"]

    def embed(self, tokens):
        return self.weight("token_embeddings" if self.openelm else "embed_tokens")[tokens]

    def project(self, i, x):
        """Raw q (S, H, E), k and v (S, G, E)."""
        layer = f"layers.{i}."
        if self.openelm:
            h = rms_norm(x, self.weight(layer + "attn_norm"), self.eps)
            heads, groups = self.config["num_query_heads"][i], self.config["num_kv_heads"][i]
            rows = (h @ self.weight(layer + "attn.qkv_proj").T).reshape(len(x), heads + 2 * groups, self.size)
            return np.split(rows, [heads, heads + groups], axis=1)
        h = rms_norm(x, self.weight(layer + "input_layernorm"), self.eps)
        parts = [h @ self.weight(f"{layer}self_attn.{n}_proj").T for n in "qkv"]
        return [part.reshape(len(x), -1, self.size) for part in parts]

    def norm(self, i, heads, which):
        name = f"layers.{i}." + ("attn." if self.openelm else "self_attn.") + f"{which}_norm"
        weight = self.weights.get(self.prefix + name + ".weight")
        return heads if weight is None else rms_norm(heads, weight, self.eps)

    def finish(self, i, x, attended):
        layer = f"layers.{i}."
        x = x + attended @ self.weight(layer + ("attn.out_proj" if self.openelm else "self_attn.o_proj")).T
        if self.openelm:
            h = rms_norm(x, self.weight(layer + "ffn_norm"), self.eps)
            gate, up = np.split(h @ self.weight(layer + "ffn.proj_1").T, 2, axis=-1)
            return x + (silu(gate) * up) @ self.weight(layer + "ffn.proj_2").T
        h = rms_norm(x, self.weight(layer + "post_attention_layernorm"), self.eps)
        gate, up = (h @ self.weight(f"{layer}mlp.{n}_proj").T for n in ("gate", "up"))
        return x + (silu(gate) * up) @ self.weight(layer + "mlp.down_proj").T

    def logits(self, x):
        x = rms_norm(x, self.weight("norm"), self.eps)
        return x @ self.weight("token_embeddings" if self.openelm else "embed_tokens").T  # tied

    def read(self, i, x):
        """What layer i projects (S, D)."""
        return rms_norm(x, self.weight(f"layers.{i}." + ("attn_norm" if self.openelm else "input_layernorm")), self.eps)


def walk(model, tokens):
    """(keys and values (S, G, E) of every layer, raw; what each layer projects; the last hidden states (S, D))."""
    tables, x, pairs = rotation_tables(model.size, model.base, None, len(tokens)), model.embed(tokens), []
    inputs = []
    for i in range(model.count):
        q, k, v = model.project(i, x)
        pairs.append((k, v))
        inputs.append(model.read(i, x))
        q, k = (rotate(model.norm(i, heads, name), tables) for heads, name in ((q, "q"), (k, "k")))
        x = model.finish(i, x, attention(q, k, v, None))
    return pairs, inputs, x


def features(pairs, inputs, kind):
    """Of each auxiliary layer the rows (S, P) that maps to keys and to values read."""
    if kind == "hidden":
        return [(rows, rows) for rows in inputs]
    return [tuple(part.reshape(len(part), -1) for part in pair) for pair in pairs]


def predictions(base, read, maps, layer_map, inputs, shared=0):
    """Raw keys and values (S, G, E) of every base layer; `read` is what `walk` gave of the auxiliary. The first
    `shared` layers are the auxiliary's; maps[f"{key|value}_maps.{i - shared}.{weight|bias}"] are the predictor's."""
    pairs, rows = list(read[0][:shared]), features(*read[:2], inputs)
    for i in range(shared, base.count):
        pair = [
            x @ maps[f"{name}_maps.{i - shared}.weight"].T + maps[f"{name}_maps.{i - shared}.bias"]
            for x, name in zip(rows[layer_map[i]], ("key", "value"), strict=True)
        ]
        pairs.append(tuple(x.reshape(len(x), -1, base.size) for x in pair))
    return pairs


def continue_prompt(base, prompt, tokens):
    """Logits (S, V) of `tokens` after a prompt whose raw keys and values of every layer are given, and these as a cache
    holds them."""
    known = len(prompt[0][0])
    tables = rotation_tables(base.size, base.base, None, known + len(tokens))
    x, placed = base.embed(tokens), []
    for i, (keys, values) in enumerate(prompt):
        q, k, v = base.project(i, x)
        rotated = rotate(base.norm(i, np.concatenate([keys, k]), "k"), tables)
        placed.append((rotated[:known], values))
        queries = np.zeros((known + len(tokens), *q.shape[1:]))
        queries[known:] = rotate(base.norm(i, q, "q"), [table[known:] for table in tables])
        x = base.finish(i, x, attention(queries, rotated, np.concatenate([values, v]), None)[known:])
    return base.logits(x), placed


def predicted_logits(base, auxiliary, maps, layer_map, tokens, inputs="own", shared=0):
    """(V) of the last token."""
    prompt = predictions(base, walk(auxiliary, tokens[:-1]), maps, layer_map, inputs, shared)
    return continue_prompt(base, prompt, tokens[-1:])[0][0]


def language_loss(logits, targets):
    """Cross-entropy and z-loss."""
    sums = np.log(np.exp(logits).sum(-1))
    return (sums - logits[np.arange(len(targets)), targets]).mean() + 1e-4 * (sums**2).mean()


def distance(found, true, shared):
    """The L1 term without λ."""
    pairs = list(zip(found, true, strict=True))[shared:]
    return sum(np.abs(mine - theirs).mean() for pair in pairs for mine, theirs in zip(*pair, strict=True))


def paper_loss(base, auxiliary, maps, layer_map, tokens, consistency, auxiliary_loss=0.0, inputs="own", shared=0):
    """The loss of tokens (N + 1): all of the base's keys and values are predicted."""
    known, targets = tokens[:-1], tokens[1:]
    tables = rotation_tables(base.size, base.base, None, len(known))
    read, true, x = walk(auxiliary, known), walk(base, known)[0], base.embed(known)
    found = predictions(base, read, maps, layer_map, inputs, shared)
    found, true = ([(base.norm(i, k, "k"), v) for i, (k, v) in enumerate(each)] for each in (found, true))
    for i, (keys, values) in enumerate(found):
        queries = rotate(base.norm(i, base.project(i, x)[0], "q"), tables)
        x = base.finish(i, x, attention(queries, rotate(keys, tables), values, None))
    own = auxiliary_loss * language_loss(auxiliary.logits(read[-1]), targets)
    return language_loss(base.logits(x), targets) + own + consistency * distance(found, true, shared)


def distill_loss(
    base, auxiliary, maps, layer_map, tokens, continuation, consistency, auxiliary_loss=0.0, inputs="own", shared=0
):
    """The loss of tokens (N + 1), of which the last is not read: KL to the base after a predicted prompt."""
    known = len(tokens) - 2 - continuation
    prompt, rest = tokens[:known], tokens[known:-1]
    read, true = walk(auxiliary, prompt), walk(base, tokens[:-1])
    logits, found = continue_prompt(base, predictions(base, read, maps, layer_map, inputs, shared), rest)
    wanted = base.logits(true[-1])[known:]
    _, placed = continue_prompt(base, [(k[:known], v[:known]) for k, v in true[0]], rest)
    mine, theirs = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, wanted))
    divergence = (np.exp(theirs) * (theirs - mine)).sum(-1).mean()
    own = auxiliary_loss * language_loss(auxiliary.logits(read[-1]), tokens[1 : known + 1])
    return divergence + own + consistency * distance(found, placed, shared)
