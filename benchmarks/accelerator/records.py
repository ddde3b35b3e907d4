"""Lines of results: read, appended at once, and what they say of the machine. Needs no JAX."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess

from protojax import files

ROOT = pathlib.Path(__file__).parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch")


class Lines:
  """lines.jsonl of a state, with a copy in the folder that is taken home.

  Args:
    state: folder that outlives a call.
    out: folder that gets every line, those of earlier calls too.
    known: further files of lines, from another state.
    rehearsal: whose lines count for `status`; the others are kept.
  """

  def __init__(self, state: pathlib.Path, out: pathlib.Path, known=(), rehearsal: bool = False):
    self._paths = list(dict.fromkeys(f.resolve() / "lines.jsonl" for f in (state, out)))
    self._rehearsal, self._status = rehearsal, {}
    # A line that is in several files counts once, at its first place.
    found = {json.dumps(line): line for path in (*known, *self._paths) for line in read(path)}
    for line in found.values():
      self._note(line)
    for path in self._paths:  # also mends a line that a kill has torn
      files.write(path, "".join(text + "\n" for text in found))

  def _note(self, line: dict) -> None:
    if line["rehearsal"] == self._rehearsal:
      self._status[line["item"]] = line["status"]

  def status(self, item: str) -> str | None:
    """That of the item's latest line."""
    return self._status.get(item)

  def append(self, line: dict) -> None:
    """Adds a line to both files, on the disk when this returns."""
    self._note(line)
    for path in self._paths:
      with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: pathlib.Path) -> list[dict]:
  """The lines of a file that may be missing, or torn at its end."""
  return files.json_lines(path)[0] if path.exists() else []


def read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text())


def commit() -> str:
  """Short hash of the code, with "+" where the tree differs from it; "unknown" without git."""

  def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

  if not shutil.which("git") or not (head := git("rev-parse", "--short", "HEAD")):
    return "unknown"
  return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def machine() -> dict:
  """{"card", "driver", "card_memory", "versions", "cpus"}; no card where there is no nvidia-smi."""
  card = driver = memory = None
  if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(subprocess.TimeoutExpired):
      done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
      if done.returncode == 0 and done.stdout.strip():
        card, driver, memory = (part.strip() for part in done.stdout.splitlines()[0].split(","))
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "card": card,
    "driver": driver,
    "card_memory": memory,
    "versions": versions,
    "cpus": os.cpu_count(),
  }
