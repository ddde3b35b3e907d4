"""One run at a time in a workdir, on one machine or on several that share a file system.

Who trains there has `lock.json` in it: host, process, since when. Its time is renewed every `BEAT`
seconds by a thread of process 0, and it is deleted at the end. A lock that a killed run has left
does not stay in the way: on the same machine it is seen that the process is gone, on another that
the file's time does not change for `STALE` seconds. No two clocks are compared, and no lock of the
operating system is asked, which not every network file system has.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from protojax import errors, files, progress
from protojax.training import agreement, checkpoint

NAME = "lock.json"
BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one, after which a run on another machine counts as gone
SHARED = 60.0  # seconds after which a network file system shows everybody a new file
_POLL = 1.0


def _machine() -> list[str]:
  """What two processes share that can see each other: host, boot and namespace of processes."""
  found = [socket.gethostname()]
  with contextlib.suppress(OSError):
    found.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    found.append(os.readlink("/proc/self/ns/pid"))
  return found


def _begun(pid: int) -> str | None:
  """When a process of this machine began, in ticks of its kernel.

  "" where that cannot be known, as without /proc; None if the process has ended.
  """
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except OSError:  # somebody else's
    pass
  try:
    # PID (NAME) STATE ...; the name may hold anything.
    state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return None if state in "ZX" else rest[18]


def _said(text: bytes) -> dict[str, Any]:
  """What a lock says; {} of one that is torn."""
  with contextlib.suppress(ValueError):
    said = files.parse_json(text)
    return said if isinstance(said, dict) else {}
  return {}


def _read(path: pathlib.Path) -> tuple[dict[str, Any], int] | None:
  """What a lock says, {} if that cannot be read, and its time in ns; None if there is none."""
  try:
    with open(path, "rb") as file:  # a network file system looks anew when it is opened
      time_ns = os.fstat(file.fileno()).st_mtime_ns
      text = file.read(1 << 16)
  except FileNotFoundError:
    return None
  return _said(text), time_ns


def _owner(path: pathlib.Path) -> str | None:
  """Whose a lock is; None if there is none."""
  found = _read(path)
  return None if found is None else str(found[0].get("token"))


def _is_of(path: pathlib.Path, token: str | None) -> bool:
  """Whether a lock that can be read is this one's."""
  with contextlib.suppress(OSError):
    return _owner(path) == token
  return False


