"""Compiles a model for several slices and strategies, a JSON a line. Arguments: its Config, [slice, strategy] pairs."""

import json
import sys

from lib.chips import tpu_slice
from lib.config import Config
from lib.preflight import compile as preflight

fields, pairs = map(json.loads, sys.argv[1:])
for name, strategy in pairs:
    n = tpu_slice(name).chips
    config = Config(**fields, microbatch=n, total_batch_size=256 * n)
    print(json.dumps(preflight.inspect(config, name, strategy, cache=None)))
