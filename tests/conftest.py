"""Eight CPU devices, strict promotion, warnings as errors: set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# grain reads an absl flag when it starts its workers.
flags.FLAGS.mark_as_parsed()
