"""A mistake is one line and status 2 in every program."""

import errno
import importlib.util
import io
import logging
import os
import signal
import subprocess
import sys
import zipfile

import jax
import pytest

import protojax
from protojax import __main__, cli, errors, loading, progress
from protojax.interop import tensor_files
from protojax.reports import record


def _outcome(capsys, call):
  with pytest.raises(SystemExit) as stopped:
    cli.guarded(call, [])
  return stopped.value.code, capsys.readouterr().err.splitlines()


def _raise(error):
  def call(argv):
    raise error

  return call


@pytest.mark.parametrize(
  ("error", "status", "line"),
  [
    (errors.UserError("k=0: choose 1"), 2, "protojax: k=0: choose 1"),
    (
      errors.Interrupted(7, signal.SIGINT),
      130,
      "protojax: stopped at step 7; run the same command (without --config.overwrite) to go on",
    ),
    (
      errors.Interrupted(7),
      143,
      "protojax: stopped at step 7; run the same command (without --config.overwrite) to go on",
    ),
    (
      OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
      2,
      "protojax: no space left on device for run/metrics.jsonl: free some space and run the same "
      "command again; what was written before is intact",
    ),
    (KeyboardInterrupt(), 130, "protojax: interrupted"),
    (errors.Missing("process 1 did not come"), 75, "protojax: process 1 did not come"),
  ],
)
def test_what_ends_a_program_is_one_line_with_its_status(capsys, monkeypatch, error, status, line):
  left = []
  monkeypatch.setattr(cli, "_at_once", None)
  monkeypatch.setattr(cli.os, "_exit", left.append)
  assert _outcome(capsys, _raise(error)) == (status, [line])
  cli._leave()  # as atexit does; after Ctrl-C XLA is not taken down
  assert left == [130] * isinstance(error, KeyboardInterrupt)


def test_a_program_whose_devices_are_at_work_ends_before_jax_is_taken_down(capsys, monkeypatch):
  registered, left = [], []
  monkeypatch.setattr(cli, "_at_once", None)
  monkeypatch.setattr(cli.atexit, "register", registered.append)
  monkeypatch.setattr(cli.os, "_exit", left.append)
  stop = errors.Interrupted(6, trained=True, broken_off=True)
  status, lines = _outcome(capsys, _raise(stop))
  assert status == 143 and "step 6, the last one: all steps are saved" in lines[0]
  registered[-1]()  # the last one registered is the first that is called
  assert left == [143] and len(registered) == 2


@pytest.mark.parametrize(
  ("said", "shown"),
  [
    (
      "lower config.optim.lr or use config.precision=float32",
      "lower --config.optim.lr or use --config.precision=float32",
    ),
    (
      "(config.monitor.stop_on_collapse=False goes on)",
      "(--config.monitor.stop_on_collapse=False goes on)",
    ),
    ("workdir=runs/a is a file", "--workdir=runs/a is a file"),
    ("heads=5 does not fit: give stem=cifar", "--heads=5 does not fit: give --stem=cifar"),
    (
      "give rows=prototypes or data=folder  data_dir=IMAGES",
      "give --rows=prototypes or --data=folder  --data_dir=IMAGES",
    ),
    (
      "data_dir=None of data set 'folder' is not a folder: give data_dir=FOLDER",
      "data_dir=None of data set 'folder' is not a folder: give --data_dir=FOLDER",
    ),
    (
      "cannot write to workdir=a: choose another workdir",
      "cannot write to --workdir=a: choose another --workdir",
    ),
  ],
)
def test_arguments_of_the_library_are_flags_on_a_terminal(capsys, said, shown):
  assert _outcome(capsys, _raise(errors.UserError(said))) == (2, [f"protojax: {shown}"])


@pytest.mark.parametrize(
  "said",
  [
    "config.json cannot be read: give the workdir of a run",
    "see protojax/config.py for all keys",
    "k=0 neighbours, mesh.data=3, monitor.step=5 and a heads of state",
    "/data/config.old and my.config.new: the workdir holds a run",
    "--config.batch_size=3 and --workdir=x stay as they are",
    "env.json is missing in subworkdir=x",
    "data_dir=DATA of data set 'cifar10' is not a folder",  # in training a setting
  ],
)
def test_files_and_words_are_no_flags(capsys, said):
  assert _outcome(capsys, _raise(errors.UserError(said))) == (2, [f"protojax: {said}"])


