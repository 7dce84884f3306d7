"""Files that `torch.save` wrote, read as a stranger's: plain tensors and data, or one `BadInputError`.

`torch.load(weights_only=True)` imports nothing that a file names beyond torch's own list, and that is where its checks
end: a pickle of 60 bytes may still ask for a hundred gigabytes, share one list a billion times, take its numbers from
memory that nobody wrote, or say that a tensor is larger than its file. So a file is taken apart first, in plain
Python and without executing or allocating anything that it asks for, and what was loaded is walked through once.
"""

from __future__ import annotations

import errno
import io
import mmap
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from hopeprobe.errors import BadInputError, DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

_MOST_VALUES = 2_000_000  # of plain data, counted where they are used: a list shared twice counts twice
_MOST_DEPTH = 50
_MOST_BITS = 256  # of a whole number: none that is written is larger, and text of one could be 600 digits
_MOST_PICKLE = 1 << 28  # bytes of a pickle, which holds no weights
_MOST_USES = (
    16  # values in keys and arguments for each byte of a pickle: without sharing, each has a byte of its own
)
_SMALL = 1 << 16  # bytes that a tensor may seem to have more than its file: an expanded constant
_WIDTHS = {
    "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "UntypedStorage": 1, "QUInt8Storage": 1, "QInt8Storage": 1,
    "ShortStorage": 2, "HalfStorage": 2, "BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "QInt32Storage": 4,
    "LongStorage": 8, "DoubleStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip
_KNOWN = {
    *("collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.complex"),
    *("__builtin__.set", "__builtin__.complex", "torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
    *(
        "torch.storage.UntypedStorage",
        "torch._tensor._rebuild_from_type_v2",
        "torch.serialization._get_layout",
    ),
    *(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *(f"torch.{name}" for name in _WIDTHS),
}
"""What a pickle may name: of torch's own list, what gives a tensor the file's own numbers, and plain data."""

_END = 22  # bytes of what an archive ends with
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _NamesCodeError(Exception):
    """A pickle names something that is neither a tensor nor plain data; nothing was executed."""


def read_torch(path: Path, mapped: bool = False) -> object:
    """What a file of `torch.save` holds, of either format.

    Raises `BadInputError` that names the file; it is a `DamagedFileError` where nobody can read it.

    mapped: leave tensors on the disk until they are used, where the format allows it.
    """
    import torch

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
    if size == 0:
        raise DamagedFileError(
            f"{path} is empty (0 bytes): the run that wrote it was cut off, take an earlier checkpoint"
        )
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_archive(path)
        if is_archive or _is_legacy(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the formats that foreign files come in
                content = cast(
                    object,
                    torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive),
                )
            _check_content(content, size)
            return content
    except _NamesCodeError as error:
        raise BadInputError(
            f"{path} is a pickle that wants to run code when it is opened ({error}); it was refused and nothing was "
            "executed. hopeprobe reads plain tensors and data only: save a state dict"
        ) from None
    except BadInputError as error:
        raise DamagedFileError(
            f"{path} is damaged: {error}; take another checkpoint of the run, or ask whoever wrote it"
        ) from None
    except Exception as error:  # noqa: BLE001 - zipfile, pickle, torch: twenty kinds for a damaged or foreign file
        if _is_out_of_memory(error):
            raise BadInputError(f"{path} does not fit into memory ({size} bytes)") from None
        # anything else is said below, by how the file begins
    if b"PK\x03\x04".startswith(magic):
        raise DamagedFileError(
            f"{path} is damaged: it begins like a checkpoint but cannot be read to its end ({size} bytes). "
            "It was cut off or changed; take another checkpoint of the run"
        )
    raise DamagedFileError(
        f"{path} is not a checkpoint: neither a torch file nor anything else that is known here"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory. Torch raises no `MemoryError` then, and says so in its text only."""
    if isinstance(error, RuntimeError):
        said = str(error)
        return "allocate memory" in said or "not enough memory" in said  # the latter on Windows
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def _check_archive(path: Path) -> None:
    """Raise `BadInputError` for an archive that torch never wrote, or whose pickle is refused.

    Torch reads members without looking at their checksums, of two with one name another one than zipfile does, and
    inflates what is compressed.
    """
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # noqa: BLE001 - zipfile raises eight kinds for a directory that was changed
        raise BadInputError(f"its directory cannot be read ({error})") from None
    with path.open("rb") as file:
        file.seek(-_END, io.SEEK_END)
        if file.read(4) != b"PK\x05\x06":  # zipfile and torch would each look for a directory of their own
            raise BadInputError("there is something behind its directory")
    with archive:
        members = archive.infolist()
        _check_members(members, size)
        _check_sums(archive)
        pickled = [m for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
        if len(pickled) != 1 or pickled[0].file_size > _MOST_PICKLE:
            raise BadInputError("it has not one member data.pkl, of plain data")
        declared = _Scan.of(io.BytesIO(archive.read(pickled[0]))).declared
    folder = pickled[0].filename.partition("/")[0]
    there = {m.filename: m.file_size for m in members}
    for key, nbytes in declared.items():
        found = there.get(f"{folder}/data/{key}")
        if found is None or nbytes > found:
            raise BadInputError(
                f"it says that storage {key:.40} has {nbytes} bytes, and there are {found or 0}"
            )


def _check_sums(archive: zipfile.ZipFile) -> None:
    try:
        wrong = archive.testzip()
    except Exception as error:  # noqa: BLE001 - as many kinds for a member
        raise BadInputError(f"its directory is not that of its members ({error})") from None
    if wrong is not None:
        raise BadInputError(f"the checksum of {wrong} is wrong")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    folders = {m.filename.partition("/")[0] for m in members}
    if len(folders) != 1 or "" in folders or any("\\" in m.filename for m in members):
        raise BadInputError("its members do not lie in one folder")
    if len({m.filename for m in members}) < len(members):
        raise BadInputError("two of its members have one name")
    for m in members:
        if ".." in m.filename.split("/"):
            raise BadInputError(f"its member {m.filename} leads out of it")
        if m.external_attr & 0x10:  # one bit, and torch would take what is in memory for the member's content
            raise BadInputError(f"{m.filename} is marked as a folder")
        if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 0x1:
            raise BadInputError(f"{m.filename} is compressed or encrypted, which torch never does")
    if sum(m.file_size for m in members) > size:
        raise BadInputError(
            f"its members have {sum(m.file_size for m in members)} bytes, and the file has {size}"
        )


def _is_legacy(path: Path) -> bool:
    """Whether it is a whole file of torch's old format: four pickles, the keys of the storages, and these.

    Raises `_NamesCodeError` for a pickle that names code, of that format or not.
    """
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        file = _Bounded(mapped)
        if _Scan.of(file).found != _LEGACY_MAGIC:
            return False
        _Scan.of(file)
        _Scan.of(file)
        declared = _Scan.of(file).declared
        keys = _Scan.of(file).found
        if not isinstance(keys, list) or any(type(key) is not str for key in keys):
            raise BadInputError("the storages that it lists have no names")
        if sorted(keys) != sorted(declared):
            raise BadInputError("the storages that it lists are not those that it uses")
        for key in keys:
            mapped.seek(8, io.SEEK_CUR)  # how many numbers, which torch compares itself
            rest = len(mapped) - mapped.tell()
            if declared[key] > rest:
                raise BadInputError(
                    f"it says that storage {key:.40} has {declared[key]} bytes, and there are {rest}"
                )
            mapped.seek(declared[key], io.SEEK_CUR)
    return True


class _Bounded:
    """A mapped file as pickles are read from it: no piece is larger than a pickle may be."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped

    def tell(self) -> int:
        """How many bytes were read."""
        return self.mapped.tell()

    def read(self, length: int) -> bytes:
        """At most as many bytes."""
        return self.mapped.read(min(length, _MOST_PICKLE))

    def readline(self) -> bytes:
        """Up to the end of a line."""
        at = self.mapped.tell()
        end = self.mapped.find(b"\n", at, at + _MOST_PICKLE)
        return self.mapped.read(end - at + 1) if end >= 0 else b""


class _Inert:
    """What stands for everything that a pickle names: it can be called and built, and only keeps what it was given."""

    name = ""
    parts: list[object]

    def __new__(cls, *given: object, **_: object) -> Self:
        """Not `__init__`, which a pickle may leave out."""
        made = super().__new__(cls)
        made.parts = [*given]
        return made

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.parts.append(state)

    def __setitem__(self, key: object, value: object) -> None:
        self.parts += key, value

    def append(self, value: object) -> None: ...
    def extend(self, values: object) -> None: ...


_COUNTED = {
    pickle.SETITEM: slice(-2, -1),
    **dict.fromkeys((pickle.SETITEMS, pickle.DICT), slice(None, None, 2)),
    **dict.fromkeys((pickle.ADDITEMS, pickle.FROZENSET), slice(None)),
    **dict.fromkeys(
        (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD, pickle.BINPERSID), slice(-1, None)
    ),
}
"""Where on the stack an opcode finds keys, members of a set or arguments."""


_CALLS = {pickle.REDUCE: -2, pickle.NEWOBJ: -2, pickle.NEWOBJ_EX: -3}
"""Where on the stack is what a call calls."""


def _is_attributes(state: object) -> bool:
    return isinstance(state, dict) and all(type(name) is str for name in state)


def _counted(opcode: bytes, part: slice) -> Callable[[Any], None]:
    """What an opcode does, once that part of the stack was counted."""
    run: Any = pickle._Unpickler.dispatch[opcode[0]]

    def count_and_run(scan: _Scan) -> None:
        if opcode in _CALLS and getattr(scan.stack[_CALLS[opcode]], "name", "") in _WIDTHS:
            raise BadInputError("it makes room for a storage beside those that it has")
        # Attributes by their names are put where they are; what else they are is counted where that is used.
        if opcode != pickle.BUILD or not _is_attributes(scan.stack[-1]):
            scan.count(scan.stack[part], texts=opcode == pickle.REDUCE)
        run(scan)

    return count_and_run


class _Scan(pickle._Unpickler):
    """Takes a pickle apart: what it names, and how large it says that its storages are.

    The one in C would make room for as many memos as a pickle asks for; this one keeps those that there are.

    Keys are hashed, here and by torch, and torch hashes and prints arguments of calls; where one is a pair of one thing
    twice, and so on for 60 levels, neither comes to an end. So both are counted first.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        **{opcode[0]: _counted(opcode, part) for opcode, part in _COUNTED.items()},
    }

    def __init__(self, file: _Bounded | io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.file = file
        self.uses = 0
        self.declared: dict[str, int] = {}
        self.refused: list[str] = []
        self.found: object = None

    @classmethod
    def of(cls, file: _Bounded | io.BytesIO) -> _Scan:
        """Take the next pickle of a file apart. Raises `_NamesCodeError`, and anything for one that is none."""
        scan = cls(file)
        scan.found = scan.load()
        if scan.refused:  # and only in a whole pickle: any text could begin like one
            raise _NamesCodeError(", ".join(dict.fromkeys(scan.refused))[:100])
        return scan

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if f"{module}.{name}" not in _KNOWN and not _allowed(module, name):
            self.refused.append(f"{module}.{name}"[:100])
        return type("Named", (_Inert,), {"name": name})

    def count(self, values: Iterable[object], texts: bool = False) -> None:
        """Count the values and all in them, what is shared each time. Raises `BadInputError` where that is no end.

        texts: each counts as long as it is, as a call (`_codecs.encode`) may copy it.
        """
        stack, most = [iter(values)], _SMALL + _MOST_USES * self.file.tell()
        while stack:
            for value in stack[-1]:
                self.uses += 1 + (len(value) if texts and isinstance(value, str | bytes) else 0)
                inside = value.parts if isinstance(value, _Inert) else value
                if isinstance(inside, dict | tuple | list | set | frozenset):
                    stack.append(iter(inside.items() if isinstance(inside, dict) else inside))
                    break
            else:
                stack.pop()
            if self.uses > most:
                raise BadInputError(f"its keys and arguments hold more than {most} values and letters")
            if len(stack) > _MOST_DEPTH:
                raise BadInputError(f"a key or an argument in it lies more than {_MOST_DEPTH} deep in itself")

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, numel, *_ = pid
        if type(kind) is not str or type(key) is not str:  # before either is printed, compared or hashed
            raise BadInputError("it has a storage without a name")
        width = _WIDTHS.get(getattr(storage, "name", ""))
        if kind != "storage" or width is None or type(numel) is not int or numel < 0:
            raise BadInputError(f"it has a storage of an unknown kind, {kind!r:.40}")
        nbytes = numel * width
        if self.declared.setdefault(key, nbytes) != nbytes:
            raise BadInputError(f"it says that storage {key:.40} has two sizes")
        return _Inert()


def _allowed(module: str, name: str) -> bool:
    """A type of numbers; or what the user let torch load, who knows what it does."""
    import torch

    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return True
    safe: list[Any] = torch.serialization.get_safe_globals()
    named = [one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}" for one in safe]
    return f"{module}.{name}" in named


def _check_content(content: object, size: int) -> None:
    """Raise `BadInputError` for data without end, and for a tensor that holds more numbers than the file has bytes."""
    import torch

    plain = (str, bytes, bool, float, complex, type(None), torch.dtype, torch.device, torch.layout)
    stack, seen = [iter([content])], 0
    while stack:
        value = next(stack[-1], stack)
        if value is stack:
            stack.pop()
            continue
        seen += 1
        if seen > _MOST_VALUES:
            raise BadInputError(f"it holds more than {_MOST_VALUES} values beside its weights")
        if isinstance(value, torch.Tensor):
            _check_tensor(value, size)
        elif isinstance(value, Mapping | list | tuple | set):
            if len(stack) > _MOST_DEPTH:
                raise BadInputError(f"its data lie more than {_MOST_DEPTH} deep in each other")
            if isinstance(value, OrderedDict) and vars(value).keys() - {"_metadata"}:
                raise BadInputError("it has a dictionary with attributes")
            inside = value.items() if isinstance(value, Mapping) else value
            stack.append(iter(inside))
        elif isinstance(value, int) and not isinstance(value, bool):
            if value.bit_length() > _MOST_BITS:
                raise BadInputError(f"it holds a whole number of {value.bit_length()} bits")
        elif not isinstance(value, plain):
            raise BadInputError(
                f"it holds a {type(value).__name__}, which is neither a tensor nor plain data"
            )


def _check_tensor(tensor: Tensor, size: int) -> None:
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise BadInputError("it holds a tensor that has no numbers of its own")
    if vars(tensor):
        raise BadInputError("it holds a tensor with attributes")
    if tensor.numel() * tensor.element_size() > size + _SMALL:
        raise BadInputError(f"it holds a tensor of {tensor.numel()} numbers, and the file has {size} bytes")
