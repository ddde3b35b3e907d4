"""Several processes of one run: all there before it starts, and none lost without a word.

JAX alone ends the others in a native crash, minutes later and without the name of the one that is
missing. Here every process has a connection to process 0, made by a roll call on the coordinator's
port before JAX listens there. Over it they tell each other twice a second that they live. A
connection that breaks or falls silent ends all processes in the same line, with a status of its
own, `errors.LOST`.
"""

import atexit
import contextlib
import errno
import os
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from absl import logging

from protojax import errors, progress

_BEAT = 0.5  # seconds between two signs of life
_GRACE = 3.0  # seconds for a process to end by itself, of the mistake that others end of too
_HELLO = "protojax"  # NUMBER OF PROCESSES, INDEX, HOST
_HELLO_LINE = re.compile(rf"{_HELLO} (\d+) (\d+) (\S+)\n")
# How a broken exchange between devices reads; what else goes wrong is a fault of this process.
_BROKEN = re.compile(r"Gloo|NCCL|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|[Bb]arrier|collective")


class _Link:
  """A connection to another process: lines of text that never wait for anybody.

  Args:
    connection: taken over.
    host: where the other one is.
  """

  def __init__(self, connection: socket.socket, host: str):
    self.connection, self.host = connection, host
    self.heard = time.monotonic()
    self.done = False  # it has said that it ends
    self._rest = b""
    connection.setblocking(False)

  def fileno(self) -> int:
    return self.connection.fileno()

  def tell(self, line: str) -> None:
    with contextlib.suppress(OSError):  # full or broken: it will be found silent
      self.connection.send(f"{line}\n".encode())

  def lines(self) -> list[str] | None:
    """The lines that have come; None once the connection is broken."""
    try:
      data = self.connection.recv(1 << 16)
    except BlockingIOError:
      return []
    except OSError:
      return None
    if not data:
      return None
    self.heard = time.monotonic()
    *whole, self._rest = (self._rest + data).split(b"\n")
    return [line.decode(errors="replace") for line in whole]


class Hosts:
  """The other processes of a run, watched by a thread.

  Args:
    index: of this process.
    links: {index of another process: connection}: process 0 has all, the others that to 0.
    timeout: seconds of silence after which a process is lost.
    intact: says which checkpoint there is, when one is lost.
  """

  def __init__(
    self, index: int, links: dict[int, _Link], *, timeout: float, intact: Callable[[], str]
  ):
    self._index, self._links = index, links
    self._timeout, self._intact = timeout, intact
    self._thread = threading.Thread(target=self._watch, daemon=True, name="protojax-hosts")
    self._thread.start()

  def _watch(self) -> None:
    last, poll = time.monotonic(), select.poll()
    for link in self._links.values():
      poll.register(link, select.POLLIN)
    while True:
      ready = {descriptor for descriptor, _ in poll.poll(1000 * _BEAT)}
      now = time.monotonic()
      if now - last > 4 * _BEAT:  # this process stood still: what it missed is nobody's fault
        for link in self._links.values():
          link.heard += now - last
      last = now
      for index, link in [*self._links.items()]:
        come = link.fileno() in ready
        if come and (lines := link.lines()) is not None:
          for line in lines:
            self._take(index, link, line)
        elif come:
          poll.unregister(link)
          del self._links[index]
          if not link.done:
            self._lose(index, link, "is gone: killed, or its machine went down")
        elif now - link.heard > self._timeout and not link.done:
          self._lose(index, link, f"has not been heard of for {now - link.heard:.0f} s")
        link.tell("lives")

  def _take(self, index: int, link: _Link, line: str) -> None:
    word, _, rest = line.partition(" ")
    if word == "done":
      link.done = True
    elif word == "failed":  # STATUS TEXT
      link.done = True
      status, _, text = rest.partition(" ")
      self._leave(int(status), f"process {index} on {link.host} has ended: {text}", _GRACE)
    elif word == "leave":
      status, _, text = rest.partition(" ")
      self._leave(int(status), text, _GRACE if int(status) != errors.LOST else 0)

  def _lose(self, index: int, link: _Link, what: str) -> None:
    self._leave(
      errors.LOST,
      f"process {index} on {link.host} {what}. Start the same command on all hosts again: "
      f"{self._intact()}",
    )

  def _leave(self, status: int, text: str, grace: float = 0.0) -> None:
    """Ends this process, and by process 0 all others, in a line."""
    if self._index == 0:
      for link in self._links.values():
        link.tell(f"leave {status} {text}")
    time.sleep(max(grace, 2 * _BEAT))  # process 0 must be read before its connections close
    with contextlib.suppress(OSError):
      progress.end()
      progress.write(f"protojax: {text}")
    os._exit(status)

  def broken(self, error: BaseException) -> None:
    """Returns only if `error` is no other process's fault; waits for the name of the lost one."""
    if _BROKEN.search(f"{type(error).__name__} {error}"):
      self._thread.join(self._timeout + 2 * _GRACE)

  def failed(self, status: int, text: str) -> None:
    """Tells the others that this process ends, and why; it then ends without waiting for them."""
    line = " ".join(text.split())
    for link in self._links.values():
      link.tell(
        f"failed {status} {line}" if self._index else f"leave {status} process 0 has ended: {line}"
      )
    time.sleep(2 * _BEAT)  # read, before the connections close
    atexit.register(_end, status)  # JAX would wait for the others, minutes, and crash

  def done(self) -> None:
    """Tells the others that this process ends as it should."""
    for link in self._links.values():
      link.tell("done")


