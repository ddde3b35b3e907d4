"""Makes the most of a short time on an accelerator: works through a list, loses nothing.

  python -m benchmarks.accelerator --out=FOLDER --minutes=9 [--state=FOLDER2]
  python -m benchmarks.accelerator --collect FOLDER

Every item of the list (`items.py`) is a line of lines.jsonl the moment it is done. A later call
with the same --state goes on where this one ended: what is done is not done again, what failed
stays failed (--retry tries it again), what the clock cut goes on from its own checkpoint. Items
that are timed have a process each; the others share one a part, for starting costs seconds, and
where one takes the process along the next goes on in a new one. --out gets all lines, those of
earlier calls too. --collect makes docs/results/accelerator.md, its figures and the README's section
of the lines in FOLDER.
"""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent import futures

from absl import logging

from benchmarks.accelerator import items, records
from protojax import errors, files

# Seconds that an item gets between being asked to stop and being killed: a step, a checkpoint, or
# the end of an evaluation.
_GRACE = 20
# Starting JAX and tracing a step take this long; with less left nothing is begun.
_LEAST = 40
# Until a training has begun and can be gone on with: images decoded, floors, a step compiled.
_FIRST_CHECKPOINT = 120


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.accelerator",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--out", type=pathlib.Path, help="folder that gets lines.jsonl")
  parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing runs")
  parser.add_argument("--state", type=pathlib.Path, help="runs and caches; default: --out")
  parser.add_argument(
    "--known",
    nargs="*",
    default=[],
    type=pathlib.Path,
    metavar="LINES",
    help="lines.jsonl of earlier calls whose state is gone: what they have done is not done again",
  )
  parser.add_argument("--only", nargs="*", default=[], metavar="PREFIX", help="items so named")
  parser.add_argument("--retry", action="store_true", help="what failed before, too")
  parser.add_argument("--rehearse", action="store_true", help="tiny nets, two steps, any machine")
  parser.add_argument("--jobs", type=int, default=1, help="processes at a time; to rehearse")
  parser.add_argument("--commit", help="of the code; default: what git says")
  parser.add_argument("--data_dir", default=os.environ.get("PROTOJAX_DATA_DIR"))
  parser.add_argument("--list", action="store_true", help="print the items and end")
  parser.add_argument("--collect", type=pathlib.Path, metavar="FOLDER")
  parser.add_argument("--store_parity", action="store_true", help="write parity.json, on a CPU")
  parser.add_argument("--items", nargs="+", help=argparse.SUPPRESS)  # what a process is told
  return parser


def main(argv: list[str]) -> int:
  parser = _parser()
  arguments = parser.parse_args(argv)
  if arguments.collect:
    from benchmarks.accelerator import collect

    print(collect.write(arguments.collect, rehearsal=arguments.rehearse))
  elif arguments.store_parity:
    from benchmarks.accelerator import parity

    parity.store()
  elif arguments.list:
    for item in items.ITEMS:
      print(f"{item.name:<40} {item.work:<8} about {item.seconds} s")
  elif arguments.out is None:
    parser.error("--out is missing: python -m benchmarks.accelerator --out=results --minutes=9")
  elif arguments.minutes <= 0 or arguments.jobs < 1:
    parser.error(f"--minutes={arguments.minutes:g} and --jobs={arguments.jobs} must be above 0")
  elif arguments.jobs > 1 and not arguments.rehearse:
    parser.error(f"--jobs={arguments.jobs} would disturb what is timed: it is for --rehearse")
  elif arguments.items:
    _run_here(arguments)
  else:
    return _work_through(arguments, parser)
  return 0


def _run_here(arguments) -> None:
  """Items in this process; each leaves result.json or error.json in its folder.

  After an error that is not a mistake of ours the process ends: it may have left the device in a
  state in which nothing works any more. So it does after two rows with the same one.
  """
  logging.set_verbosity(logging.INFO)
  last_error = None
  for item in items.ITEMS:
    if item.name in arguments.items:
      folder = _folder(arguments.state.resolve(), item)
      (folder / "started").touch()
      try:
        result = items.run(
          item, folder=folder, data_dir=arguments.data_dir, rehearse=arguments.rehearse
        )
      except errors.Interrupted:
        sys.exit(143)
      except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"[:1000]
        end = _tail(traceback.format_exc())
        files.write_json(folder / "error.json", {"error": said, "log": end})
        if not isinstance(error, errors.UserError) or (item.work == "row" and said == last_error):
          sys.exit(1)
        last_error = said
      else:
        files.write_json(folder / "result.json", result)


def _tail(text: str) -> list[str]:
  """The end of a log, for its line."""
  return [line[:300] for line in text.strip().splitlines()[-60:]]


