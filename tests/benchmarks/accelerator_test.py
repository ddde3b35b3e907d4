"""The list for an accelerator: items can be built, no line is lost, pages are made of lines."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from benchmarks.accelerator import collect, items, machine, parity, records, row, speed
from protojax import config as configs
from protojax import files, methods, resolving, trees

ROOT = pathlib.Path(__file__).parents[2]
_DATA = pathlib.Path(os.environ.get("PROTOJAX_DATA_DIR", ROOT.parent / "shared" / "data"))
_IMAGES = 50_000

# Takes a minute: bash launch/test.sh --all.
long = pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all")


def _start(out, *arguments):
  command = [sys.executable, "-m", "benchmarks.accelerator", f"--out={out}", "--rehearse"]
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a rehearsal keeps every program: in its own
  return subprocess.Popen(
    [*command, *arguments],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def _run(out, *arguments):
  process = _start(out, *arguments)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return output


def _statuses(out):
  return [(line["item"], line["status"]) for line in records.read(out / "lines.jsonl")]


@long
@pytest.mark.skipif(not (_DATA / "cifar10").is_dir(), reason="no prepared CIFAR-10")
def test_a_stopped_list_goes_on_and_says_everything_once(tmp_path):
  out, state = tmp_path / "out", tmp_path / "state"
  wanted = ["--only", "parity/falcon", "speed/gmm, K 4,096", "patch8/dino frozen"]
  data = f"--data_dir={_DATA}"
  first = _start(out, f"--state={state}", data, *wanted)
  checkpoints = state / "rehearsal" / "patch8" / "dino_frozen" / "run" / "checkpoints"
  deadline = time.time() + 240
  while not checkpoints.exists() or not any(p.name.isdigit() for p in checkpoints.iterdir()):
    assert first.poll() is None and time.time() < deadline, first.stdout.read()
    time.sleep(0.05)
  first.send_signal(signal.SIGTERM)
  output, _ = first.communicate(timeout=120)
  assert first.returncode == 0, output
  before = _statuses(out)
  assert before[:2] == [("parity/falcon", "done"), ("speed/gmm, K 4,096", "done")], output
  assert before[2:] in ([("patch8/dino frozen", "cut")], [("patch8/dino frozen", "done")])

  home = tmp_path / "home"  # another call takes everything along
  _run(home, f"--state={state}", data, *wanted)
  assert _statuses(home)[: len(before)] == before and _statuses(home)[-1][1] == "done"
  assert _statuses(home) == _statuses(state)
  assert sum(status == "done" for _, status in _statuses(home)) == 3
  last = records.read(home / "lines.jsonl")[-1]
  assert {"card", "driver", "versions", "commit", "command", "seconds"} <= last.keys()
  assert last["result"]["measures"]["step"] == 2 and "top1_k20_T0.1" in last["result"]["knn"]
  assert [step for step, _ in last["result"]["curves"]["probe/knn"]] == [1, 2]
  log = (state / "rehearsal" / "patch8" / "log.txt").read_text()
  assert "cifar10/train[:64] lies on the device: 64 images" in log
  assert "every item has its line" in _run(home, f"--state={state}", data, *wanted)

  said = _run(home, f"--collect={home}")
  assert said.strip() == f"{home / 'accelerator.md'}: 3 items, 0 failed"
  page = (home / "accelerator.md").read_text()
  assert "| falcon | float32 |" in page and "| gmm, K 4,096 | 4 |" in page
  assert "| dino frozen | 100.0 |" in page
  for figure in ("speed.png", "curves.png"):
    assert (home / "accelerator" / figure).stat().st_size > 5000


def test_what_fails_is_recorded_and_passed_over(tmp_path):
  (tmp_path / "cifar10").mkdir()
  rows = ("patch8/falcon", "patch8/vicreg", "patch8/barlow twins")
  arguments = (f"--data_dir={tmp_path}", "--only", *rows)
  said = _run(tmp_path, *arguments)  # two alike are enough
  assert "patch8/vicreg: failed" in said and "goes on with patch8/barlow twins" in said
  failed = [(row, "failed") for row in rows]
  assert _statuses(tmp_path) == failed[:2]
  for line in records.read(tmp_path / "lines.jsonl"):
    assert line["error"].startswith("UserError: no data set 'cifar10' is prepared in")
  assert "every item has its line" in _run(tmp_path, *arguments)
  assert _statuses(tmp_path) == failed
  assert "patch8/vicreg: failed" in _run(tmp_path, "--retry", *arguments)


class _Call(NamedTuple):
  """What `_together` reads of the command line."""

  state: pathlib.Path
  out: pathlib.Path
  minutes: float = 9.0
  rehearse: bool = True
  data_dir: str | None = None


def _together(tmp_path, monkeypatch, script, names, seconds=60.0, work="row"):
  """Lines and what is left of a group whose process runs `script` with the items' folders."""
  program = importlib.import_module("benchmarks.accelerator.__main__")
  group = [items.Item(f"x/{name}", work, {}, 1) for name in names]
  folders = [str(tmp_path / "rehearsal" / "x" / name) for name in names]
  monkeypatch.setattr(
    program, "_command", lambda group, *_: [sys.executable, "-c", script, *folders[-len(group) :]]
  )
  monkeypatch.setattr(program, "_GRACE", 1.0)
  found = []
  with program._Stoppable() as stop:
    left = program._together(
      group,
      _Call(tmp_path, tmp_path),
      time.monotonic() + seconds,
      stop,
      lambda item, line: found.append((item.name, line["status"])),
    )
  return found, [item.name for item in left]


