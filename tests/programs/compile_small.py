"""Compiles a small model for TPUs that are not here and prints what preflight says, a JSON a line. Argument: its Config."""

import json
import sys

from lib.config import Config
from lib.files import UserError
from lib.preflight import compile as preflight

small = Config(**json.loads(sys.argv[1]))
for topology in ("v99:1x1", "v6e:3x3"):
    try:
        preflight.tpu_device(topology)
    except UserError as e:
        print(json.dumps(str(e)))
print(json.dumps(preflight.inspect(small, "v6e-4", "zero", cache=None)))
huge = small.replace(microbatch=65536, total_batch_size=65536 * 256)
print(json.dumps(preflight.inspect(huge, "v6e-1", cache=None)))
chip = preflight.tpu_device("v6e:1x1")
print(json.dumps(preflight.compile_decode(small, chip, 2, 256)))
devices = [len(preflight.tpu_devices(name)) for name in ("v4:2x2x1", "v5p:2x2x1")]
print(json.dumps([preflight.tpu_device("v4:2x2x1").num_cores, *devices]))