def _folder(state: pathlib.Path, item: items.Item) -> pathlib.Path:
  """STATE/part/what."""
  return state / item.name.replace(",", "").replace(" ", "_")


def _work_through(arguments, parser) -> int:
  """Every item that is left, in order, as long as there is time."""
  deadline = time.monotonic() + 60 * arguments.minutes
  state = arguments.state or arguments.out
  lines = records.Lines(state, arguments.out, arguments.known, arguments.rehearse)
  chosen = tuple(arguments.only) or ("",)
  wanted = [item for item in items.ITEMS if item.name.startswith(chosen)]
  if not wanted:
    parser.error(f"--only={' '.join(arguments.only)} names no item: --list shows all")
  over = {"done", "skipped"} | (set() if arguments.retry else {"failed"})

  # Whether the machine works is asked in every call: it may be another one.
  left = [i for i in wanted if i.work == "machine" or lines.status(i.name) not in over]
  data = pathlib.Path(arguments.data_dir or "")
  if any(item.work == "row" for item in left) and not (data / "cifar10").is_dir():
    parser.error(
      f"--data_dir={arguments.data_dir} holds no cifar10, prepared by TFDS: name the folder that "
      "does, or leave the training runs out with --only parity speed"
    )
  common = {
    **records.machine(),
    "commit": arguments.commit or records.commit(),
    "command": shlex.join(["python", "-m", "benchmarks.accelerator", *sys.argv[1:]]),
    "rehearsal": arguments.rehearse,
  }

  if common["card"] and not arguments.rehearse:  # JAX would go on without it, on the CPU
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
  last_error: dict[str, str] = {}
  given_up: set[str] = set()

  def report(item, line) -> None:
    part, error = _part(item), line.get("error")
    with writing:
      if item.work == "machine" and error:
        stop.asked = True
        print(f"the machine does not work: {error}", flush=True)
      elif error and item.work == "row" and last_error.get(part) == error:
        given_up.add(part)
        print(f"{part}: the same error twice, what else it has is left for another call")
      last_error[part] = error
      ended = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
      lines.append({"item": item.name, **line, **common, "ended": ended})
      print(f"{item.name}: {line['status']} after {line['seconds']:.0f} s", flush=True)

  def do(group) -> None:
    while group and not stop.asked and _fits(group[0], arguments, deadline):
      if _part(group[0]) in given_up:
        return
      group = _together(group, arguments, deadline, stop, report)

  writing = threading.Lock()
  with _Stoppable() as stop, futures.ThreadPoolExecutor(arguments.jobs) as pool:
    for done in [pool.submit(do, group) for group in _groups(left)]:
      done.result()
  if any(i.work == "machine" and lines.status(i.name) == "failed" for i in wanted):
    return 1
  left = [item for item in wanted if lines.status(item.name) not in over | {"failed"}]
  if left:
    print(f"the time is up: the same command goes on with {left[0].name}")
  else:
    print(f"every item has its line in {arguments.out / 'lines.jsonl'}")
  return 0


def _part(item: items.Item) -> str:
  return item.name.partition("/")[0]


def _groups(left: list[items.Item]) -> list[list[items.Item]]:
  """What shares a process: neighbours of one part, but for what is timed and has its peaks."""
  groups = []
  for item in left:
    alone = item.work in ("speed", "peer_speed")
    if groups and not alone and _part(groups[-1][0]) == _part(item):
      groups[-1].append(item)
    else:
      groups.append([item])
  return groups


def _fits(item, arguments, deadline) -> bool:
  """Whether it is worth beginning: what cannot go on later must come to its end now."""
  needed = max(_LEAST, item.seconds)
  if item.work == "row":
    begun = (_folder((arguments.state or arguments.out).resolve(), item) / "run").exists()
    needed = _LEAST if begun else _FIRST_CHECKPOINT
  if arguments.rehearse:
    needed = 2
  return deadline - time.monotonic() >= needed + _grace(arguments)


def _grace(arguments) -> float:
  return min(_GRACE, 10 * arguments.minutes)


class _Stoppable:
  """SIGTERM and Ctrl-C end what runs, in order, and then the list."""

  def __init__(self):
    self.asked, self.children = False, set()

  def __enter__(self):
    self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _ask(self, number, frame):
    del number, frame
    self.asked = True
    for child in tuple(self.children):
      child.terminate()

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)


