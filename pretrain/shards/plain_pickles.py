"""Pickles of plain data, read without unpickling: nothing that they name is imported or called.

For CIFAR's `-python` files: dicts, lists, numbers, texts, and numpy arrays of bytes, which are recognised by the one
sequence of opcodes that makes them. Every other opcode, name or shape is refused.
"""

import io
import math
import pickletools
from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.json_files import brief

MAX_OPCODES = 4 << 20  # CIFAR-100's train has 0.3 million
_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_ARRAY, "numpy ndarray", "numpy dtype")
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES")
_VALUES += ("SHORT_BINSTRING", "BINSTRING")  # Python 2's str, in latin-1
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
# What damaged bytes lead to.
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError, StopIteration)


class _Name(str):
    """The name that GLOBAL gives: a string, never the object."""


class _Made:
    """What REDUCE makes: an array whose state comes with BUILD, or its dtype."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.array: np.ndarray | None = None


def read_plain_pickle(data: bytes, source: str) -> Any:
    """Returns what a pickle holds, arrays as numpy arrays of uint8. Raises UserError naming `source`."""
    try:
        return _read(data)
    except _DAMAGED as error:
        raise UserError(f"{source}: is no pickle of plain data and arrays of bytes ({error!s:.200})") from None


def _read(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    room = len(data)  # for the bytes of all arrays: memoised bytes must not be made into arrays without end

    def since_mark() -> list[Any]:
        place = next(number for number in range(len(stack) - 1, -1, -1) if stack[number] is _MARK)
        found = stack[place + 1 :]
        del stack[place:]
        return found

    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        name: str = opcode.name
        if count > MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES:,} opcodes")
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in _SHORT_TUPLES:
            stack[-_SHORT_TUPLES[name] :] = [tuple(stack[-_SHORT_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            _of(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            for key in pairs[::2]:
                if type(key) not in (str, bytes, int):  # the hash of nested tuples has no limit of its own
                    raise TypeError(f"a {type(key).__name__} where a key is expected")
            _of(dict, stack[-1]).update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = str(argument).split(" ", 1) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
            named = f"{module} {attribute}" if type(module) is type(attribute) is str else brief((module, attribute))
            if named not in _NAMES:
                raise ValueError(f"it names {brief(named)}, which could run code")
            stack.append(_Name(named))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_made(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            room -= _build(_of(_Made, stack[-1]), _of(tuple, state), room)
        elif name == "STOP":
            return _plain(stack.pop())
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name}")
    raise ValueError("it ends early")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} is expected")
    return value


def _made(function: Any, arguments: Any) -> _Made:
    if type(function) is not _Name or type(arguments) is not tuple:
        raise ValueError("it calls something")
    if function in _ARRAY and len(arguments) == 3 and arguments[0] == "numpy ndarray":
        return _Made("array")
    if function == "numpy dtype" and arguments[0] in ("u1", "|u1"):
        return _Made("bytes")
    raise ValueError(f"it calls {function} with {brief(arguments)}")


def _build(made: _Made, state: tuple[Any, ...], room: int) -> int:
    """Fills an array from its state: (version, shape, dtype, is column by column, bytes). A dtype's state is ignored.

    Returns its number of bytes, at most `room`.
    """
    if made.kind == "bytes":
        return 0
    _, shape, dtype, by_columns, content = state
    if type(dtype) is not _Made or dtype.kind != "bytes" or by_columns or type(shape) is not tuple or len(shape) > 2:
        raise ValueError("an array of something else than rows of bytes")
    size = len(content if type(content) is str else _of(bytes, content))
    # Each side alone first: the product of large ones takes minutes.
    if not all(type(side) is int and 0 <= side <= size for side in shape) or math.prod(shape) != size:
        raise ValueError(f"an array of shape {brief(shape)} with {size} bytes")
    if size > room:
        raise ValueError("its arrays have more bytes than the file")
    content = content.encode("latin-1") if isinstance(content, str) else content
    made.array = np.frombuffer(content, np.uint8).reshape(shape)
    return size


def _plain(value: Any) -> Any:
    """The value, or a dict with its values, with `_Made` objects replaced by their arrays."""
    if type(value) is dict:
        return {key: item.array if type(item) is _Made else item for key, item in value.items()}
    return value.array if type(value) is _Made else value
