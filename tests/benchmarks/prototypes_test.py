"""The benchmark of prototypes, and what it counts at a million of them."""

import json

import pytest

from benchmarks import prototypes


def test_a_million_prototypes_need_the_memory_of_a_block():
  """256 images, ten views: beside prototypes and statistics less than 512 MB, all at once 40 GB."""
  at_once, by_blocks = prototypes.measure("mixture", 2**20, (0, None), 256, 10, 256, runs=0)
  assert by_blocks["block"] == 128 and "milliseconds" not in by_blocks
  assert by_blocks["temporary_bytes"] < 200e6
  assert at_once["temporary_bytes"] > 4 * (2.2e9 + 512e6)


@pytest.mark.parametrize("kind", ["mixture", "learned"])
def test_rows_are_timed_in_turn(kind, capsys):
  sizes = ["--num", "64", "--images", "8", "--views", "3", "--dim", "16", "--blocks", "16", "48"]
  prototypes.main([*sizes, "--runs", "2", "--kind", kind])
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row["block"] for row in rows] == [0, 0, 16]  # 48 is no divisor
  assert all(row["milliseconds"] > 0 and row["kind"] == kind for row in rows)
