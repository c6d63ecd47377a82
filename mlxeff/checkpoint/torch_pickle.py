"""The pickle in a PyTorch archive → plain dicts, lists, numbers and `StoredTensor`s, without Python's unpickler.

Unpickling runs code that the file chooses. This is a small stack machine over `pickletools.genops` instead: it knows
the pickle instructions that state dicts consist of, never imports or calls what the file names, and raises for all
other instructions. Sources: CPython's pickletools for the instructions, torch/_utils.py (`_rebuild_tensor_v2`) for the
calls that torch writes. This module knows nothing about zip files.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import MlxeffError

STORAGES = {  # torch's storage classes → number type of their elements
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
DTYPE_NAMES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "float",
    "double",
    "half",
    "long",
    "int",
    "short",
)
# Names that a pickle may mention. Calls of PLAIN give values that a state dict does not need.
PLAIN = {"torch.Size", "torch.device"} | {f"torch.{name}" for name in DTYPE_NAMES}
DICTS = {"collections.OrderedDict"}
REBUILD, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
STORAGE_NAMES = {f"{module}.{name}": kind for name, kind in STORAGES.items() for module in ("torch", "torch.storage")}
ALLOWED = PLAIN | DICTS | {REBUILD, PARAMETER} | set(STORAGE_NAMES)
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle mentions, one of ALLOWED: only its name, never the object."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A storage: the archive's entry `data/<key>`, with `count` elements of the number type `dtype`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: a strided view of a storage. Offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """Stands for a value that a state dict does not need: a torch.Size, a dtype or a device."""


def read_pickle(data: bytes, origin: str) -> object:
    """The pickled value: dict, list, tuple, str, bytes, int, float, bool, None, StoredTensor or Opaque. `origin` names
    the file in errors. Raises MlxeffError for a damaged pickle and for anything that is not plain weights."""
    machine = _Machine(origin, len(data))
    try:
        for operation, argument, _ in pickletools.genops(data):
            step = STEPS.get(operation.name)
            if step is None:
                raise machine.refuse(f"the instruction {operation.name}")
            step(machine, argument)
        return machine.stack[-1]
    except MlxeffError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MlxeffError(
            f"{origin}: damaged pickle: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


class _Machine:
    """The state of the stack machine. STEPS says which methods are pickle instructions; they get the argument of the
    instruction, if it has one.

    `stack` are the values since the last mark, `outer` the stacks below the marks, `memo` the values that later
    instructions refer to by number. `length` is the size of the pickle in bytes.
    """

    def __init__(self, origin: str, length: int):
        self.origin, self.length = origin, length
        self.stack, self.outer, self.memo = [], [], {}

    def refuse(self, what: str) -> MlxeffError:
        """The error to raise for something that a state dict does not contain."""
        return MlxeffError(
            f"{self.origin}: refused, nothing was executed: wanted a pickle of plain weights, got {what}"
        )

    def push(self, value) -> None:
        self.stack.append(value)

    def ignore(self, _) -> None:
        pass

    def mark(self, _) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list:
        """The values since the last mark, which are removed with it."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def tuple_to_mark(self, _) -> None:
        items = self.pop_mark()
        self.push(tuple(items))

    def put(self, index: int) -> None:
        """Remember the last value under a number."""
        if index > self.length:
            raise self.refuse(f"a memo index of {index} in {self.length} bytes")
        self.memo[index] = self.stack[-1]

    def memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def mention(self, name: str) -> None:
        """Push the name of a class or function. Raises MlxeffError for one that state dicts do not need."""
        if name not in ALLOWED:
            raise self.refuse(f"a reference to {name[:80]!r}")
        self.push(Global(name))

    def named(self, argument: str) -> None:
        self.mention(argument.replace(" ", "."))

    def stack_named(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.refuse("a reference without a name")
        self.mention(f"{module}.{name}")

    def append(self, _) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list) -> None:
        """Append values to the list on the stack."""
        if not isinstance(self.stack[-1], list):
            raise self.refuse(f"an append to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def set_item(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def set_items(self, _) -> None:
        self.update(self.pop_mark())

    def update(self, items: list) -> None:
        """Add keys and values, one after the other in `items`, to the dict on the stack."""
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict or len(items) % 2:
            raise self.refuse(f"items for a {type(target).__name__}")
        if not all(isinstance(key, (str, int, float, type(None))) for key in keys):
            raise self.refuse("a dictionary key that is neither text nor a number")
        target.update(zip(keys, items[1::2], strict=True))

    def build(self, _) -> None:
        """Set attributes of an OrderedDict: ignored. torch writes `_metadata`, which is not needed."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise self.refuse(f"attributes for a {type(self.stack[-1]).__name__}")

    def persistent(self, _) -> None:
        self.push(_storage(self, self.stack.pop()))

    def reduce(self, _) -> None:
        """Call a function with a tuple of arguments: pushes a description of the result."""
        arguments, what = self.stack.pop(), self.stack.pop()
        if not isinstance(what, Global) or not isinstance(arguments, tuple):
            raise self.refuse(f"a call of a {type(what).__name__}")
        self.push(_call(self, what.name, arguments))


def _call(machine: _Machine, name: str, arguments: tuple) -> StoredTensor | dict | Opaque:
    """A description of the value that a call of `name` would have returned."""
    if name == REBUILD and len(arguments) >= 4:
        return _tensor(machine, *arguments[:4])
    if name == PARAMETER and arguments and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    if name in DICTS and arguments in ((), ([],)):
        return {}
    if name in PLAIN:
        return Opaque()
    raise machine.refuse(f"a call of {name} with {len(arguments)} arguments")


def _storage(machine: _Machine, value: object) -> Storage:
    """The storage that a persistent id of torch names."""
    if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
        raise machine.refuse("a persistent id that is not a storage")
    _, kind, key, _, count = value
    if (
        not isinstance(kind, Global)
        or kind.name not in STORAGE_NAMES
        or not isinstance(key, str)
        or not _natural(count)
    ):
        raise machine.refuse("a storage without type, key and length")
    return Storage(key, STORAGE_NAMES[kind.name], count)


def _tensor(machine: _Machine, storage: object, offset: object, shape: object, strides: object) -> StoredTensor:
    """The tensor that `_rebuild_tensor_v2` makes of these arguments."""
    if not isinstance(storage, Storage) or not _natural(offset):
        raise machine.refuse("a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise machine.refuse("a tensor without shape and strides")
    if len(shape) > MAX_DIMENSIONS:
        raise machine.refuse(f"a tensor of {len(shape)} dimensions")
    if not all(map(_natural, shape + strides)):
        raise machine.refuse("a tensor whose shape or strides are not natural numbers")
    return StoredTensor(storage, offset, shape, strides)


def _natural(value: object) -> bool:
    """Whether a value is an integer from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


Step = Callable[[_Machine, object], None]  # (the machine, the argument of the instruction)


def _constant(value: bool | None) -> Step:
    """The instruction that pushes a constant."""
    return lambda machine, _: machine.push(value)


def _fresh(kind: type) -> Step:
    """The instruction that pushes an empty collection."""
    return lambda machine, _: machine.push(kind())


def _tuple_of(count: int) -> Step:
    """The instruction that replaces the last `count` values by their tuple."""

    def step(machine, _):
        if len(machine.stack) < count:
            raise IndexError("too few values for a tuple")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


# Name of a pickle instruction → what it does.
STEPS: dict[str, Step] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine.ignore),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_DICT": _fresh(dict),
    "EMPTY_LIST": _fresh(list),
    "EMPTY_TUPLE": _fresh(tuple),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
}
