"""The stored form of a SeedLM weight matrix: block formats, array layouts, header, and the checks of all three.

A matrix (rows, cols) is cut into blocks of C consecutive columns of a row. A block stores a seed r, P coefficients q of
4 bits (two's complement) and an exponent code of 4 bits; it stands for

    w[c] = fl32(isum[c] · fl32(2^e / 32767)),   isum[c] = Σ_p q[p] · (V[c][p] - 32768),   e = code - 8 + exponent_bias

with V[c][p] = state number c·P + p of a 16-bit Fibonacci register (`lfsr`) whose state number 0 is r itself: r =
V[0][0] is the first state emitted, the successor of the paper's seed. r is never 0. |isum| < 2^20, so everything but
the one multiplication is exact, and every decoder gives the same bits; other types are rounded from that float32.

    format  C  P  arrays (NB blocks a row)
    "4"     8  3  blocks       uint32 (rows, NB)      bits 0-15 r, 16-19 q0, 20-23 q1, 24-27 q2, 28-31 code
    "4.5"   8  4  seeds        uint16 (rows, NB)      r
                  coefficients uint16 (rows, NB)      bits 0-3 q0, 4-7 q1, 8-11 q2, 12-15 q3
                  exponents    uint8  (rows, NB / 2)  bits 0-3 code of the even block, 4-7 of the odd one
    "3"    12  4  as "4.5"
    all           exponent_bias int32 (1)

NB = ceil(cols / C), for the planar formats rounded up to even. What a block decodes to beyond `cols` means nothing:
readers drop it, products multiply it by zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MlxeffError

VERSION = 1
REGISTER_BITS = 16
TAPS = (0, 1, 3, 12)
SEED = "first-state"  # r is the first state emitted, not the state before it
SCALE = 32767  # states lie in [-SCALE, SCALE] once 32768 is subtracted
CODE_OFFSET = 8  # e = code - CODE_OFFSET + exponent_bias
BIAS_LIMIT = 96  # |exponent_bias|: every scale and every weight is then a normal float32


@dataclass(frozen=True)
class BlockFormat:
    """One of the three block formats."""

    name: str  # bits a weight
    columns: int  # C
    states: int  # P, coefficients a block
    planar: bool  # three arrays; one otherwise

    @property
    def bits(self) -> float:
        """Bits a weight, where `columns` divides the row."""
        return (REGISTER_BITS + 4 + 4 * self.states) / self.columns

    def blocks(self, cols: int) -> int:
        """Blocks a row."""
        count = -(-cols // self.columns)
        return count + count % 2 if self.planar else count

    def arrays(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name → (shape, dtype name) of what a matrix (rows, cols) is stored as."""
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
    """The format called "3", "4" or "4.5" (or that number)."""
    if str(name) not in FORMATS:
        raise MlxeffError(f"SeedLM: wanted {', '.join(FORMATS)} bits, got {name!r}")
    return FORMATS[str(name)]


def header() -> dict[str, object]:
    """What config.json and a file's metadata say of every seed-encoded matrix, beside its format and shape."""
    return {"version": VERSION, "register_bits": REGISTER_BITS, "taps": list(TAPS), "seed": SEED}


def check_header(got: object, origin: str) -> None:
    """Refuse a header that another version, register or convention wrote; `origin` names the file."""
    if not isinstance(got, Mapping):
        raise MlxeffError(f"{origin}: SeedLM header: wanted a table, got {got!r}")
    for key, wanted in header().items():
        if key not in got:
            raise MlxeffError(f"{origin}: SeedLM header: missing key {key!r}")
        if got[key] != wanted:
            raise MlxeffError(f"{origin}: SeedLM header: {key}: wanted {wanted!r}, got {got[key]!r}")


def check_arrays(fmt: BlockFormat, rows: int, cols: int, arrays: Mapping[str, object], origin: str) -> None:
    """Refuse arrays (NumPy or MLX) whose names, shapes or types are not those of a matrix (rows, cols)."""
    wanted = fmt.arrays(rows, cols)
    if sorted(arrays) != sorted(wanted):
        raise MlxeffError(f"{origin}: SeedLM {fmt.name} bits: wanted arrays {sorted(wanted)}, got {sorted(arrays)}")
    for name, (shape, dtype) in wanted.items():
        got = (tuple(arrays[name].shape), str(arrays[name].dtype).rpartition(".")[2])
        if got != (shape, dtype):
            raise MlxeffError(f"{origin}: {name}: wanted {dtype} {shape}, got {got[1]} {got[0]}")


def check_bias(bias: int, origin: str) -> int:
    """The exponent bias as an int; refuses one out of range."""
    if not -BIAS_LIMIT <= int(bias) <= BIAS_LIMIT:
        raise MlxeffError(f"{origin}: exponent_bias: wanted -{BIAS_LIMIT} to {BIAS_LIMIT}, got {int(bias)}")
    return int(bias)