def test_a_user_error_is_a_value_error_that_no_reader_swallows(tmp_path):
  """Each reads a file inside `except ValueError`, and its parts refuse in words of their own."""
  assert issubclass(errors.UserError, ValueError)
  (tmp_path / "config.json").write_text('{"method": {"name": "nothing"}}')
  (tmp_path / "metrics.jsonl").write_text("{}")
  (tmp_path / "env.json").write_text("{}")
  for read in (record.verdict, loading.load):
    with pytest.raises(errors.UserError, match="method.name='nothing' is unknown"):
      read(tmp_path)
  with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:
    for name in ("data.pkl", "constants.pkl"):
      archive.writestr(f"script/{name}", b"")
  with pytest.raises(errors.UserError, match="is a TorchScript program"):
    tensor_files.read(tmp_path / "script.pth")


@pytest.mark.parametrize(
  ("body", "status"),
  [
    ("progress.write('one'); logging.info('two'); progress.write('three')", 0),
    ("print('a')", 141),
    ("print('a'); sys.exit(3)", 3),
  ],
)
def test_a_program_whose_reader_is_gone_goes_on_or_ends_without_a_word(tmp_path, body, status):
  """As of `protojax train ... 2>&1 | head -1`; the traceback of Python would be in the file."""
  program = (
    f"import sys; from absl import logging; from protojax import cli, progress\n"
    f"def call(argv):\n  {body}\n  open({str(tmp_path / 'end')!r}, 'w').close()\n"
    "cli.guarded(call, [])\n"
  )
  both = "progress" in body
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
  read, write = os.pipe()
  os.close(read)
  with open(tmp_path / "said", "w") as said, open(write, "wb") as closed:
    done = subprocess.run(
      [sys.executable, "-c", program],
      stdout=closed,
      stderr=closed if both else said,
      env=environment,
      timeout=60,
      check=False,
    )
  assert done.returncode == status
  assert (tmp_path / "said").read_text() == ""
  assert (tmp_path / "end").exists() == (both or body == "print('a')")


def test_a_full_disk_under_the_log_is_no_closed_pipe():
  class Full(io.StringIO):
    def write(self, text):
      raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(OSError, match="No space"):
    progress.write("one", Full())


def test_a_bug_keeps_its_traceback():
  with pytest.raises(PermissionError):
    cli.guarded(_raise(PermissionError(errno.EACCES, "no")), [])
  with pytest.raises(ZeroDivisionError):
    cli.guarded(_raise(ZeroDivisionError()), [])


def test_flags_that_do_not_parse_are_one_line():
  parser = cli.parser("embed", "Writes.")
  parser.add_argument("--limit", type=int)
  for argv, words in ((["--limit=x"], "invalid int value: 'x'"), (["--lim=1"], "--lim=1")):
    with pytest.raises(errors.UserError, match=words) as caught:
      parser.parse_args(argv)
    assert str(caught.value).endswith("; protojax embed --help shows what there is")


@pytest.mark.parametrize(
  ("argv", "line"),
  [
    (["--workdr=w", "--out=o"], "--workdr=w: did you mean --workdir?"),
    (["--workdir=w", "--outt", "o"], "--outt: did you mean --out?"),  # not: --out is required
    (["--workdir=w", "--out=o", "--nonsense"], "unrecognized arguments: --nonsense"),
  ],
)
def test_a_mistyped_flag_of_a_verb_is_answered_with_the_nearest(argv, line):
  parser = cli.parser("embed", "Writes.")
  parser.add_argument("--workdir")
  parser.add_argument("--out", required=True)
  with pytest.raises(errors.UserError) as caught:
    parser.parse_args(argv)
  assert line in str(caught.value) and "required" not in str(caught.value)