_WRITE = """
import json, os, sys, time
def done(folder, name="result"):
  json.dump({"error": "E", "log": []}, open(folder + "/new", "w"))
  os.replace(folder + "/new", folder + "/" + name + ".json")
"""


def test_items_that_share_a_process_are_told_apart_when_it_dies(tmp_path, monkeypatch):
  script = _WRITE + "done(sys.argv[1]); done(sys.argv[2], 'error'); "
  end = "os.kill(os.getpid(), 9)"
  found, left = _together(tmp_path, monkeypatch, script + end, ["a", "b", "c", "d"])
  assert found == [("x/a", "done"), ("x/b", "failed")]
  assert left == ["x/c", "x/d"]  # for a new process: c had not begun
  begin = "open(sys.argv[3] + '/started', 'w').close(); "
  found, left = _together(tmp_path, monkeypatch, script + begin + end, ["a", "b", "c", "d"])
  assert found == [("x/a", "done"), ("x/b", "failed"), ("x/c", "failed")] and left == ["x/d"]
  found, left = _together(tmp_path, monkeypatch, end, ["a", "b"])  # before it could begin
  assert found == [("x/a", "failed")] and left == ["x/b"]


def test_what_cannot_go_on_later_is_not_begun_too_late_and_not_waited_for_endlessly(
  tmp_path, monkeypatch
):
  program = importlib.import_module("benchmarks.accelerator.__main__")
  call, row = _Call(tmp_path, tmp_path, rehearse=False), items.Item("x/a", "row", {}, 900)
  timed, now = items.Item("x/a", "speed", {}, 100), time.monotonic()
  assert program._fits(row, call, now + 145) and not program._fits(row, call, now + 135)
  (tmp_path / "x" / "a" / "run").mkdir(parents=True)  # it goes on
  assert program._fits(row, call, now + 65) and not program._fits(row, call, now + 55)
  assert program._fits(timed, call, now + 125) and not program._fits(timed, call, now + 115)
  monkeypatch.setattr(program, "_limit", lambda item: 0.5)
  found, left = _together(tmp_path, monkeypatch, "import time; time.sleep(60)", "ab", work="speed")
  assert found == [("x/a", "failed")] and left == ["x/b"]


