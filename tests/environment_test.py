"""What is kept between steps and runs: memory, compiled programs."""

import platform
import subprocess
import sys

import jax
import pytest

from protojax import environment


@pytest.fixture
def unset(monkeypatch, tmp_path):
  """A user who has said nothing, at an accelerator; the folder of their cache."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  yield tmp_path / "cache"
  jax.config.update("jax_compilation_cache_dir", before)


def test_programs_for_accelerators_are_kept_in_a_folder_of_the_users_own(unset):
  environment.keep_compiled()
  folder = unset / "protojax" / "xla"
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("case", ["cpu", "variable", "config", "read only", "GPUs of several"])
def test_nothing_is_kept_where_it_is_not_wanted_or_cannot_be(unset, monkeypatch, case):
  expected = None
  if case == "cpu":
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  elif case == "variable":
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  elif case == "config":
    expected = str(unset / "mine")
    jax.config.update("jax_compilation_cache_dir", expected)
  elif case == "GPUs of several":
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
  else:
    unset.write_text("a file")
  environment.keep_compiled()
  assert jax.config.jax_compilation_cache_dir == expected
  assert not (unset / "protojax").exists()


_FAULTS = """
import resource
from protojax import environment
environment.keep_memory()
import jax, jax.numpy as jnp
x = jnp.ones((4096, 64))
step = jax.jit(lambda x: (x @ x.T) @ x)  # 64 MiB between the two products
faults = []
for _ in range(8):
  step(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(faults, faults[1:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_on_a_cpu_finds_the_memory_of_the_one_before_it():
  """Not always: a piece between two others may be a little too short."""
  done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
  assert int(done.stdout) < 1_000  # pages of 4 KiB; 64 MiB are 16,384


def test_memory_is_left_as_it_is_beside_an_accelerator(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(environment.ctypes, "CDLL", lambda *_: pytest.fail("asked glibc"))
  environment.keep_memory()
