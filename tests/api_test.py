"""What `import protojax` offers: every name, its module, and none of it before it is used."""

import importlib.resources
import subprocess
import sys
import types

import pytest

import protojax

_PUBLIC = {
  "config": "protojax.config",
  "data": "protojax.data",
  "diagnose": "protojax.api",
  "errors": "protojax.errors",
  "load": "protojax.loading",
  "losses": "protojax.losses",
  "methods": "protojax.methods",
  "metrics": "protojax.metrics",
  "mixture": "protojax.prototypes.mixture",
  "online_em": "protojax.prototypes.mixture",
  "prototypes": "protojax.prototypes",
  "recipes": "protojax.recipes",
  "resolving": "protojax.resolving",
  "schedules": "protojax.schedules",
  "train": "protojax.api",
}
_INSIDE = {
  "config": ("default", "debug"),
  "data": ("build", "Source"),
  "errors": ("UserError",),
  "losses": ("cross_view_entropy", "koleo"),
  "methods": ("Method", "LossOut", "Variables", "load"),
  "metrics": ("summary", "verdict"),
  "mixture": ("MixtureState", "weights", "center", "log_posterior", "online_em"),
  "prototypes": ("assignment", "kmeans", "mixture", "prototype_set"),
  "resolving": ("check", "resolve"),
}


@pytest.mark.parametrize(("name", "module"), _PUBLIC.items())
def test_a_public_name_is_what_its_module_has(name, module):
  found = getattr(protojax, name)
  if isinstance(found, types.ModuleType):
    assert found.__name__ == module
  else:
    assert found.__module__ == module and found.__name__ == name and found.__doc__


@pytest.mark.parametrize(("module", "names"), _INSIDE.items())
def test_public_modules_have_what_programs_use(module, names):
  found = getattr(protojax, module)
  assert [name for name in names if not hasattr(found, name)] == []


def test_the_list_of_public_names_is_whole_and_shown():
  assert sorted(_PUBLIC) == protojax.__all__
  assert set(protojax.__all__) <= set(dir(protojax))
  assert not hasattr(protojax, "nothing_of_the_kind")


def test_import_is_free_until_something_is_used():
  """Beside Python's own modules it loads nothing but itself: neither JAX nor NumPy."""
  code = """
import sys, time
before, start = set(sys.modules), time.perf_counter()
import protojax
took, new = time.perf_counter() - start, set(sys.modules) - before
foreign = {name for name in new if name.partition(".")[0] not in sys.stdlib_module_names}
assert dir(protojax) and foreign == {"protojax"}, sorted(foreign)
from protojax import errors, losses
assert "jax" in sys.modules
print(took)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 1.0  # a hundredth of that when nothing else runs


def test_types_are_shipped():
  assert (importlib.resources.files("protojax") / "py.typed").is_file()
