"""The arms: the reference model with its decoder layers replaced by quantised ones. Embedding and head are
unchanged.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlxeff.convert import convert

from mlxeff import calibration
from mlxeff.assembly.model import load_path
from mlxeff.errors import MlxeffError
from mlxeff.models.decoder import DecoderModel
from mlxeff.modules import QuantizedLinear, dense, is_matrix
from mlxeff.seedlm.format import FORMATS
from mlxeff.seedlm.linear import SeedLinear
from peers import install
from saving import once

from . import llama_quant, mlx_lm_quant

AFFINE = {"affine 3 g64": (3, 64), "affine 4 g128": (4, 128), "affine 4 g64": (4, 64), "affine 4 g32": (4, 32)}
SEEDS = {f"SeedLM {bits} {how}": (bits, how == "data-free") for how in ("aware", "data-free") for bits in FORMATS}
MLX_LM, LLAMA = [*mlx_lm_quant.METHODS], [*llama_quant.TYPES]
NAMES = [*AFFINE, *SEEDS, *MLX_LM, *LLAMA]


@dataclass
class QuantisedModel:
    """An arm. `linear_bytes` is the size of the decoder's matrices in the file, if the model holds them in another form
    in memory.
    """

    model: DecoderModel
    linear_bytes: int | None = None
    made: dict = field(default_factory=dict)  # how, if by a peer

    def size(self) -> dict:
        """Bits per weight of the linear layers, and bytes of all parameters."""
        held = [(m.rows * m.cols if isinstance(m, SeedLinear) else dense(m).size, m) for _, m in linears(self.model)]
        inside = sum(a.nbytes for _, m in held for _, a in tree_flatten(m.parameters()))
        everything = sum(a.nbytes for _, a in tree_flatten(self.model.parameters()))
        stored = inside if self.linear_bytes is None else self.linear_bytes
        return {"bits": 8 * stored / sum(count for count, _ in held), "bytes": everything - inside + stored}


def linears(model: DecoderModel) -> list[tuple[str, nn.Module]]:
    """(name, module) of the decoder's linear layers, without the head."""
    return [(name, module) for name, module in model.named_modules() if is_matrix(module) and ".layers." in name]


class Workshop:
    """Makes the arms of the reference at `path`. Folders are kept in `work` and `peers`; `limit` is in CPU seconds per
    arm.
    """

    def __init__(self, path: Path, work: Path, peers: Path, limit: float):
        self.path, self.work, self.peers, self.limit = path, work, peers, limit

    def arm(self, name: str) -> QuantisedModel:
        """Make the arm `name`. Raises MlxeffError if that is impossible."""
        if name in AFFINE:
            return QuantisedModel(affine_arm(self.path, *AFFINE[name]))
        if name in SEEDS:
            return QuantisedModel(seed_arm(self.path, self.work, name))
        return self._mlx_lm(name) if name in MLX_LM else self._llama(name)

    @functools.cached_property
    def windows(self) -> np.ndarray:
        """The calibration windows (W, T) of SeedLM's encoder."""
        text, _ = calibration.read_text(None)
        return calibration.windows(text, load_path(self.path).tokenizer, calibration.TOKENS, str(self.path))

    def _mlx_lm(self, name: str) -> QuantisedModel:
        folder, note = mlx_lm_quant.make(name, self._folder(), self.windows, self._quantised(), self.limit)
        return QuantisedModel(assembled(self.path, replaced_by(load_path(folder).model)), made=note)

    def _llama(self, name: str) -> QuantisedModel:
        peer = install.install("llama.cpp", self.peers)
        if peer.engine != "llama.cpp":
            raise MlxeffError(f"llama.cpp: wanted llama-cpp-python, got {peer.engine or peer.how}")
        place = once(self._quantised() / llama_quant.IMPORTANCE, self._write_importance)
        file, note = llama_quant.make(name, self.path, place, self._quantised(), peer.python, self.limit)
        model = assembled(self.path, replaced_by(load_path(file).model))
        nbytes = sum(matrix.nbytes for matrix in llama_quant.matrices(file))
        return QuantisedModel(model, nbytes, note | {"types": llama_quant.types(file)})

    def _write_importance(self, path: Path) -> None:
        np.savez(path, **llama_quant.importance(load_path(self.path).model, self.windows))

    def _quantised(self) -> Path:
        place = self.peers / "quantised" / self.path.stem
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _folder(self) -> Path:
        """The reference's own quantised blocks as a folder that mlx-lm loads, with float32 scales."""
        place = self._quantised() / "reference"
        return once(place, lambda path: convert(self.path, path, dtype="float32"))


def assembled(path: Path, replaced: list[tuple[str, nn.Module]]) -> DecoderModel:
    """The reference with modules replaced, set to run whole passes natively."""
    model = load_path(path).model
    model.update_modules(tree_unflatten(replaced))
    mx.eval(model.parameters())
    if not model.use_native():
        raise SystemExit("the native kernels do not apply here: this benchmark needs them")
    return model


def replaced_by(other: DecoderModel) -> list[tuple[str, nn.Module]]:
    """The modules of another quantisation of the same model, without embedding and head, with scales in half
    precision.
    """
    kept, embeddings = [], (nn.Embedding, nn.QuantizedEmbedding)
    for name, module in tree_flatten(other.leaf_modules(), is_leaf=nn.Module.is_module):
        if isinstance(module, embeddings) or name.startswith("lm_head"):
            continue
        if isinstance(module, nn.QuantizedLinear):
            module.scales, module.biases = module.scales.astype(mx.float16), module.biases.astype(mx.float16)
        kept.append((name, module))
    return kept


def affine_arm(path: Path, bits: int, group: int) -> DecoderModel:
    """The reference requantised by MLX with half-precision scales; groups are smaller if `group` does not divide a
    row.
    """
    replaced = []
    for name, module in linears(load_path(path).model):
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = dense(module).astype(mx.float16)
        fitting = next(size for size in (group, 64, 32) if layer.weight.shape[1] % size == 0)
        replaced.append((name, QuantizedLinear.from_linear(layer, fitting, bits)))
    return assembled(path, replaced)


def seed_arm(path: Path, work: Path, name: str) -> DecoderModel:
    """The model of the SeedLM arm `name`, from its folder in `work`; converts the reference if the folder is
    missing.
    """
    bits, data_free = SEEDS[name]
    folder = work / name.replace(" ", "-")
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        convert(path, folder, seedlm=bits, data_free=data_free)
    return load_path(folder).model
