"""The tensors of a file by torch.save, read without torch.load: the container is a zip file, its index a pickle.

    NAME/data.pkl       the object saved; for each tensor a storage, an offset, a shape and strides
    NAME/data/0 …       the storages, not compressed
    NAME/byteorder, NAME/version and the like

Sizes are believed only as far as the file has bytes for them. Files from before PyTorch 1.6 are something else and are
refused.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nanochat.common import UserError, first_line
from nanochat.formats.pickle_data import Call, Global, Reference, read_pickle
from nanochat.reporting.machine import memory_bytes

STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
KNOWN = {TENSOR, PARAMETER, "collections.OrderedDict", *STORAGES}
SIDE_FILES = {"byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id"}
MAX_DIRECTORY_BYTES = 8 * 2**20  # of the zip file: some ten thousand entries
MAX_INDEX_BYTES = 16 * 2**20  # of data.pkl
MAX_NAME, MAX_DIMENSIONS, MAX_SIZE = 300, 16, 2**48
LOCAL_HEADER = 30  # bytes before an entry's name


@dataclass
class SavedTensor:
    """A strided view of a storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: str


class TorchFile:
    """A state dict in an open file: what tensors it has, and then their values. `path` names it in errors."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        """Read the index. Raises UserError for anything but tensors by name that lie within the file."""
        self.path, self.file = path, file
        if os.fstat(file.fileno()).st_size > memory_bytes():
            raise UserError(f"{path} is larger than this machine's memory; import it on a larger one")
        self.entries = self._read_directory()
        if self.entries.get("byteorder") and self._read("byteorder").strip() != b"little":
            raise UserError(f"{path} was written on a big-endian machine; save it again on another")
        index = read_pickle(self._read("data.pkl"), path, KNOWN)
        if not isinstance(index, dict) or not index:
            raise UserError(f"{path} holds no state dict; give a file such as model_000100.pt")
        self.tensors = {self._name(key): self._tensor(key, value) for key, value in index.items()}
        used = {tensor.storage: self._elements(tensor) for tensor in self.tensors.values()}
        if sum(math.prod(tensor.shape) for tensor in self.tensors.values()) > sum(used.values()):
            raise UserError(f"{path} is damaged: its tensors are larger than what it stores")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, contiguous, in the dtype it was saved in."""
        tensor = self.tensors[name]
        flat = self._read_storage(tensor.storage).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).contiguous()

    # -- the index ------------------------------------------------------------------------------------

    def _name(self, key: Any) -> str:
        if not isinstance(key, str) or len(key) > MAX_NAME or not key.isprintable():
            raise UserError(f"{self.path} holds no state dict: a key is no name of a tensor")
        return key

    def _tensor(self, name: str, value: Any) -> SavedTensor:
        """The tensor that a record of the pickle describes, checked against the storage it is in."""
        if isinstance(value, Call) and value.name == PARAMETER and value.args:
            value = value.args[0]
        match value:
            case Call(name="torch._utils._rebuild_tensor_v2", args=(Reference(id=stored), offset, shape, stride, *_)):
                pass
            case _:
                raise UserError(f"{self.path} holds something else than tensors under {name!r}; save a state dict")
        match stored:
            case ("storage", Global(name=kind), str(storage), _, int(count)) if kind in STORAGES:
                tensor = SavedTensor(STORAGES[kind], shape, stride, offset, f"data/{storage}")
            case _:
                raise UserError(f"{self.path}: {name!r} is in a storage of an unknown kind")
        entry = self.entries.get(tensor.storage)
        if not (entry and sizes(shape) and sizes(stride) and sizes((offset,)) and len(shape) == len(stride)):
            raise UserError(f"{self.path} is damaged: it cannot hold {name!r}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        elements = self._elements(tensor)
        fits = 0 in shape or last < elements
        if entry.file_size != elements * tensor.dtype.itemsize or count != elements or not fits:
            raise UserError(f"{self.path} is damaged: {name!r} is larger than what is stored of it")
        return tensor

    def _elements(self, tensor: SavedTensor) -> int:
        return self.entries[tensor.storage].file_size // tensor.dtype.itemsize

    # -- the container --------------------------------------------------------------------------------

    def _read_directory(self) -> dict[str, zipfile.ZipInfo]:
        """The entries by their names without NAME/, each checked: not compressed, and its bytes its own."""
        try:
            magic = self.file.read(4)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        if magic != b"PK\3\4":
            raise UserError(
                f"{self.path} is not in the format of torch.save since PyTorch 1.6. If you trust it with your machine, "
                "load it with PyTorch and save its state dict again"
            )
        try:
            with zipfile.ZipFile(LimitedReads(self.file)) as container:
                infos, end = container.infolist(), container.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
            raise UserError(f"{self.path} is damaged: {first_line(error)}; copy it again") from error
        root = infos[0].filename.split("/")[0] if infos else ""
        entries = {info.filename.removeprefix(f"{root}/"): info for info in infos}
        if len(entries) != len(infos):
            raise UserError(f"{self.path} is damaged: two of its entries have one name")
        for name, info in entries.items():
            plain = name in SIDE_FILES | {"data.pkl"} or (name.startswith("data/") and name[5:].isalnum())
            if not plain or info.filename != str(PurePosixPath(root, name)) or root in ("", ".", ".."):
                raise UserError(f"{self.path} has an entry that no state dict needs: {info.filename[:100]!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise UserError(f"{self.path} is compressed; write it with torch.save")
        if "data.pkl" not in entries:
            raise UserError(f"{self.path} has no data.pkl, so torch.save did not write it")
        self.starts = dict(self._starts(entries, end))
        return entries

    def _starts(self, entries: dict[str, zipfile.ZipInfo], end: int) -> Iterator[tuple[str, int]]:
        """(name, where its bytes begin). Raises UserError if two entries overlap, or one leaves the file."""
        before = 0
        for name, info in sorted(entries.items(), key=lambda item: item[1].header_offset):
            self.file.seek(info.header_offset)
            header = self.file.read(LOCAL_HEADER)
            if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4") or info.header_offset < before:
                raise UserError(f"{self.path} is damaged at {name}; copy it again")
            start = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
            before = start + info.file_size
            if before > end:
                raise UserError(f"{self.path} is damaged: it ends before {name} does; copy it again")
            yield name, start

    def _read(self, name: str) -> bytes:
        """A small entry."""
        if self.entries[name].file_size > MAX_INDEX_BYTES:
            raise UserError(f"{self.path} is refused: its {name} has {self.entries[name].file_size:,} bytes")
        return self._read_storage(name).numpy().tobytes()

    def _read_storage(self, name: str) -> torch.Tensor:
        """An entry's bytes, uint8, checked against its checksum."""
        info = self.entries[name]
        try:
            data = torch.empty(info.file_size, dtype=torch.uint8)
            self.file.seek(self.starts[name])
            if self.file.readinto(data.numpy().data) != info.file_size:
                raise UserError(f"{self.path} is damaged: it ends inside {name}; copy it again")
        except (RuntimeError, OSError) as error:  # no memory for it, or the disk fails
            raise UserError(f"{self.path}: {name} cannot be read: {first_line(error)}") from error
        if zlib.crc32(data.numpy().data) != info.CRC:
            raise UserError(f"{self.path} is damaged: {name} has another checksum; copy it again")
        return data


class LimitedReads:
    """The file as zipfile uses it, but a read of more than a directory may have is an error: it would get as much
    memory as a header says."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = os.fstat(self.file.fileno()).st_size - self.file.tell()
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too large")
        return self.file.read(size)


def sizes(values: Any) -> bool:
    """Whether these are sizes of dimensions, or strides: a short tuple of numbers that are not negative."""
    return (
        isinstance(values, tuple)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < MAX_SIZE for value in values)
    )
