"""One of several processes that save arrays together and read them back.

Arguments: folder, address, which one, how many.
"""

import sys

import jax
import numpy as np

folder, address, process, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.distributed.initialize(address, count, process)

from lib.train.checkpoint import restore, save  # noqa: E402

kinds = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, count // 2), ("x", "y"), axis_types=kinds)
whole = np.arange(32.0).reshape(8, 4)


def spread(*axes):
    """The array, split over mesh axes; along those that it is not, each process holds a copy."""
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])


tree = {
    "rows": spread("x"),
    "columns": spread(None, "y"),
    "both": spread("x", "y"),
    "all": spread(),
}
save(folder, 1, tree)
jax.experimental.multihost_utils.sync_global_devices("saved")
restored = restore(folder, tree)[0]
for name, array in tree.items():
    assert restored[name].sharding == array.sharding
    (ours,), (theirs,) = restored[name].addressable_shards, array.addressable_shards
    assert (ours.data == theirs.data).all()
