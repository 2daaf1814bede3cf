"""What a policy is and where it comes from: base, adapter, precision, sharding."""

import logging

# Without the package `kernels` bitsandbytes takes another path on some CPUs, and words that like an error. This room is
# imported before bitsandbytes is.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
