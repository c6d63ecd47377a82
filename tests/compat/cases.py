"""The dimensions in which files differ, what goes with what, and the choice of cases: each pair of values of two
dimensions that go together occurs once at least.
"""

import functools
import itertools
import random
from dataclasses import astuple, dataclass, fields

from .families import FAMILIES
from .vocabularies import BYTE_LEVEL, CONVERTED, SENTENCEPIECE

OWN = {name for name, family in FAMILIES.items() if family.own}
IN_GGUF = {name for name, family in FAMILIES.items() if family.gguf}
FLOATS = ("float32", "float16", "bfloat16")
MLX_QUANTISED = ("affine 4:64", "affine 4:32", "affine 8:32", "mxfp4")
BLOCKS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0")
FOLDERS = ("folder", "torch", "mlx-lm")
GGUF_ENDS = ("eos key", "eot key", "eom key", "name")
# How a GGUF file says a rule of rotary embedding → the rule.
GGUF_ROPES = {
    "scaling keys linear": "linear",
    "scale_linear key": "linear",
    "scaling keys yarn": "yarn",
    "rope_freqs tensor": "llama3",
    "rope_factors tensors": "longrope",
}

DIMENSIONS = {
    "container": (*FOLDERS, "gguf"),
    "family": tuple(FAMILIES),
    "tokenizer": (*BYTE_LEVEL, *SENTENCEPIECE, *CONVERTED),
    "control": ("control", "user_defined", "normal"),
    "bos": ("added", "not added", "unsaid"),
    "rope": ("none", "linear", "llama3", "yarn", "longrope", *GGUF_ROPES),
    "end": ("config", "config list", "generation config", "tokenizer config", "special tokens map", *GGUF_ENDS),
    "weights": (*FLOATS, *MLX_QUANTISED, *BLOCKS),
    "sharding": ("one file", "index", "names", "stale index", "stray file", "split"),
    "template": ("string", "list", "jinja file", "json file", "key", "named keys", "none"),
    "head": ("tied", "untied"),
    "config": ("transformers 4", "transformers 5"),
    "conversion": ("as stored", "8 bits", "float16", "dequantised", "refused"),
}

