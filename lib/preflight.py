"""Compile the real train step for a TPU without having one, through libtpu on the CPU."""

import os
import time

from lib.files import UserError

ENVIRONMENT = {  # libtpu looks for a TPU machine around it unless told; several processes may compile at once
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-1", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_device(topology: str = "v6e:1x1"):
    """The first device of a TPU topology that isn't there. Call before anything else initialises JAX's backends."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except Exception as e:
        raise UserError(f"cannot describe TPU {topology} ({str(e).splitlines()[0]}): pip install libtpu (Linux x86-64), and "
                        "name a topology like v6e:1x1, v5e:1x1 or v4:2x2x1") from None


def compile_step(config, device) -> dict:
    """Compile one training step of `config` for `device`: {"compiled", "seconds", "peak", "arguments", "temporary"} in bytes.

    `config` names its attention and compute dtype (auto would look at the machine at hand). The device's
    memory running out is a UserError.
    """
    import jax

    from lib import train
    from lib.attention import compiled_kernels

    at = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    batch = at(jax.ShapeDtypeStruct((config.accumulate * config.microbatch, config.sequence_len), "int32"))
    clock = time.perf_counter()
    with compiled_kernels():
        lowered = train.make_train_step(config).lower(jax.tree.map(at, train.state_template(config)), batch, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = next((line.strip() for line in str(e).splitlines() if "Used" in line), "out of memory")
        raise UserError(f"does not fit: {said}") from None
    memory = compiled.memory_analysis()
    return dict(compiled=compiled, seconds=time.perf_counter() - clock, peak=memory.peak_memory_in_bytes,
                arguments=memory.argument_size_in_bytes, temporary=memory.temp_size_in_bytes)
