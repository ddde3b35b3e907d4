"""Where compiled programs are kept."""

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


@pytest.mark.parametrize("case", ["cpu", "variable", "config", "read only"])
def test_nothing_is_kept_where_it_is_not_wanted_or_cannot_be(unset, monkeypatch, case):
  expected = None
  if case == "cpu":
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  elif case == "variable":
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  elif case == "config":
    expected = str(unset / "mine")
    jax.config.update("jax_compilation_cache_dir", expected)
  else:
    unset.write_text("a file")
  environment.keep_compiled()
  assert jax.config.jax_compilation_cache_dir == expected
  assert not (unset / "protojax").exists()
