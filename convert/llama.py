"""The source family of Hugging Face and mlx-lm folders with a config.json: dense decoders such as Llama, and OpenELM.

The names of the tensors need no change. Matrices that MLX quantised or SeedLM encoded are read in their stored form.
Sources for names and keys: the published checkpoints. This module writes nothing.
"""

from dataclasses import replace

import mlx.core as mx

from ..checkpoint import Source, Tensor
from ..errors import MlxeffError, some
from ..models.rope import flat_entries
from ..seedlm.format import BlockFormat, check_arrays, check_bias
from ..seedlm.install import read_entry
from ..seedlm.linear import decode
from . import dynamoe_columns
from .plan import Family, Weight


def recognises(source: Source) -> bool:
    """Whether the source has a config.json that names a `model_type`."""
    return source.config is not None and isinstance(source.config.get("model_type"), str)


def read(source: Source) -> Family:
    """The config and the weights of a source. Raises MlxeffError for a checkpoint that other software than MLX
    quantised, and for damaged entries of config.json."""
    config = {
        key: value for key, value in source.config.items() if key not in ("auto_map", "mlxeff", "quantization_config")
    }
    for key in ("quantization", "quantization_config"):
        if not isinstance(source.config.get(key, {}), (dict, type(None))):
            raise MlxeffError(f"{source.path}: config.json: {key}: wanted an object, got {source.config[key]!r:.60}")
    config |= flat_entries(config)  # stock mlx-lm reads rope_parameters of few families
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    if method and "quantization" not in config:
        raise MlxeffError(f"{source.path}: wanted plain weights or MLX's quantization, got quant_method {method!r}")
    if not dynamoe_columns.recognises(config):
        return Family(config["model_type"], config, weights(source, config))
    rows, taken, config = dynamoe_columns.dense_rows(source, config)
    rest = replace(source, tensors={name: each for name, each in source.tensors.items() if name not in taken})
    return Family(config["model_type"], config, rows + weights(rest, config))


def weights(source: Source, config: dict) -> list[Weight]:
    """One `Weight` for each parameter. The scales and biases of a quantised matrix are parts of its `Weight`. Raises
    MlxeffError for a quantised matrix without a group size, and for missing parts."""
    packed = {name.rpartition(".")[0] for name in source.tensors if name.endswith(".scales")}
    parts = {f"{module}.{kind}" for module in packed for kind in ("scales", "biases")}
    seeded = read_entry(config["seedlm"], str(source.path)) if "seedlm" in config else {}
    result = [_seeded(source, module, *each) for module, each in seeded.items()]
    parts |= {name for weight in result for name, _, _ in weight.packed}
    for name, tensor in source.tensors.items():
        module, _, kind = name.rpartition(".")
        if module in packed and kind == "weight":
            result.append(_packed(source, config, module))
        elif name not in parts:
            result.append(dense(name, tensor))
    return result


def dense(name: str, tensor: Tensor) -> Weight:
    """The weight `name`, which the source stores as the one array `tensor`."""
    return Weight(name, tensor.dtype, tensor.shape, tensor.nbytes, lambda: [tensor.read()])


def _packed(source: Source, config: dict, module: str) -> Weight:
    """The matrix of `module`, which the source stores quantised by MLX."""
    quantization = config.get("quantization") or {}
    own = quantization.get(module)
    group = (own if isinstance(own, dict) else quantization).get("group_size")
    if not isinstance(group, int) or group < 1:
        raise MlxeffError(f"{source.path}: {module}: wanted a group_size in config.json's quantization, got {group!r}")
    tensors = [
        source.tensors[n] for kind in ("weight", "scales", "biases") if (n := f"{module}.{kind}") in source.tensors
    ]
    scales = source.tensors[f"{module}.scales"]
    shape = (*scales.shape[:-1], scales.shape[-1] * group)

    def parts() -> list[mx.array]:
        return [tensor.read() for tensor in tensors]

    nbytes, specs = sum(tensor.nbytes for tensor in tensors), tuple((t.name, t.dtype, t.shape) for t in tensors)
    bits = tensors[0].shape[-1] * 32 // max(1, shape[-1])
    mode = (own if isinstance(own, dict) else quantization).get("mode", "affine")

    def dense() -> mx.array:
        packed, *rest = parts()
        rest = [part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in rest]
        return mx.dequantize(packed, *rest, group_size=group, bits=bits, mode=mode).astype(mx.float32)

    form = mode if mode != "affine" else f"affine {bits} bits"
    return Weight(f"{module}.weight", scales.dtype, shape, nbytes, parts, specs, dense, form)


def _seeded(source: Source, module: str, fmt: BlockFormat, rows: int, cols: int) -> Weight:
    """The matrix of `module` in SeedLM blocks of the format `fmt`, with `rows` rows and `cols` columns."""
    names = [f"{module}.{kind}" for kind in fmt.arrays(rows, cols)]
    if missing := [name for name in names if name not in source.tensors]:
        raise MlxeffError(f"{source.path}: missing {len(missing)} tensors: {some(missing)}")
    tensors = [source.tensors[name] for name in names]

    def dense() -> mx.array:
        blocks = dict(zip(fmt.arrays(rows, cols), read(), strict=True))
        check_arrays(fmt, rows, cols, blocks, f"{source.path}: {module}")
        check_bias(blocks["exponent_bias"].item(), f"{source.path}: {module}")
        return decode(fmt, cols, blocks)

    read = lambda: [tensor.read() for tensor in tensors]  # noqa: E731
    specs = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Weight(f"{module}.weight", "U32", (rows, cols), nbytes, read, specs, dense, f"SeedLM {fmt.name}")