@contextlib.contextmanager
def told(others: Hosts | None) -> Iterator[None]:
  """Around a run: however it ends here, the others know; None where there are none."""
  if others is None:
    yield
    return
  try:
    yield
  except errors.Interrupted:  # all of them, at the same step
    others.done()
    raise
  except errors.UserError as error:
    others.failed(2, str(error))
    raise
  except errors.Missing as error:
    others.failed(errors.LOST, str(error))
    raise
  except KeyboardInterrupt:
    others.failed(130, "interrupted")
    raise
  except Exception as error:
    others.broken(error)
    if "DEADLINE_EXCEEDED" in str(error):  # all live, one was too slow
      line = (
        "the processes of this run did not meet in the time that JAX gives them "
        f"({errors.in_line(error, 200)}): start it again"
      )
      others.failed(errors.LOST, line)
      raise errors.Missing(line) from error
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    others.failed(2 if full else 1, f"{type(error).__name__}: {error}")
    raise
  others.done()


def _end(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def join(
  address: str,
  count: int,
  index: int,
  *,
  start_timeout: float,
  timeout: float,
  intact: Callable[[], str],
) -> Hosts:
  """The roll call: returns when all processes are there.

  Args:
    address: host:port of process 0, free until JAX's coordinator listens there.
    count: of processes.
    index: of this one.
    start_timeout: seconds to wait for the others.
    timeout: see `Hosts`.
    intact: see `Hosts`.

  Raises:
    UserError: if the address cannot be used, or two processes have the same index.
    errors.Missing: if not all are there in time.
  """
  host, _, port = address.rpartition(":")
  host = host.strip("[]")
  if not port.isdigit() or not host:
    raise errors.UserError(f"coordinator_address={address}: give host:port")
  limit = time.monotonic() + start_timeout
  if index == 0:
    links = _called(int(port), count, limit, start_timeout)
  else:
    links = {0: _answer(host, int(port), count, index, limit, start_timeout)}
  return Hosts(index, links, timeout=timeout, intact=intact)


def _listener(port: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except OSError as error:
    raise errors.UserError(
      f"coordinator_address: port {port} cannot be used ({error.strerror}): end what uses it, "
      "such as a former run, or choose another"
    ) from None


def _called(port: int, count: int, limit: float, seconds: float) -> dict[int, _Link]:
  """Process 0's part of the roll call: {index: link} of all others."""
  links: dict[int, _Link] = {}
  said = time.monotonic() + 15.0
  with _listener(port) as listener:
    listener.settimeout(0.5)
    while len(links) < count - 1:
      missing = [i for i in range(1, count) if i not in links]
      names = f"process {', '.join(map(str, missing))}"
      if time.monotonic() > said:
        logging.info("waiting for %s of %d", names, count)
        said = limit
      if time.monotonic() > limit:
        text = (
          f"{names} of {count} did not come within {seconds:.0f} s: look why it did not start, "
          f"and whether its host reaches port {port} of this one ({socket.gethostname()})"
        )
        _dismiss(links.values(), errors.LOST, text)
        raise errors.Missing(text)
      with contextlib.suppress(OSError):  # nobody came, or went away again
        connection, _ = listener.accept()
        links = {i: link for i, link in links.items() if link.lines() is not None}
        connection.settimeout(5.0)
        hello = _HELLO_LINE.fullmatch(connection.makefile("r").readline())
        if hello is None:  # whoever looks for open ports
          continue
        others, index, host = int(hello[1]), int(hello[2]), hello[3]
        new = _Link(connection, host)
        text = ""
        if others != count:
          text = f"num_processes={others} on {host} and {count} on process 0: give all the same"
        elif index in links:
          text = f"two processes say that they are process {index}: give each its own process_id"
        if text:
          _dismiss([*links.values(), new], 2, text)
          raise errors.UserError(text)
        links[index] = new
  for link in links.values():
    link.tell(f"start {socket.gethostname()}")
    link.heard = time.monotonic()
  return links


def _dismiss(links: Iterable[_Link], status: int, text: str) -> None:
  for link in links:
    link.tell(f"leave {status} {text}")
  time.sleep(_BEAT)


def _answer(host: str, port: int, count: int, index: int, limit: float, seconds: float) -> _Link:
  """The part of the others."""
  why = "no connection"
  while (left := limit - time.monotonic()) > 0:
    try:
      connection = socket.create_connection((host, port), timeout=min(5.0, left))
      connection.sendall(f"{_HELLO} {count} {index} {socket.gethostname()}\n".encode())
      connection.settimeout(left + 2 * _GRACE)  # process 0 came first and gives up first
      # One byte at a time: what follows the line is the watch's.
      line = b""
      while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
          raise ConnectionError("it closed the connection")
        line += byte
      word, _, rest = line.decode(errors="replace").strip().partition(" ")
      if word == "start":
        return _Link(connection, rest)
      if word == "leave":
        status, _, text = rest.partition(" ")
        raise errors.Missing(text) if int(status) == errors.LOST else errors.UserError(text)
      why = "something else answers there"
    except OSError as error:
      why = str(error.strerror or error)
    time.sleep(0.5)
  raise errors.Missing(
    f"process 0 at {host}:{port} did not come within {seconds:.0f} s ({why}): look why it did "
    "not start, and whether this host reaches that port"
  )


def through_relay(address: str) -> str:
  """An address of this machine that leads to JAX's coordinator, and never hangs up.

  JAX aborts a process whose connection to the coordinator breaks, before anybody can say why. This
  one stays open when process 0 is gone. Where there are no abstract sockets, `address` itself.
  """
  if sys.platform != "linux":
    return address
  host, _, port = address.rpartition(":")
  name = f"protojax-{os.getpid()}-{port}"
  listener = socket.socket(socket.AF_UNIX)
  listener.bind(f"\0{name}")
  listener.listen()

  def connect(near: socket.socket) -> None:
    while True:
      try:
        far = socket.create_connection((host.strip("[]"), int(port)))
        break
      except OSError:  # not listening yet
        time.sleep(0.2)
    threading.Thread(target=_pump, args=(far, near), daemon=True).start()
    _pump(near, far)
    far.close()

  def serve() -> None:
    while True:
      near, _ = listener.accept()
      threading.Thread(target=connect, args=(near,), daemon=True).start()

  threading.Thread(target=serve, daemon=True, name="protojax-relay").start()
  return f"unix-abstract:{name}"


def _pump(source: socket.socket, sink: socket.socket) -> None:
  """Copies until one end is closed, and then leaves the other open."""
  with contextlib.suppress(OSError):
    while data := source.recv(1 << 16):
      sink.sendall(data)
