"""What a call of a custom kernel would send to the GPU, recorded by MLX's own exporter: it works without Metal."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Launch:
    """One launch: the source as MLX generates it, and everything that is passed beside it."""

    name: str
    source: str  # the header, the signature and body, the instantiation of a template
    grid: tuple[int, int, int]  # threads
    threadgroup: tuple[int, int, int]
    shape_infos: tuple[tuple[bool, bool, bool], ...]  # for each input: are shape, strides, ndim passed?
    ensure_row_contiguous: bool
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    init_value: float | None


def trace(kernel, arrays, *, init_value=None, **keywords):
    """The `Launch` of `kernel(inputs=arrays, **keywords)`; `kernel` is what `mx.fast.metal_kernel` returned."""
    records = []

    def launch(*inputs):
        return kernel(inputs=list(inputs), init_value=init_value, **keywords)

    mx.export_function(records.append, launch, *arrays)
    [record] = [each for each in records if each.get("name") == "CustomKernel"]
    name, source, *numbers = record["arguments"]
    return Launch(
        name=name,
        source=source,
        grid=tuple(numbers[:3]),
        threadgroup=tuple(numbers[3:6]),
        shape_infos=tuple(numbers[6]),
        ensure_row_contiguous=numbers[7],
        outputs=tuple((tuple(shape), dtype) for _, shape, dtype in record["outputs"]),
        init_value=init_value,
    )