def _together(group, arguments, deadline, stop, report) -> list[items.Item]:
  """Runs items in one process until it ends or the clock does.

  Args:
    group: the items, in order.
    arguments: the command line.
    deadline: of `time.monotonic`, after which nothing may run.
    stop: a `_Stoppable`.
    report: (item, {"status": "done", "failed", "skipped" or "cut", "seconds", "result" or "error"
      and "log"}), called the moment an item ends.

  Returns:
    What is left to do in another process; nothing once the clock has cut.
  """
  state = (arguments.state or arguments.out).resolve()
  if arguments.rehearse:
    state = state / "rehearsal"
  left, grace = list(group), _grace(arguments)
  for item in left:
    folder = _folder(state, item)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("started", "result.json", "error.json"):
      (folder / name).unlink(missing_ok=True)
  log = _folder(state, group[0]).parent / "log.txt"
  with open(log, "a") as output:
    # A group of its own: Ctrl-C reaches this process alone, and a kill reaches all of the child's.
    child = subprocess.Popen(
      _command(left, state, arguments),
      cwd=records.ROOT,
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
      env=_environment(state, arguments.rehearse),
      process_group=0,
    )
  stop.children.add(child)
  try:
    cut = _follow(child, left, state, deadline, grace, stop, report, log)
    _ends(child, 0.0 if cut else grace)  # the last item is done, only the interpreter is left
  finally:  # whatever happened here, nothing keeps the device
    stop.children.discard(child)
    if child.poll() is None:
      os.killpg(child.pid, signal.SIGKILL)
      _ends(child, grace)
  return [] if cut else left


def _follow(child, left, state, deadline, grace, stop, report, log) -> bool:
  """Reports items as they end, taking them out of `left`; whether clock or user has cut."""
  since, asked_at, first = time.monotonic(), None, left[0]
  while left:
    ended = child.poll() is not None  # before the look at the files: what it wrote last counts
    line = _left_by(_folder(state, left[0]))
    now = time.monotonic()
    if line is not None:
      report(left.pop(0), {**line, "seconds": round(now - since, 2)})
      since = now
    elif ended or (asked_at is not None and now > asked_at + grace):
      asked = asked_at is not None or stop.asked
      begun = left[0] is first or (_folder(state, left[0]) / "started").exists()
      if begun:
        line = {"status": "cut", "log": _read_tail(log)} if asked else _crashed(child, log)
        report(left.pop(0), {**line, "seconds": round(now - since, 2)})
      return asked
    elif left[0].work != "row" and now > since + _limit(left[0]):
      child.kill()
      if _ends(child, grace):
        said = f"took more than {_limit(left[0])} s"
        line = {"status": "failed", "error": said, "log": _read_tail(log)}
        report(left.pop(0), {**line, "seconds": round(now - since, 2)})
      return False
    elif asked_at is None and (stop.asked or now > deadline - grace):
      asked_at = now
      child.terminate()
    else:
      time.sleep(0.1)
  return asked_at is not None or stop.asked


def _limit(item: items.Item) -> float:
  """Seconds after which something that cannot go on later is taken to hang."""
  return max(240, 3 * item.seconds)


def _command(group, state: pathlib.Path, arguments) -> list[str]:
  data = arguments.data_dir
  return [
    sys.executable,
    "-m",
    "benchmarks.accelerator",
    f"--out={state}",
    f"--state={state}",
    *(["--rehearse"] if arguments.rehearse else []),
    *([f"--data_dir={pathlib.Path(data).resolve()}"] if data else []),
    "--items",
    *(item.name for item in group),
  ]


def _left_by(folder: pathlib.Path) -> dict | None:
  """The line of an item that has ended in order, well or not; None before."""
  if (folder / "result.json").exists():
    found = records.read_json(folder / "result.json")
    return {"status": "skipped" if "skipped" in found else "done", "result": found}
  if (folder / "error.json").exists():
    return {"status": "failed", **records.read_json(folder / "error.json")}
  return None


def _crashed(child: subprocess.Popen, log: pathlib.Path) -> dict:
  """The line of an item that took its process along."""
  said = f"the process ended with status {child.returncode}"
  return {"status": "failed", "error": said, "log": _read_tail(log)}


def _read_tail(log: pathlib.Path) -> list[str]:
  return _tail(log.read_text(errors="replace"))


def _ends(child: subprocess.Popen, seconds: float) -> bool:
  """Waits for a process, at most so long."""
  try:
    child.wait(timeout=max(0.0, seconds))
  except subprocess.TimeoutExpired:
    return False
  return True


def _environment(state: pathlib.Path, rehearse: bool) -> dict[str, str]:
  """What an item's process finds: caches that outlive it, all of the accelerator's memory."""
  environment = {
    "JAX_COMPILATION_CACHE_DIR": str(state / "xla_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(state / "inductor_cache"),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    "MPLBACKEND": "Agg",
    **os.environ,
  }
  if rehearse:
    environment |= {
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's remarks on reading its own cache
    }
  return environment


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
