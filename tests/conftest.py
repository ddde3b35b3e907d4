"""Eight CPU devices, strict promotion, warnings as errors: set before JAX starts."""

import functools
import gc
import importlib.metadata
import itertools
import os
import pathlib
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs that tests start say one line each; XLA would add remarks on reading its own cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs of tests compile for seconds and run for milliseconds: XLA leaves most optimisations out,
# here and in the programs that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older code generator compiles a training step three times as fast, for here and for the
# programs that tests start. At the floor alone: XLA ends a process whose flag it does not know, as
# that of jax 0.11 does.
_AT_FLOOR = importlib.metadata.version("jax").startswith("0.10.")
if _AT_FLOOR:
  os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
  )

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from jax._src.interpreters import mlir

from protojax import api

# Tracing makes objects by the million; collecting after every 700 is a tenth of the suite's time.
gc.set_threshold(100_000, 20, 20)
# JAX makes a context of its compiler anew for each of the suite's 12,000 programs. Most are one
# operation, of whose 9 ms this takes 4.
if _AT_FLOOR:
  mlir.make_ir_context = functools.cache(mlir.make_ir_context)
# Python 3.11 ends `asyncio.run`, of which orbax makes two a checkpoint read, by printing all that
# was read into a message that nobody sees, unless the handler of Ctrl-C is another than its own.
signal.signal(signal.SIGINT, lambda *caught: signal.default_int_handler(*caught))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# grain reads an absl flag when it starts its workers.
flags.FLAGS.mark_as_parsed()


_tests = itertools.count()


def pytest_sessionfinish():
  """What is left goes with the process; pytest would look through all of it five times."""
  gc.freeze()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
  """The workdir of `tiny.run_config()`, trained to its end; to be copied, not changed.

  For tests of the xdist_group "train", which one worker runs: it is trained once.
  """
  folder = tmp_path_factory.mktemp("finished") / "run"
  api.train(tiny.run_config(), str(folder))
  return folder


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request):
  """A module's `_RNG` starts anew in every test: workers divide the tests as it comes."""
  rng = getattr(request.module, "_RNG", None)
  if rng is not None:
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(autouse=True)
def few_memory_maps():
  """Drops compiled programs before the process runs out of memory maps (65,530 in Linux).

  Each holds several; LLVM aborts the process when it gets no more.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  # Now and then: reading tens of thousands takes longer than many a test.
  if next(_tests) % 5 == 0 and maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
    jax.clear_caches()
    gc.collect()
