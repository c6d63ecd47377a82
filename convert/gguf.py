"""GGUF files: names, config and row order by `models.gguf`; blocks that MLX can hold stay quantised."""

from ..checkpoint import Source
from ..models.gguf import Parameter, config_from_gguf, parameters
from ..tokenizer.gguf import end_ids
from .plan import Family, Spec, Weight


def recognises(source: Source) -> bool:
    return source.format == "gguf"


def read(source: Source) -> Family:
    config = config_from_gguf(source)
    if "tokenizer.ggml.tokens" in source.metadata:  # the file may know some by their names only
        ends = end_ids(source.metadata, str(source.path))
        config |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    found = parameters(source, config["num_attention_heads"], config["num_key_value_heads"])
    return Family(f"gguf {config['model_type']}", config, [_weight(parameter) for parameter in found], uniform=True)


def _weight(parameter: Parameter) -> Weight:
    tensor = parameter.tensor
    if not parameter.packed:
        return Weight(parameter.name, tensor.dtype, tensor.shape, tensor.nbytes, lambda: [parameter.read()])
    parts = lambda: list(parameter.read_packed().values())  # noqa: E731
    return Weight(parameter.name, "F16", tensor.shape, tensor.nbytes, parts, _specs(parameter))


def _specs(parameter: Parameter) -> tuple[Spec, ...]:
    tensor = parameter.tensor
    rows, columns = tensor.shape
    grouped = (rows, columns // tensor.group_size)
    weight = (parameter.name, "U32", (rows, columns * tensor.bits // 32))
    return weight, (f"{parameter.module}.scales", "F16", grouped), (f"{parameter.module}.biases", "F16", grouped)
