"""The table of slices is made of plans, each compiled once; a step's share of the measured peak."""

import subprocess

import pytest

from benchmarks import scaling, step

_FITS = {
  "devices": 16,
  "batch_size": 1024,
  "limit": 15.75 * 2**30,
  "memory": {"peak": 6.3 * 2**30},
  "largest_batch": {"batch_size": 2048},
  "predicted": {
    "matrix": 0.0223,
    "memory": 0.049,
    "network": 0.0011,
    "bound": "memory",
    "images_per_second": 16_000.0,
    "efficiency": 0.975,
  },
  "commit": "abc",
  "versions": {"jax": "1", "libtpu": "2"},
}
_TOO_MUCH = {k: _FITS[k] for k in ("devices", "batch_size", "limit", "commit", "versions")}
_TOO_MUCH["needed"] = 20 * 2**30


def test_a_plan_is_a_line_and_one_that_does_not_fit_says_so():
  lines = scaling.table({"ViT-S, gmm, v5e:4x4": _FITS, "ViT-S, ibot, v5e:4x4": _TOO_MUCH})
  head, rule, fits, too_much = lines.splitlines()
  cells = "64 | 6.3 of 15.8 | 22.3 | 49.0 | 1.1 | memory | 1,000 | 16,000 | 98 % | 2,048 |"
  assert fits == f"| ViT-S, gmm | v5e:4x4 | {cells}"
  assert "20.0 of 15.8: too much" in too_much
  assert len({line.count("|") for line in (head, rule, fits, too_much)}) == 1


def test_every_plan_is_made_once_unless_again_and_one_that_fails_is_left_out(
  monkeypatch, tmp_path, capsys
):
  asked = []

  def plan(name, slice_, flags):
    asked.append((name, slice_))
    if name == "ViT-S, ibot":
      raise subprocess.CalledProcessError(2, "protojax")
    assert flags == ["--config.batch_size=64", "--config.model.depth=1"]
    return _FITS | {"command": " ".join(["protojax", *scaling.command(name, slice_, flags)])}

  monkeypatch.setattr(scaling, "plan", plan)
  rows = ["ViT-S, gmm", "ViT-S, ibot"]
  command = ["--rows", *rows, "--slices", "v5e:4x4", "--batch_size=64", "--set", "model.depth=1"]
  for _ in range(2):
    scaling.main([*command, f"--out={tmp_path}/scale.json"])
  assert asked == [(rows[0], "v5e:4x4"), (rows[1], "v5e:4x4"), (rows[1], "v5e:4x4")]
  scaling.main([*command, f"--out={tmp_path}/scale.json", "--again"])
  assert asked[3] == (rows[0], "v5e:4x4")
  said = capsys.readouterr().out
  assert "ViT-S, ibot, v5e:4x4: status 2, left out" in said and "| 16,000 |" in said


def test_the_page_takes_the_table_between_its_marks(tmp_path):
  page = tmp_path / "scale.md"
  page.write_text(f"before\n{scaling.section({})}\nafter\n")
  scaling.write(page, {"ViT-S, gmm, v5e:4x4": _FITS})
  text = page.read_text()
  assert text.startswith("before\n") and text.endswith("\nafter\n") and "| 16,000 |" in text
  assert "Commit abc" in text and "Nothing has been compiled" not in text


def test_the_share_of_the_peak_is_that_of_all_devices():
  found = {"milliseconds": {"step": 500.0}, "flops": 4e12, "devices": 4}
  assert step.of_peak(found, 8e12, 1e13) == {
    "matrix_peak": 1e13,
    "share_of_peak": pytest.approx(0.2),
  }
