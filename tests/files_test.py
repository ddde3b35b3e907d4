"""A file is there whole or not at all."""

import errno
import os

import pytest

from protojax import errors, files


def _torn(number):
  def write(path):
    path.write_bytes(b"t")
    raise OSError(number, "No space left on device")

  return write


def test_text_bytes_and_what_writes_itself_get_a_folder(tmp_path):
  path = tmp_path / "new" / "folder" / "a"
  text = "w\u00f6rter"
  for content in (text, text.encode(), lambda p: p.write_text(text, "utf-8")):
    files.write(path, content)
    assert path.read_text("utf-8") == text
    assert [p.name for p in path.parent.iterdir()] == ["a"]
    path.unlink()


@pytest.mark.parametrize(
  ("number", "kind"),
  [(errno.ENOSPC, OSError), (errno.EDQUOT, OSError), (errno.EIO, errors.UserError)],
)
def test_a_file_that_was_there_survives_a_write_that_fails(tmp_path, number, kind):
  files.write(tmp_path / "a", "old")
  with pytest.raises(kind):
    files.write(tmp_path / "a", _torn(number))
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_place_that_is_none_is_one_line(tmp_path):
  (tmp_path / "file").write_text("x")
  for path in (tmp_path / "file" / "a", tmp_path):
    with pytest.raises(errors.UserError, match=f"cannot write to {path}: ") as caught:
      files.write(path, "text")
    assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_who_reads_while_it_is_written_reads_the_old_content(tmp_path):
  path = tmp_path / "notes.txt"
  files.write(path, "old")
  with open(path) as reader:
    files.write(path, "new, and longer")
    assert reader.read() == "old"
  assert path.read_text() == "new, and longer" and os.listdir(tmp_path) == ["notes.txt"]


def test_json_lines_are_told_from_what_is_none(tmp_path):
  path = tmp_path / "lines"
  path.write_bytes(b'{"a": 1}\n\n[2]\n{"b": NaN}\n{"torn\xff')
  records, others = files.json_lines(path)
  assert records[0] == {"a": 1} and len(records) == 2 and len(others) == 3
