"""A file is there whole or not at all."""

import errno

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
