"""What torch has saved, read without torch, and without running what a pickle says.

A `.pt` file is a zip archive: one pickle that describes the tensors, and the numbers of each
storage in a file of its own. A pickle is a program that may call whatever it names, so ours knows
nothing but the names in `NAMES` and refuses every other.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lib.files import UserError, first_line, reading, regular

# torch's name of a storage: the numbers in it
DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class StorageType(NamedTuple):
    """A class of torch's that a pickle names, as no more than the numbers in it."""

    dtype: Any


class AttributeDict(dict):
    """A dict that takes whatever attributes a pickle gives it."""


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *rest) -> np.ndarray:
    """A view of a storage, as torch's own function of this place makes it."""
    counts = [offset, *shape, *strides]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    # the last number that it reaches must be there, and no number may stand for many
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.size or (math.prod(shape) and last >= storage.size):
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.size}")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _parameter(tensor: np.ndarray, *rest) -> np.ndarray:
    return tensor


# what the pickle of a state dict may name: (module, name) -> what it gets
NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): AttributeDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
NAMES |= {("torch", name): StorageType(dtype) for name, dtype in DTYPES.items()}


class RefusedPickle(Exception):
    """A pickle asked for something that it does not get."""


class Unpickler(pickle.Unpickler):
    """Reads a pickle that may name what is in `names`, and calls nothing else."""

    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any], storages=None):
        super().__init__(io.BytesIO(data))
        self.names, self.storages = names, storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise RefusedPickle(f"{module}.{name}")
        return self.names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self.storages is None:
            raise RefusedPickle("a storage")
        return self.storages(pid)


def unpickle(data: bytes, names: Mapping[tuple[str, str], Any], where, storages=None) -> Any:
    """What a pickle holds; UserError where it names anything else, or is damaged."""
    try:
        return Unpickler(data, names, storages).load()
    except RefusedPickle as e:
        raise UserError(
            f"{where} asks for {e}, which nothing of this kind needs: it was not read, for a "
            "pickle can run programs; don't open it elsewhere either"
        ) from None
    except Exception as e:  # a damaged pickle can break in any way
        raise UserError(f"{where} is damaged ({first_line(e)}): get it again") from e


def read_torch(path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` has written, by name.

    UserError where the file is no such archive, is damaged, or asks for programs.
    """
    path = Path(path)
    with reading(path):
        if not zipfile.is_zipfile(regular(path)):
            raise UserError(
                f"{path} is no file that torch saves since version 1.6, or is damaged: get it again"
            )
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray]:
    """The state dict in an open archive."""
    # everything lies in one folder, whose name is the file's at first saving
    files = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
    if "data.pkl" not in files:
        raise UserError(f"{path} holds no data.pkl: it was not saved by torch")
    if "byteorder" in files and archive.read(files["byteorder"]) != b"little":
        raise UserError(f"{path} was saved on a machine of the other byte order: save it on a PC")
    loaded: dict[str, np.ndarray] = {}

    def storage(pid) -> np.ndarray:
        """The numbers that ("storage", type, key, device, count) means."""
        _, kind, key, _, count = pid
        if key not in loaded:
            info = files[f"data/{key}"]
            dtype = np.dtype(kind.dtype)
            # what a file claims to unfold to is not to be believed
            stored = info.compress_type == zipfile.ZIP_STORED
            if not stored or info.file_size != count * dtype.itemsize:
                raise ValueError(f"storage {key} has {info.file_size} bytes for {count} numbers")
            loaded[key] = np.frombuffer(archive.read(info), dtype)
        return loaded[key]

    tensors = unpickle(archive.read(files["data.pkl"]), NAMES, path, storage)
    if not isinstance(tensors, dict) or not all(map(_is_tensor, tensors.items())):
        raise UserError(
            f"{path} holds no state dict: give the file of a model, not of its optimizer"
        )
    return dict(tensors)


def _is_tensor(item: tuple) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, np.ndarray)