class _Lock:
  """What `held` does on process 0."""

  def __init__(self, folder: pathlib.Path):
    self.path = folder / NAME
    self.token = secrets.token_hex(8)
    pid = os.getpid()
    self._mine = {
      "host": socket.gethostname(),
      "machine": _machine(),
      "pid": pid,
      "began": _begun(pid),
      "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
      "token": self.token,
    }
    self._seen: tuple | None = None  # the lock of another run, and when it last changed
    self._changed = 0.0
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True, name="protojax-lock")

  def take(self) -> str | None:
    """Tries once: None when the lock is this run's, else what is in the way, a word and a line.

    "wait LINE" where that may be a run that was killed, "held LINE" where it is at work.
    """
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      for _ in range(10):  # others may take and leave it meanwhile
        if self._create():
          self._thread.start()
          return None
        if (other := _read(self.path)) is None:
          continue
        if (said := self._in_the_way(other)) is not None:
          return said
        self._remove(other)
    except OSError as error:
      what, advice = files.trouble(error) or (error.strerror, "mend it")
      return (
        f"held cannot write to workdir={self.path.parent}: {what}: {advice} or choose another "
        "workdir"
      )
    return f"wait {self.path} changes all the time"

  def _create(self) -> bool:
    try:
      descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
      return False
    with open(descriptor, "w", encoding="utf-8") as file:
      file.write(json.dumps(self._mine, indent=2) + "\n")
    return True

  def _in_the_way(self, other: tuple[dict[str, Any], int]) -> str | None:
    """None of a lock whose run is gone."""
    said, now = other[0], time.monotonic()
    pid = said.get("pid")
    who = f"process {pid} on {said.get('host')}, since {said.get('since')}"
    use = f"held workdir={self.path.parent} is in use by another run, {who}"
    advice = "wait for its end, end it, or choose another workdir"
    if said.get("machine") == self._mine["machine"] and isinstance(pid, int) and pid > 0:
      if _begun(pid) in ("", said.get("began")):
        return f"{use}: {advice}"
      logging.info("%s had this workdir and is gone: its lock is taken over", who)
      return None
    if self._seen is None or self._seen[0].get("token") != said.get("token"):
      self._seen, self._changed = other, now
    if self._seen != other:
      return f"{use}, with a sign of life this minute: {advice}"
    if now - self._changed < STALE:
      return (
        f"wait {who}, has {self.path} and may be gone: waiting up to {STALE:.0f} s for a sign of "
        "life, then going on in its place; if you know that it is gone, delete that file"
      )
    logging.info("no sign of life of %s, for %.0f s: its lock is taken over", who, STALE)
    return None

  def _remove(self, other: tuple[dict[str, Any], int]) -> None:
    """Deletes the lock of a run that is gone, but not one that was taken since it was read."""
    aside = self.path.with_name(f"{NAME}.{self.token}")
    with contextlib.suppress(FileNotFoundError):
      os.rename(self.path, aside)
      if _said(aside.read_bytes()).get("token") != other[0].get("token"):
        with contextlib.suppress(OSError):  # its owner has made it again
          os.link(aside, self.path)
      aside.unlink()

  def _renew(self) -> None:
    while not self._end.wait(BEAT):
      with contextlib.suppress(OSError):  # the next time
        owner = _owner(self.path)
        if owner == self.token:
          os.utime(self.path)
        elif owner is None:
          self._create()
        else:
          self._lost()

  def _lost(self) -> None:
    """Ends this process at once: another run writes here now."""
    if self._end.is_set():
      return
    progress.end()
    progress.write(
      f"protojax: another run has {self.path.parent} now, because this one showed no sign of life "
      f"for {STALE:.0f} s (a machine or a file system that stood still): look at that one's log"
    )
    os._exit(2)

  def leave(self) -> None:
    self._end.set()
    if self._thread.is_alive():
      self._thread.join(2 * BEAT)  # one that waits for a dead file system is not waited for
    with contextlib.suppress(OSError):
      if _owner(self.path) == self.token:
        self.path.unlink()


def _require_one_folder(folder: pathlib.Path, lock: _Lock | None) -> None:
  """Refuses, in every process, a workdir that is another folder to one of them."""
  if jax.process_count() == 1:
    return
  token = checkpoint.of_first(lambda: lock.token if lock else None)
  limit = time.monotonic() + SHARED
  while not (seen := _is_of(folder / NAME, token)) and time.monotonic() < limit:
    time.sleep(_POLL)
  found = agreement.first_to_say("" if seen else f"on {socket.gethostname()}: {folder / NAME}")
  if found is not None:
    raise errors.UserError(
      f"process {found[0]} does not see the lock that process 0 has written, {found[1]}: workdir "
      "must be one folder for all processes, on a file system that they share"
    )


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
  """The workdir is this run's alone; made if missing. Every process of the run calls it.

  Where a killed run on another machine has left its lock, waits for `STALE` seconds, with a line.

  Args:
    folder: from `workdir.place`.

  Raises:
    UserError: if another run is at work there, nothing can be written, or the folder is not the
      same to all processes.
  """
  lock = _Lock(folder) if jax.process_index() == 0 else None
  waiting = False
  try:
    # Each look is an exchange between the processes, which breaks off where one waits too long.
    while said := checkpoint.of_first(lock.take if lock else lambda: None):
      word, _, line = said.partition(" ")
      if word == "held":
        raise errors.UserError(line)
      if not waiting:
        logging.info("%s", line)
      waiting = True
      time.sleep(_POLL)
    _require_one_folder(folder, lock)
    yield
  finally:
    if lock:
      lock.leave()
