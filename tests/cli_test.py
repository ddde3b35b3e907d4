"""A mistake is one line and status 2 in every program."""

import errno

import pytest

from protojax import cli, errors


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
  ],
)
def test_what_ends_a_program_is_one_line_with_its_status(capsys, error, status, line):
  assert _outcome(capsys, _raise(error)) == (status, [line])


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
    assert str(caught.value).endswith("; python -m protojax.embed --help shows what there is")
