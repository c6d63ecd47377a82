"""The forward passes of the Llama family and of OpenELM in NumPy float64, written from the papers' formulas: an oracle
that shares no code with MLX. One sequence, no cache, every position's logits.

Shapes: S tokens, H query heads, G KV heads, E head size.
"""

import math

import numpy as np


def llama_logits(weights: dict[str, np.ndarray], config: dict, tokens: list[int]) -> np.ndarray:
    """(S, V) of a config.json dict of the dense family; `window` of a layer by Hugging Face's rules for Mistral."""
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    size, eps = config.get("head_dim") or config["hidden_size"] // heads, config["rms_norm_eps"]
    scaling = {"context": config["max_position_embeddings"]} | (config.get("rope_scaling") or {})
    tables = rotation_tables(size, config["rope_theta"], scaling, len(tokens))

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def project(x, name, count):
        rows = linear(x, name).reshape(len(tokens), count, size)
        norm = weights.get(f"{name.replace('_proj', '_norm')}.weight")
        return rows if norm is None else rms_norm(rows, norm, eps)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        types = config.get("layer_types")
        window = None if types and types[i] == "full_attention" else config.get("sliding_window")
        h = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (project(h, f"{layer}.self_attn.{n}_proj", c) for n, c in zip("qkv", (heads, groups, groups)))
        x = x + linear(attention(rotate(q, tables), rotate(k, tables), v, window), f"{layer}.self_attn.o_proj")
        h = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        gated = silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


def openelm_logits(weights: dict[str, np.ndarray], config: dict, tokens: list[int]) -> np.ndarray:
    """(S, V) of an OpenELM: fused qkv, query and key heads normalised before RoPE, gate half before up half."""
    size, eps, count = config["head_dim"], 1e-6, len(tokens)
    tables = rotation_tables(size, config["rope_freq_constant"], None, count)
    x = weights["transformer.token_embeddings.weight"][tokens]
    for i in range(config["num_transformer_layers"]):
        layer = f"transformer.layers.{i}"
        heads, groups = config["num_query_heads"][i], config["num_kv_heads"][i]
        qkv = rms_norm(x, weights[f"{layer}.attn_norm.weight"], eps) @ weights[f"{layer}.attn.qkv_proj.weight"].T
        q, k, v = np.split(qkv.reshape(count, heads + 2 * groups, size), [heads, heads + groups], axis=1)
        q = rotate(rms_norm(q, weights[f"{layer}.attn.q_norm.weight"], eps), tables)
        k = rotate(rms_norm(k, weights[f"{layer}.attn.k_norm.weight"], eps), tables)
        x = x + attention(q, k, v, None) @ weights[f"{layer}.attn.out_proj.weight"].T
        inner = rms_norm(x, weights[f"{layer}.ffn_norm.weight"], eps) @ weights[f"{layer}.ffn.proj_1.weight"].T
        gate, up = np.split(inner, 2, axis=-1) if config["ffn_with_glu"] else (inner, 1.0)
        x = x + (silu(gate) * up) @ weights[f"{layer}.ffn.proj_2.weight"].T
    x = rms_norm(x, weights["transformer.norm.weight"], eps)
    head = "transformer.token_embeddings" if config["share_input_output_layers"] else "lm_head"
    return x @ weights[f"{head}.weight"].T


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def attention(q, k, v, window):
    """q (S, H, E), k and v (S, G, E) → (S, H·E): query head h reads KV head h·G/H, itself and what came before it."""
    count, heads, size = q.shape
    out = np.empty_like(q)
    for head in range(heads):
        group = head * k.shape[1] // heads
        for row in range(count):
            first = 0 if window is None else max(0, row - window + 1)
            scores = k[first : row + 1, group] @ q[row, head] / math.sqrt(size)
            share = np.exp(scores - scores.max())
            out[row, head] = share / share.sum() @ v[first : row + 1, group]
    return out.reshape(count, -1)


def rotate(x, tables):
    """(S, heads, E): the pair (i, i + E/2) is turned by the position's angle."""
    cos, sin = (table[:, None] for table in tables)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotation_tables(size, base, scaling, count):
    """cos and sin (S, E/2) by Hugging Face's `rope_scaling` rules, `modeling_rope_utils.py`, and the factor `magnitude`
    that GGUF files have."""
    frequencies, magnitude = rope_frequencies(size, base, scaling or {})
    magnitude *= (scaling or {}).get("magnitude", 1.0)
    angles = np.arange(count)[:, None] * frequencies
    return np.cos(angles) * magnitude, np.sin(angles) * magnitude


def rope_frequencies(size, base, scaling):
    frequencies = base ** -(np.arange(0, size, 2) / size)
    rule, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor")
    if rule == "linear":
        return frequencies / factor, 1.0
    if rule == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * frequencies / factor + smooth * frequencies, 1.0
    if rule == "longrope":
        original = scaling["original_max_position_embeddings"]
        more = math.log(max(scaling["context"] / original, 1)) / math.log(original)
        return frequencies / np.array(scaling["long_factor"]), math.sqrt(1 + more)
    if rule in ("yarn", "deepseek_yarn"):
        context = scaling["original_max_position_embeddings"]
        turns = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
        ends = [size * math.log(context / (t * 2 * math.pi)) / (2 * math.log(base)) for t in turns]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
        return frequencies / factor * ramp + frequencies * (1 - ramp), yarn_magnitude(scaling)
    return frequencies, 1.0


def yarn_magnitude(scaling):
    """`attention_factor`, else get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim) of the same file."""
    if scaling.get("attention_factor"):
        return scaling["attention_factor"]
    if scaling["factor"] <= 1:
        return 1.0
    top, bottom = (0.1 * scaling.get(*key) * math.log(scaling["factor"]) + 1
                   for key in (("mscale", 1.0), ("mscale_all_dim", 0.0)))  # fmt: skip
    return top / bottom
