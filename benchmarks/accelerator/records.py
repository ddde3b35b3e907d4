"""Lines of results: read, appended at once, and what they say of the machine. Needs no JAX."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch")


class Lines:
  """lines.jsonl of a state, with a copy in the folder that is taken home.

  Args:
    state: folder that outlives a call.
    out: folder that gets every line, those of earlier calls too.
  """

  def __init__(self, state: pathlib.Path, out: pathlib.Path):
    self._paths = list(dict.fromkeys(f.resolve() / "lines.jsonl" for f in (state, out)))
    for path in self._paths:
      path.parent.mkdir(parents=True, exist_ok=True)
    found = read(self._paths[0])
    self._status = {line["item"]: line["status"] for line in found}
    for path in self._paths:  # also mends a line that a kill has torn
      write(path, "".join(json.dumps(line) + "\n" for line in found))

  def status(self, item: str) -> str | None:
    """That of the item's latest line."""
    return self._status.get(item)

  def append(self, line: dict) -> None:
    """Adds a line to both files, on the disk when this returns."""
    self._status[line["item"]] = line["status"]
    for path in self._paths:
      with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: pathlib.Path) -> list[dict]:
  """The whole lines of a file that may be missing, or torn at its end."""
  lines = []
  for text in path.read_text().splitlines() if path.exists() else ():
    try:
      lines.append(json.loads(text))
    except ValueError:
      continue
  return lines


def write(path: pathlib.Path, text: str) -> None:
  """Whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  os.replace(temporary, path)


def write_json(path: pathlib.Path, content: dict) -> None:
  write(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


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
  """{"card", "driver", "card_mib", "versions", "started"}; no card where there is no nvidia-smi."""
  card = driver = memory = None
  if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout.strip():
      card, driver, memory = (part.strip() for part in done.stdout.splitlines()[0].split(","))
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "card": card, "driver": driver, "card_memory": memory, "versions": versions,
    "cpus": os.cpu_count(), "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
  }  # fmt: skip