def test_a_process_that_does_not_hear_is_killed_at_the_end_of_the_time(tmp_path, monkeypatch):
  script = (
    _WRITE + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); done(sys.argv[1]); "
    "open(sys.argv[2] + '/started', 'w').close(); time.sleep(60)"
  )
  start = time.monotonic()
  found, left = _together(tmp_path, monkeypatch, script, ["a", "b", "c"], seconds=3.0)
  assert found == [("x/a", "done"), ("x/b", "cut")] and left == []
  assert time.monotonic() - start < 20


def test_what_is_timed_has_a_process_of_its_own():
  program = importlib.import_module("benchmarks.accelerator.__main__")
  groups = [[item.name for item in group] for group in program._groups(items.ITEMS)]
  assert sum(groups, []) == [item.name for item in items.ITEMS]
  assert ["speed/gmm"] in groups and ["speed/dino, PyTorch"] in groups
  sizes = {group[0].partition("/")[0]: len(group) for group in groups if len(group) > 1}
  assert sizes["parity"] == 4 and sizes["patch8"] == 10 and sizes["table1"] == 5
  assert groups[0] == ["machine/works"] and ["patch8/dino joint", "patch8/dino mixture"] in groups


def test_a_card_that_jax_does_not_use_ends_the_list(tmp_path, monkeypatch):
  tools = tmp_path / "tools"
  tools.mkdir()
  (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559 MiB'\n")
  (tools / "nvidia-smi").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  command = [sys.executable, "-m", "benchmarks.accelerator", f"--out={tmp_path}", "--only"]
  done = subprocess.run(
    [*command, "machine", "parity/gmm"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 1
  assert "does not work: UserError: JAX runs on the CPU beside NVIDIA H100" in done.stdout
  assert _statuses(tmp_path) == [("machine/works", "failed")]
  line = records.read(tmp_path / "lines.jsonl")[0]
  on_cpu = {**line, "status": "done", "result": {"backend": "cpu"}}
  assert line["card"] == "NVIDIA H100" and collect.latest([on_cpu]) == {}


def test_the_machine_is_asked_what_it_has(tmp_path):
  found = machine.run({}, folder=tmp_path, data_dir=str(tmp_path), rehearse=True)
  assert (found["backend"], found["memory_bytes"]) == ("cpu", None)
  assert found["images"].startswith("UserError: no data set 'cifar10' is prepared in")
  if (_DATA / "cifar10").is_dir():
    assert machine.run({}, folder=tmp_path, data_dir=str(_DATA), rehearse=True)["images"] == 8


def test_rows_that_fail_alike_are_left_and_a_machine_is_asked_until_it_works(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / "cifar10").mkdir()
  program = importlib.import_module("benchmarks.accelerator.__main__")

  def fails(group, arguments, deadline, stop, report):
    report(group[0], {"status": "failed", "seconds": 1.0, "error": "E"})
    return group[1:]

  monkeypatch.setattr(program, "_together", fails)
  arguments = [f"--out={tmp_path}", f"--data_dir={tmp_path}", "--rehearse", "--only"]
  assert program.main([*arguments, "patch8, seed 1", "adapt"]) == 0
  failed = [name for name, _ in _statuses(tmp_path)]
  assert failed == [
    *("adapt/mixture", "adapt/joint", "patch8, seed 1/dino joint"),
    "patch8, seed 1/dino mixture",
  ]
  assert "patch8, seed 1: the same error twice" in capsys.readouterr().out
  for _ in range(2):
    assert program.main([*arguments, "machine", "parity"]) == 1
  assert [name for name, _ in _statuses(tmp_path)[4:]] == ["machine/works"] * 2


def test_mistakes_are_one_line():
  for arguments, said in (
    (["--only", "nothing"], "--only=nothing names no item"),
    (["--minutes=0"], "must be above 0"),
    (["--data_dir=/nowhere"], "--data_dir=/nowhere holds no cifar10"),
  ):
    process = _start("/tmp/none", *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and said in output.splitlines()[-1]


def _items(work):
  return pytest.mark.parametrize(
    "item", [i for i in items.ITEMS if i.work == work], ids=lambda item: item.name
  )


@_items("row")
def test_a_row_is_a_method_with_known_settings(item):
  known = trees.flat(configs.default(item.options["changes"].get("method.name", "dino")))
  config = row.recipe(item.options, "/data", rehearse=False)
  known |= trees.flat(config)
  assert set(item.options["changes"]) <= known.keys()
  config = resolving.resolve(config, _IMAGES)
  methods.load(config.method.name).make(config)
  tenth = config.eval_every
  assert 9 * tenth < config.num_steps <= 10 * tenth
  rehearsed = row.recipe(item.options, "/data", rehearse=True)
  assert rehearsed.probe.k <= 64 and resolving.resolve(rehearsed, 64).num_steps == 2
  assert config.batch_size == (256 if item.name.startswith("table1") else 512)


def test_items_are_told_apart_by_their_names():
  names = [item.name for item in items.ITEMS]
  assert len(set(names)) == len(names)
  settings = {json.dumps((i.work, i.options), sort_keys=True) for i in items.ITEMS}
  assert len(settings) == len(names)


@_items("speed")
def test_speed_is_of_real_sizes(item):
  if "cudnn" in item.name:
    assert item.options["changes"]["model.attention"] == "cudnn"
    return
  config = resolving.resolve(speed.recipe(item.options, 256, rehearse=False), _IMAGES)
  methods.load(config.method.name).make(config)
  encoder = "resnet50" if "carp" in item.name else "vit_small"
  assert (config.model.name, config.precision, config.batch_size) == (encoder, "bfloat16", 256)
  wanted = {"barlow_twins": 0, "carp": 6}.get(config.method.name, 8)
  assert (config.augment.global_size, config.augment.num_local) == (224, wanted)


def test_a_number_that_differs_from_the_cpus_is_seen():
  stored = {"loss": [2.0, 4.0], "grad_norm": [1.0], "rows": [[0.5]]}
  found = {"loss": [2.0, 4.4], "grad_norm": [1.0], "rows": [[0.25]]}
  assert parity.differences(found, stored) == pytest.approx(
    {"loss": 0.1, "grad_norm": 0.0, "rows": 0.25}
  )
  held = records.read_json(parity.STORED)
  for name, worst in held["bfloat16_against_float32"].items():
    for quantity, value in worst.items():
      assert value <= parity.TOLERANCES["bfloat16"][quantity], (name, quantity)


def test_the_largest_batch_that_fits_is_taken():
  def measure(batch_size):
    if batch_size > 64:
      raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    return {"batch_size": batch_size}

  assert speed.largest((256, 128, 64, 32), measure) == {"batch_size": 64, "too_large": [256, 128]}
  with pytest.raises(RuntimeError, match="no batch fits"):
    speed.largest((256, 128), measure)
  with pytest.raises(ZeroDivisionError):  # anything else is a failure
    speed.largest((256,), lambda batch_size: 1 // 0)


def test_a_torn_line_is_mended_and_the_latest_counts(tmp_path):
  cut = {"item": "a", "status": "cut", "rehearsal": False}
  (tmp_path / "lines.jsonl").write_text(json.dumps(cut) + '\n{"item": "b", "sta')
  lines = records.Lines(tmp_path, tmp_path / "out")
  assert lines.status("a") == "cut" and lines.status("b") is None
  lines.append({**cut, "status": "done"})
  assert records.Lines(tmp_path, tmp_path / "out").status("a") == "done"
  for folder in (tmp_path, tmp_path / "out"):
    assert _statuses(folder) == [("a", "cut"), ("a", "done")]
  # A state that is lost takes nothing along, neither from --out nor from files brought home.
  lines = records.Lines(tmp_path / "new", tmp_path / "out")
  assert lines.status("a") == "done" and _statuses(tmp_path / "new") == _statuses(tmp_path)
  lines = records.Lines(tmp_path / "x", tmp_path / "y", [tmp_path / "lines.jsonl"])
  assert lines.status("a") == "done" and _statuses(tmp_path / "y") == _statuses(tmp_path)


def test_a_rehearsal_does_not_stand_for_the_real_thing(tmp_path):
  lines = records.Lines(tmp_path, tmp_path, rehearsal=True)
  lines.append({"item": "a", "status": "done", "rehearsal": True})
  assert lines.status("a") == "done"
  assert records.Lines(tmp_path, tmp_path).status("a") is None


def _line(item, seed=0, rehearsal=False, **result):
  return {
    "item": item,
    "status": "done",
    "seconds": 100.0,
    "result": result,
    "card": "H100",
    "driver": "580",
    "versions": {"jax": "0.11.2"},
    "commit": "abc",
    "rehearsal": rehearsal,
  }


def test_pages_are_made_of_lines_and_rehearsals_are_not_published(tmp_path, monkeypatch):
  readme = tmp_path / "README.md"
  readme.write_text(f"before\n{collect._BEGIN}\n{collect._NOTHING}{collect._END}\nafter\n")
  monkeypatch.setattr(records, "ROOT", tmp_path)
  monkeypatch.setattr(collect, "RESULTS", tmp_path / "docs" / "results")
  speeds = {
    "batch_size": 256,
    "milliseconds": {"step": 200.0, "augment": 40.0, "ready": 150.0},
    "img_per_s": 1280.0,
    "img_per_s_ready": 1706.7,
    "flops_without_augmentation": 3e13,
    "matrix_peak": 6e14,
    "share_of_peak": 0.25,
    "share_of_peak_ready": 0.33,
  }

  def trained(knn):
    return {
      "measures": {"probe/knn": knn, "collapse/used": 0.5},
      "knn": {"top1_k20_T0.07": knn, "top1_k200_T0.1": 0.5},
      "curves": {"probe/knn": [[970, 0.4], [1940, 0.6]]},
      "verdict": "ok",
    }

  lines = [
    _line("speed/dino", **speeds),
    _line("patch8/carp joint", **trained(0.5)),
    _line("patch8, seed 1/carp joint", **trained(0.6)),
    _line("patch8/vicreg", rehearsal=True, **trained(0.1)),
    {
      "item": "speed/gmm",
      "status": "failed",
      "error": "the process ended",
      "log": ["OSError: y"],
      "rehearsal": False,
    },
  ]
  files.write(tmp_path / "lines.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
  assert collect.write(tmp_path).endswith("3 items, 1 failed")
  page = (tmp_path / "docs" / "results" / "accelerator.md").read_text()
  assert "| dino | 256 | 1280 | 1707 | 200.0 | 150.0 | 40.0 | – |" in page
  assert "| 50.0 | 60.0 | 50.0 |" in page  # k-NN at the end, best tenth, k = 200
  assert "| carp joint | 2 | – | 50.0 ± 0.0 | 55.0 ± 7.1 | – |" in page
  assert "vicreg" not in page and "- speed/gmm: OSError: y" in page
  assert "H100, driver 580, commit abc: jax 0.11.2 (3 items)" in page
  said = readme.read_text()
  assert said.startswith("before\n") and said.endswith("after\n") and "| dino | 256 |" in said
  assert collect._NOTHING not in said
  with pytest.raises(SystemExit, match="no item that is done on an accelerator"):
    (tmp_path / "other").mkdir()
    on_cpu = {**lines[0], "card": None, "result": {**speeds, "backend": "cpu"}}
    files.write(
      tmp_path / "other" / "lines.jsonl", f"{json.dumps(lines[3])}\n{json.dumps(on_cpu)}\n"
    )
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "elsewhere")
    collect.write(tmp_path / "other")


def test_readme_says_what_has_been_measured():
  found = collect.latest(records.read(collect.RESULTS / "accelerator" / "lines.jsonl"))
  shown = collect.published_section((ROOT / "README.md").read_text())
  assert shown == f"{collect._BEGIN}\n{collect.section(found)}{collect._END}"
