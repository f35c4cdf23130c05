"""One of two processes that save an array together and read it back.

Arguments: folder, address, which one.
"""

import sys

import jax
import numpy as np

jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))

from lib.train.checkpoint import restore, save  # noqa: E402

mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
whole = np.arange(8.0).reshape(4, 2)
array = jax.make_array_from_callback((4, 2), sharding, lambda i: whole[i])
save(sys.argv[1], 1, {"w": array})
jax.experimental.multihost_utils.sync_global_devices("saved")
restored = restore(sys.argv[1], {"w": array})[0]["w"]
assert restored.sharding == array.sharding and len(restored.addressable_shards) == 1
assert (restored.addressable_shards[0].data == array.addressable_shards[0].data).all()
