"""The benchmark of prototypes, and what it counts at a million of them."""

import json

import pytest

from benchmarks import prototypes


def test_a_million_prototypes_need_the_memory_of_a_block():
  """256 images, ten views: beside prototypes and statistics less than 512 MB, all at once 40 GB."""
  at_once, by_blocks = prototypes.measure("mixture", 2**20, (0, None), 256, 10, 256, runs=0)
  assert by_blocks["block"] == 128 and "milliseconds" not in by_blocks
  assert by_blocks["temporary_bytes"] < 240e6
  assert at_once["temporary_bytes"] > 4 * (2.2e9 + 512e6)


_SMALL = ("--num", "64", "--images", "8", "--views", "3", "--dim", "16")


def test_blocks_that_cut_nothing_equally_are_refused(capsys):
  with pytest.raises(SystemExit):
    prototypes.main([*_SMALL, "--blocks", "16", "48"])
  assert "--blocks 48 does not cut --num 64 into equal blocks" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mixture", "learned"])
def test_rows_are_labelled_timed_in_turn_and_drawn(kind, capsys, tmp_path):
  stored, figure = tmp_path / "rows.json", tmp_path / "memory.png"
  prototypes.main([*_SMALL, "--blocks", "16", "--runs", "2", "--kind", kind, f"--json={stored}"])
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  labels = [(row["compared"], row["block"]) for row in rows]
  assert labels == [("all at once", 0), ("chosen", 0), ("asked for", 16)]
  assert json.loads(stored.read_text())["rows"] == rows
  prototypes.main([f"--draw={stored}", f"--figure={figure}"])
  assert figure.read_bytes().startswith(b"\x89PNG")
  assert all(row["milliseconds"] > 0 and row["kind"] == kind for row in rows)
