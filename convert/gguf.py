"""The source family of GGUF files. `models.gguf` translates config and names, and restores the order of rows. Matrices
of quantised blocks stay quantised, in the form that `checkpoint.gguf_packing` has for them. This module writes nothing.
"""

from ..checkpoint import Source
from ..errors import MlxeffError, notices, some
from ..models.gguf import FAMILIES, Parameter, config_from_gguf, parameters
from ..tokenizer.gguf import end_ids, ordinary_marks
from .plan import Family, Spec, Weight


def recognises(source: Source) -> bool:
    """Whether the source is a GGUF file."""
    return source.format == "gguf"


def read(source: Source) -> Family:
    """The config and the weights of a GGUF file. Raises MlxeffError for a model that `models.gguf` does not know."""
    architecture, experts = source.metadata.get("general.architecture"), source.metadata.get("llama.expert_count")
    if architecture not in FAMILIES or experts:
        got = f"{architecture!r:.40}{' with experts' if experts else ''}"
        raise MlxeffError(f"{source.path.name}: convert: wanted one of {', '.join(FAMILIES)}, got {got}")
    config = config_from_gguf(source)
    if "magnitude" in (config["rope_scaling"] or {}):
        text = "%s: rope.scaling.attn_factor becomes rope_scaling's magnitude in config.json, which only mlxeff reads"
        notices.warning(text, source.path)
    if "tokenizer.ggml.tokens" in source.metadata:  # the vocabulary may have end tokens that no other entry names
        ends = end_ids(source.metadata, str(source.path))
        config |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
        if ordinary := ordinary_marks(source.metadata, str(source.path)):
            text = "convert: ordinary tokens become control tokens, since a folder has BOS and EOS as such: %s"
            notices.warning(text, some(map(repr, ordinary)))
    found = parameters(source, config["num_attention_heads"], config["num_key_value_heads"])
    return Family(f"gguf {config['model_type']}", config, [_weight(parameter) for parameter in found], uniform=True)


def _weight(parameter: Parameter) -> Weight:
    tensor = parameter.tensor
    if not parameter.packed:
        form = "" if tensor.kind in (None, "F32", "F16", "BF16", "F64") else tensor.kind
        return Weight(parameter.name, tensor.dtype, tensor.shape, tensor.nbytes, lambda: [parameter.read()], form=form)
    return Weight(
        parameter.name,
        "F16",
        tensor.shape,
        tensor.nbytes,
        lambda: list(parameter.read_packed().values()),
        _specs(parameter),
        parameter.read,
        tensor.kind or "blocks",
    )


def _specs(parameter: Parameter) -> tuple[Spec, ...]:
    """The names, dtypes and shapes of weight, scales and biases of a quantised parameter, as `mx.quantize` packs
    them."""
    tensor = parameter.tensor
    rows, columns = tensor.shape
    grouped = (rows, columns // tensor.group_size)
    weight = (parameter.name, "U32", (rows, columns * tensor.bits // 32))
    return weight, (f"{parameter.module}.scales", "F16", grouped), (f"{parameter.module}.biases", "F16", grouped)