_GGUF = {"gguf"}
# (dimension, values, other dimension, values): who has one of the former values has one of the latter.
RULES = [
    ("container", _GGUF, "family", IN_GGUF),
    ("container", _GGUF, "tokenizer", {*BYTE_LEVEL, "spm"}),
    ("container", _GGUF, "rope", {"none", *GGUF_ROPES}),
    ("container", _GGUF, "end", set(GGUF_ENDS)),
    ("container", _GGUF, "weights", set(BLOCKS)),
    ("container", _GGUF, "sharding", {"one file", "split"}),
    ("container", _GGUF, "template", {"key", "named keys", "none"}),
    ("rope", set(GGUF_ROPES), "container", _GGUF),
    ("bos", {"unsaid"}, "container", _GGUF),
    ("family", {"openelm"}, "bos", {"added"}),  # its tokens have BOS before every text, whatever the files say
    ("config", {"transformers 5"}, "container", {"folder", "torch"}),
    ("config", {"transformers 5"}, "family", set(FAMILIES) - {"openelm", "mamba"}),
    ("end", set(GGUF_ENDS), "container", _GGUF),
    ("weights", set(BLOCKS), "container", _GGUF),
    ("sharding", {"split"}, "container", _GGUF),
    ("template", {"key", "named keys"}, "container", _GGUF),
    # mlx-lm, which runs the foreign families and writes its folders, reads safetensors, and saves a tokenizer as a
    # class of transformers would, which for unigram models is not LlamaTokenizer.
    ("container", {"torch"}, "family", OWN),
    ("container", {"torch"}, "sharding", {"one file", "index", "names"}),
    ("container", {"torch"}, "weights", set(FLOATS)),
    ("container", {"folder"}, "weights", set(FLOATS)),
    ("weights", set(MLX_QUANTISED), "container", {"mlx-lm"}),
    ("container", {"mlx-lm"}, "tokenizer", set(DIMENSIONS["tokenizer"]) - {"spm unigram"}),
    ("container", {"mlx-lm"}, "template", {"string", "list", "jinja file", "none"}),  # it does not read the json file
    # A unigram model takes any piece that a text spells.
    ("tokenizer", {"spm unigram", "unigram"}, "control", {"control", "user_defined"}),
    ("conversion", {"as stored", "8 bits", "float16"}, "family", OWN),
    ("conversion", {"dequantised"}, "family", OWN),
    ("conversion", {"refused"}, "family", set(FAMILIES) - OWN),
    ("conversion", {"dequantised"}, "weights", {*MLX_QUANTISED, "Q4_0", "Q4_1", "Q8_0", "Q5_0"}),
    *(("family", {name}, "rope", {*family.ropes, *family.gguf_ropes})
      for name, family in FAMILIES.items()),
    *(("family", {name}, "head", set(family.heads)) for name, family in FAMILIES.items()),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One value of each dimension; the fields are the keys of DIMENSIONS."""

    container: str
    family: str
    tokenizer: str
    control: str
    bos: str
    rope: str
    end: str
    weights: str
    sharding: str
    template: str
    head: str
    config: str
    conversion: str

    def __str__(self) -> str:
        return ", ".join(astuple(self))

    @property
    def pairs(self) -> set:
        """Its pairs of two dimensions' values."""
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return set(itertools.combinations(named, 2))


def _allowed(dimension: str, value: str) -> dict[str, set]:
    """Other dimension → its values that no rule forbids beside this value."""
    found = {name: set(values) for name, values in DIMENSIONS.items() if name != dimension}
    for left, holds, right, wanted in RULES:
        if left == dimension and value in holds:
            found[right] &= wanted
        elif right == dimension and value not in wanted:
            found[left] -= holds
    return found


ALLOWED = {(name, value): _allowed(name, value) for name, values in DIMENSIONS.items() for value in values}


def _options(chosen: dict, dimension: str) -> list[str]:
    """The values of a dimension that go with those chosen, in their order."""
    sets = [ALLOWED[each][dimension] for each in chosen.items()]
    return [value for value in DIMENSIONS[dimension] if all(value in allowed for allowed in sets)]


def _can_be_completed(chosen: dict) -> bool:
    """Whether there is a case with these values."""
    left = {name: _options(chosen, name) for name in DIMENSIONS if name not in chosen}
    if not left:
        return True
    name = min(left, key=lambda each: len(left[each]))
    return any(_can_be_completed(chosen | {name: value}) for value in left[name])


@functools.cache
def all_pairs() -> frozenset:
    """The pairs of values that occur in some case."""
    names, found = list(DIMENSIONS), set()
    for one, two in itertools.combinations(names, 2):
        for values in itertools.product(DIMENSIONS[one], DIMENSIONS[two]):
            pair = tuple(zip((one, two), values))
            if values[1] in ALLOWED[pair[0]][two] and _can_be_completed(dict(pair)):
                found.add(pair)
    return frozenset(found)


@functools.cache
def covering(seed: int = 0, attempts: int = 3) -> tuple[Case, ...]:
    """Cases that have each pair of `all_pairs`. Greedy: a case begins with a pair that is missing, and takes in each
    dimension the value that adds most missing pairs; the best of some attempts is kept."""
    chooser, missing, cases = random.Random(seed), set(all_pairs()), []
    while missing:
        first = sorted(missing)[0]
        found = [_complete(dict(first), missing, chooser) for _ in range(attempts)]
        case = max(found, key=lambda each: len(each.pairs & missing))
        missing -= case.pairs
        cases.append(case)
    return tuple(cases)


def _complete(chosen: dict, missing: set, chooser: random.Random) -> Case:
    """The case with these values, in the others those that add most missing pairs."""
    names = [name for name in DIMENSIONS if name not in chosen]
    chooser.shuffle(names)
    for name in names:

        def gain(value: str, name=name) -> tuple:
            new = (name, value)
            return sum((each, new) in missing or (new, each) in missing for each in chosen.items()), chooser.random()

        values = sorted(_options(chosen, name), key=gain, reverse=True)
        chosen[name] = next(value for value in values if _can_be_completed(chosen | {name: value}))
    return Case(**chosen)
