"""The stored form of a SeedLM weight matrix: block formats, array layouts and header, and the checks of all three.

Each row of a matrix (rows, cols) is divided into blocks of C consecutive columns. A block is stored as a seed r of 16
bits, P coefficients q of 4 bits (two's complement) and an exponent code of 4 bits. It decodes to the C weights

    w[c] = fl32(isum[c] · fl32(2^e / 32767)),   isum[c] = Σ_p q[p] · (V[c][p] - 32768),   e = code - 8 + exponent_bias

where V[c][p] is state number c·P + p of a 16-bit Fibonacci shift register (`lfsr`) and fl32 rounds to float32. State
number 0 is r itself. The paper's seed is the state before it, so r is the first state that the paper's register emits.
r is never 0. Since |isum| < 2^20, all operations but the multiplication are exact, so every decoder gives the same
bits. Decoding to another type rounds the float32 weight.

    format  C  P  arrays (NB blocks per row)
    "4"     8  3  blocks       uint32 (rows, NB)      bits 0-15 r, 16-19 q0, 20-23 q1, 24-27 q2, 28-31 code
    "4.5"   8  4  seeds        uint16 (rows, NB)      r
                  coefficients uint16 (rows, NB)      bits 0-3 q0, 4-7 q1, 8-11 q2, 12-15 q3
                  exponents    uint8  (rows, NB / 2)  bits 0-3 code of the even block, 4-7 of the odd one
    "3"    12  4  as "4.5"
    all           exponent_bias int32 (1)

"4" is packed: one word per block. "4.5" and "3" are planar: three arrays. NB = ceil(cols / C), rounded up to an even
number for the planar formats. Weights that a block decodes to beyond column `cols` have no meaning: decoders drop them,
and products multiply them by zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MlxeffError

VERSION = 1  # of the stored form
REGISTER_BITS = 16
TAPS = (0, 1, 3, 12)  # bits of the register whose XOR is shifted in
SEED = "first-state"  # convention of the stored seed: the first state that the register emits, not the state before it
SCALE = 32767  # a state minus 32768 lies in [-SCALE, SCALE]
CODE_OFFSET = 8  # e = code - CODE_OFFSET + exponent_bias
BIAS_LIMIT = 96  # largest |exponent_bias|; up to it, all scales and weights but 0 are normal float32 numbers


@dataclass(frozen=True)
class BlockFormat:
    """One of the three block formats."""

    name: str  # bits per weight
    columns: int  # C, columns (weights) per block
    states: int  # P, coefficients per block and register states per weight
    planar: bool  # stored as three arrays, otherwise as one

    @property
    def bits(self) -> float:
        """Bits per weight, where `columns` divides the length of a row."""
        return (REGISTER_BITS + 4 + 4 * self.states) / self.columns

    def blocks(self, cols: int) -> int:
        """Blocks per row of a matrix with `cols` columns."""
        count = -(-cols // self.columns)
        return count + count % 2 if self.planar else count

    def arrays(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name → (shape, name of the dtype) of the arrays that a matrix (rows, cols) is stored as."""
        count = self.blocks(cols)
        if not self.planar:
            return {"blocks": ((rows, count), "uint32"), "exponent_bias": ((1,), "int32")}
        return {
            "seeds": ((rows, count), "uint16"),
            "coefficients": ((rows, count), "uint16"),
            "exponents": ((rows, count // 2), "uint8"),
            "exponent_bias": ((1,), "int32"),
        }


FORMATS = {
    f.name: f for f in (BlockFormat("3", 12, 4, True), BlockFormat("4", 8, 3, False), BlockFormat("4.5", 8, 4, True))
}


def block_format(name: object) -> BlockFormat:
    """The format called "3", "4" or "4.5", or given as that number. Raises MlxeffError for any other."""
    if str(name) not in FORMATS:
        raise MlxeffError(f"SeedLM: wanted {', '.join(FORMATS)} bits, got {name!r}")
    return FORMATS[str(name)]


def header() -> dict[str, object]:
    """The version and the conventions that hold for all matrices, as config.json and the metadata of a weights file
    name them."""
    return {"version": VERSION, "register_bits": REGISTER_BITS, "taps": list(TAPS), "seed": SEED}


def check_header(got: object, origin: str) -> None:
    """Raises MlxeffError unless `got` is a header with this version, register and seed convention. `origin` names the
    file."""
    if not isinstance(got, Mapping):
        raise MlxeffError(f"{origin}: SeedLM header: wanted a table, got {got!r}")
    for key, wanted in header().items():
        if key not in got:
            raise MlxeffError(f"{origin}: SeedLM header: missing key {key!r}")
        if got[key] != wanted:
            raise MlxeffError(f"{origin}: SeedLM header: {key}: wanted {wanted!r}, got {got[key]!r}")


def check_arrays(fmt: BlockFormat, rows: int, cols: int, arrays: Mapping[str, object], origin: str) -> None:
    """Raises MlxeffError where the names, shapes or types of arrays (NumPy or MLX) are not those of a matrix
    (rows, cols). `origin` names the matrix."""
    wanted = fmt.arrays(rows, cols)
    if sorted(arrays) != sorted(wanted):
        raise MlxeffError(f"{origin}: SeedLM {fmt.name} bits: wanted arrays {sorted(wanted)}, got {sorted(arrays)}")
    for name, (shape, dtype) in wanted.items():
        got = (tuple(arrays[name].shape), str(arrays[name].dtype).rpartition(".")[2])
        if got != (shape, dtype):
            raise MlxeffError(f"{origin}: {name}: wanted {dtype} {shape}, got {got[1]} {got[0]}")


def check_bias(bias: int, origin: str) -> int:
    """The exponent bias as an int. Raises MlxeffError where it is out of range."""
    if not -BIAS_LIMIT <= int(bias) <= BIAS_LIMIT:
        raise MlxeffError(f"{origin}: exponent_bias: wanted -{BIAS_LIMIT} to {BIAS_LIMIT}, got {int(bias)}")
    return int(bias)
