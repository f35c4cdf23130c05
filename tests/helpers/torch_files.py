"""Files as torch saves them, written without torch."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np

STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class Storage:
    """The numbers of a tensor, which the pickle names only by their key."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class Tensor:
    """A tensor that pickles itself as torch's do."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.parts = storage, offset, shape, strides

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (*self.parts, False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        kind = getattr(sys.modules["torch"], STORAGES[obj.array.dtype.name])
        return "storage", kind, obj.key, "cpu", obj.array.size


def save_torch(tensors: dict, path, monkeypatch, **records):
    """torch.save of a state dict of arrays or Tensors; records: files of the archive to replace."""
    named(monkeypatch)
    state, storages = OrderedDict(), {}
    for i, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, np.ndarray):
            strides = tuple(stride // tensor.itemsize for stride in tensor.strides)
            tensor = Tensor(Storage(str(i), tensor.reshape(-1)), 0, tensor.shape, strides)
        storages[tensor.parts[0].key] = tensor.parts[0].array
        state[name] = tensor
    # torch notes versions of modules on the dict itself
    state._metadata = {"": {"version": 1}}
    data = io.BytesIO()
    Pickler(data, protocol=2).dump(state)

    files = {"data.pkl": data.getvalue(), "byteorder": b"little", "version": b"3\n"}
    files |= {f"data/{key}": array.tobytes() for key, array in storages.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (files | records).items():
            archive.writestr(f"model/{name}", content)


def named(monkeypatch):
    """Have pickles name what is torch's, also where torch is not."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*args):
        raise AssertionError("nobody is to call this")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