@pytest.mark.parametrize(
  ("argv", "word"),
  [
    (["own"], "own"),
    (["--limit", "3", "own"], "own"),
    (["--limit=3", "--pair", "a", "b", "--quick", "own"], "own"),
    (["--limit", "3", "--pair", "a", "b"], None),
    (["--workdir", "own"], None),
  ],
)
def test_a_word_alone_is_answered_with_the_flag_that_it_wants(argv, word):
  parser = cli.parser("evaluate", "Measures.")
  parser.add_argument("--workdir")
  parser.add_argument("--limit")
  parser.add_argument("--pair", nargs=2)
  parser.add_argument("--quick", action="store_true")
  if word is None:
    parser.parse_args(argv)
    return
  with pytest.raises(errors.UserError, match=r"^own stands alone: did you mean --workdir=own\?;"):
    parser.parse_args(argv)


def test_other_libraries_notes_about_themselves_are_not_shown_and_their_warnings_are(
  capsys, monkeypatch
):
  def talk(argv):
    for name in ("jax._src.xla_bridge", "matplotlib.font_manager", "matplotlib.pyplot"):
      logger = logging.getLogger(name)
      logger.info("%s tells of itself", name)
      logger.warning("%s warns", name)
      logger.error("%s fails", name)

  handler = logging.StreamHandler()
  for name in ("jax", "matplotlib", "matplotlib.font_manager"):
    monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
  monkeypatch.setattr(logging.root, "level", logging.INFO)
  monkeypatch.setattr(logging.root, "handlers", [handler])
  handler.setStream(sys.stderr)
  cli.guarded(talk, [])
  assert capsys.readouterr().err.splitlines() == [
    "jax._src.xla_bridge warns",
    "jax._src.xla_bridge fails",
    "matplotlib.font_manager fails",  # warns that it makes its cache
    "matplotlib.pyplot warns",
    "matplotlib.pyplot fails",
  ]


def test_a_mistake_ends_the_bar_before_its_line(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  seconds = [0.0]
  monkeypatch.setattr(progress, "_now", lambda: seconds[0])
  monkeypatch.setattr(sys, "stderr", terminal := Terminal())

  def call(argv):
    for _ in progress.over(range(3), "reading"):
      seconds[0] += 1.0
      if seconds[0] == 2.0:
        raise errors.UserError("the second is damaged")

  with pytest.raises(SystemExit):
    cli.guarded(call, [])
  shown = terminal.getvalue()
  assert "\rreading 1/3" in shown and shown.endswith(" \rprotojax: the second is damaged\n")


def _together(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["protojax", *arguments])
  __main__.run()


def _refused(monkeypatch, capsys, *arguments):
  """The one line of `protojax` with these arguments."""
  for module in __main__.MODULES.values():  # runpy would warn
    monkeypatch.delitem(sys.modules, f"protojax.{module}", raising=False)
  with pytest.raises(SystemExit) as stopped:
    _together(monkeypatch, *arguments)
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


def test_one_command_holds_every_program(monkeypatch, capsys, tmp_path):
  _together(monkeypatch)
  described = capsys.readouterr().out
  assert described.splitlines()[2:] == [f"  {v:<14} {what}" for v, what in __main__.VERBS.items()]
  _together(monkeypatch, "--version")
  assert capsys.readouterr().out == f"protojax {protojax.__version__}, jax {jax.__version__}\n"
  for module in __main__.MODULES.values():
    assert importlib.util.find_spec(f"protojax.{module}")
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.chdir(tmp_path)
  line = _refused(monkeypatch, capsys, "doctor", "nowhere.pth")
  assert line.startswith("protojax: there is no nowhere.pth: ")
  assert str(tmp_path) in sys.path  # as under `python -m`: what the user's own modules lie in
  for verb in __main__.VERBS:
    line = _refused(monkeypatch, capsys, verb, "--nonsense")
    assert line.startswith("protojax: ") and f"protojax {verb} --help" in line


def test_a_verb_that_does_not_exist_is_named_with_the_nearest(monkeypatch, capsys):
  for typed, hint in (
    ("docter", "did you mean doctor?"),
    ("xyz", f"choose {', '.join(__main__.VERBS)}"),
  ):
    assert _refused(monkeypatch, capsys, typed) == f"protojax: there is no {typed!r}: {hint}"
