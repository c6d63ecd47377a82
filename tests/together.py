"""The dimensions in which techniques are combined, which of their values exclude each other, and rows that cover every
pair of values. Knows no model."""

import itertools

DIMENSIONS = {
    "verb": ("generate", "chat", "eval"),
    "family": ("llama", "openelm", "phi3"),
    "weights": ("dense", "affine", "seeds"),
    "ffn": ("dense", "experts", "inputs"),
    "reading": ("computed", "predicted", "kept", "refined"),
    "cache": ("default", "float16", "int8", "k8v4", "int4"),
    "drafts": ("none", "quantspec", "quantspec lookup", "quantspec dynamoe", "model", "model lookup", "lookup",
               "dynamoe"),
    "compute": ("exact", "int8"),
}  # fmt: skip
PLAIN = {name: values[0] for name, values in DIMENSIONS.items()}
OPTIONS = {
    ("ffn", "experts"): ["--sensitivity", "0.6"],
    ("ffn", "inputs"): ["--sensitivity", "0.6"],
    ("reading", "predicted"): ["--kv-predict", "PAIR"],
    ("reading", "kept"): ["--kv-predict", "PAIR:keep=4"],
    ("reading", "refined"): ["--kv-predict", "PAIR:refine"],
    ("drafts", "quantspec"): ["--quantspec", "--num-draft-tokens", "3"],
    ("drafts", "quantspec lookup"): ["--quantspec", "--prompt-lookup", "--num-draft-tokens", "3"],
    ("drafts", "quantspec dynamoe"): ["--quantspec", "--draft", "dynamoe:0.3", "--num-draft-tokens", "3"],
    ("drafts", "model"): ["--draft-model", "DRAFT", "--num-draft-tokens", "3"],
    ("drafts", "model lookup"): ["--draft-model", "DRAFT", "--prompt-lookup", "--num-draft-tokens", "3"],
    ("drafts", "lookup"): ["--prompt-lookup", "--num-draft-tokens", "3"],
    ("drafts", "dynamoe"): ["--draft", "dynamoe:0.3", "--num-draft-tokens", "3"],
    ("compute", "int8"): ["--compute", "int8"],
} | {("cache", kind): ["--kv-cache", kind] for kind in DIMENSIONS["cache"][1:]}


def options(row):
    """The options of a row, with the words PAIR and DRAFT for a pair and a draft model."""
    return [word for choice in row.items() for word in OPTIONS.get(choice, ())]


def refusal(row):
    """A part of the line that refuses a row; None for a row that works."""
    drafts, own = row["drafts"], row["family"] != "phi3"
    if not own and row["ffn"] != "dense":
        return "wanted an architecture of our own"
    if row["weights"] == "seeds" and row["ffn"] == "inputs":
        return "matrices stored by columns"
    if row["reading"] == "refined" and drafts != "none":
        return ":refine works between the steps of plain decoding"
    if "quantspec" in drafts and row["cache"] not in ("default", "int8"):
        return "--quantspec: wanted --kv-cache int8"
    if not own and row["compute"] != "exact":
        return "wanted a model of our own families, 'phi3' runs through mlx-lm"
    if not own and row["cache"] != "default":
        return "wanted a model of our own families, 'phi3' runs through mlx-lm"
    if not own and row["reading"] != "computed":
        return "KV prediction needs the kv seam, which 'phi3' (run through mlx-lm) does not have"
    if row["reading"] == "refined" and row["cache"] in ("k8v4", "int4"):
        return "wanted a KV cache that can be taken back to every token"
    if not own and "quantspec" in drafts:
        return "--quantspec needs the cache seam, which 'phi3' (run through mlx-lm) does not have"
    if "dynamoe" in drafts and row["ffn"] == "dense":
        return "--draft dynamoe: wanted a DynaMoE model"
    if row["verb"] == "eval" and drafts != "none":
        return "drafts are verified: they change the speed"
    return None


def pairs(row):
    """The pairs of values in a row."""
    return set(itertools.combinations(row.items(), 2))


def all_pairs():
    """Every pair of values of two dimensions."""
    lists = [[(name, value) for value in values] for name, values in DIMENSIONS.items()]
    return {pair for first, second in itertools.combinations(lists, 2) for pair in itertools.product(first, second)}


def cover():
    """(Rows that work, in which every pair of values occurs that can work; rows that are refused, one for each other
    pair of values, beside which all is plain). The same rows at each call."""
    names = list(DIMENSIONS)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*DIMENSIONS.values())]
    working = [(row, pairs(row)) for row in every if refusal(row) is None]
    possible = set().union(*(found for _, found in working))
    left, chosen = set(possible), []
    while left:
        row, found = max(working, key=lambda each: len(each[1] & left))
        chosen.append(row)
        left -= found
    return chosen, [PLAIN | dict(pair) for pair in sorted(all_pairs() - possible)]
