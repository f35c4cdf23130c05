"""Compiles every attention, forward and backward, for a TPU that is not here, and prints how many
kernels each has.
"""

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lib.model.attention import ATTENTION
from lib.model.kernels import RESIDUAL_NAME, compiled_kernels

chip = topologies.get_topology_desc(
    platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=(1, 1, 1)
).devices[0]
on_chip = jax.sharding.SingleDeviceSharding(chip)
policy = jax.checkpoint_policies.save_only_these_names(RESIDUAL_NAME)


def step(name, window, q, k, v):
    attend = jax.checkpoint(lambda *qkv: ATTENTION[name](*qkv, window), policy=policy)
    energy = lambda *qkv: jnp.square(attend(*qkv)).sum().astype(jnp.float32)  # noqa: E731
    return jax.grad(energy, argnums=(0, 1, 2))(q, k, v)


for names, T, K, H, window in [
    ("einsum jax", 256, 2, 128, 100),
    ("splash pallas", 512, 2, 128, 200),
    ("splash pallas", 1024, 1, 64, None),
]:
    q, k = (
        jax.ShapeDtypeStruct((2, T, heads, H), jnp.bfloat16, sharding=on_chip) for heads in (4, K)
    )
    for name in names.split():
        with compiled_kernels():
            compiled = jax.jit(step, static_argnums=(0, 1)).lower(name, window, q, k, k).compile()
        print(name, compiled.as_text().count('"tpu_custom_call"'))
