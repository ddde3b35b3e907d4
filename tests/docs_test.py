"""Every command in README.md, CONTRIBUTING.md and docs/ is run, in the order of the page.

Each page has a folder of its own, with the recipes, IMAGES, checkpoint.pth (DINO's) and
vit.safetensors (timm's) in it, where its commands find what the ones before have left. Training is
cut to a recipe's `:debug` form, 16 pixels and two steps; one with another seed is a copy of the
page's first. Verbs are called in this process. Only looked at are
launch/test.sh (which continuous integration runs) and benchmarks, which take hours. With
PROTOJAX_TEST_ALL alone run launch/quickstart.sh, which installs (what it does with its two runs is
`quickstart_script_test.py`'s), and a training that nothing on the page goes on from; its flags are
read all the same. A command that this file does not know is an error.
"""

import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import foreign_layouts
import numpy as np
import pytest
import safetensors.numpy
import torch_format
from PIL import Image

from benchmarks import (
  adapt,
  beside_pytorch,
  cifar10,
  collapse_causes,
  collapse_zoo,
  long_tail,
  precision,
  quickstart,
  results,
  scaling,
  storage,
)
from benchmarks.accelerator import collect
from protojax import __main__, main, plan
from protojax.metrics import verdicts

ROOT = pathlib.Path(__file__).parents[1]
_FIRST = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in _FIRST), *sorted((ROOT / "docs").glob("*.md"))]
_DATA = pathlib.Path(os.environ.get("PROTOJAX_DATA_DIR", ROOT.parent / "shared" / "data"))
_ALL = bool(os.environ.get("PROTOJAX_TEST_ALL"))
_SHORT = (
  "--config.num_steps=2",
  "--config.batch_size=32",
  "--config.save_every=2",
  "--config.monitor.images=16",
  "--config.augment.global_size=16",
  "--config.augment.local_size=8",
  "--config.probe.limit=40",
  "--config.probe.batch_size=8",
)


def commands(page: pathlib.Path) -> list[str]:
  """Commands of the bash blocks, fenced or indented, and of the running text, no comments."""
  text = page.read_text()
  blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  without = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
  blocks += re.findall(r"(?<=\n\n)(?:    \S.*\n)+", without)
  blocks += re.findall(r"`((?:python|pip|bash|protojax) [^`A-Z][^`]*)`", without)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  lines = [" ".join(shlex.split(line, comments=True, posix=False)) for line in lines]
  return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def _check_extras(words):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  wanted = re.findall(r"\[([a-z,]+)\]", " ".join(words))
  assert wanted and all(set(w.split(",")) <= set(project["optional-dependencies"]) for w in wanted)


def _check_flags(start, program, words, capsys):
  """What takes hours is asked for its --help only, in this process."""
  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
    for name in (program, f"{program}.__main__"):  # another test has imported it: runpy would warn
      patch.delitem(sys.modules, name, raising=False)
    patch.setattr(sys, "argv", [program, "--help"])
    start(program, run_name="__main__")
  said = capsys.readouterr().out
  assert not ended.value.code and all(w.split("=")[0] in said for w in words if w.startswith("--"))


def _as_with_another_seed(parsed):
  """The page's first run stands for one of the same recipe with another seed, in a copy."""
  config, workdir = parsed[0], pathlib.Path(parsed[1].workdir)
  first = min(workdir.parent.glob("*/config.json"), key=lambda path: path.stat().st_mtime).parent
  shutil.copytree(first, workdir, ignore=shutil.ignore_patterns("knn", "linear", "clustering"))
  for known in (workdir / "config.json", workdir / "eval" / "final" / "result.json"):
    text = known.read_text()
    assert text.count('"seed": 0') == 1
    known.write_text(text.replace('"seed": 0', f'"seed": {config.seed}'))


def _quickstart(folder):
  """launch/quickstart.sh in a new environment, which takes a minute or two."""
  environment = {
    **os.environ,
    "PROTOJAX_VENV": str(folder / "venv"),
    "PROTOJAX_PYTHON": sys.executable,
  }
  script = ["bash", "launch/quickstart.sh", str(folder / "runs" / "quickstart"), *_SHORT]
  done = subprocess.run(
    script, cwd=ROOT, env=environment, timeout=900, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  assert "Installing" in done.stdout
  for name in ("joint", "decoupled"):
    assert re.search(rf"^{name:<9} \| step 2/2 ", done.stdout, re.MULTILINE)
    assert re.search(rf"^{name} +\d+\.\d % ", done.stdout, re.MULTILINE)
  for name in ("comparison.html", "comparison.png"):
    assert (folder / "runs" / "quickstart" / name).stat().st_size > 0


def run(
  command: str, cwd: pathlib.Path, capsys, *, last: bool = False, again: bool = False
) -> None:
  """Runs one command of a page in the page's folder.

  Args:
    last: whether nothing there needs its workdir.
    again: whether the page has had this verb before.
  """
  command = command.replace("$PROTOJAX_DATA_DIR", str(_DATA))
  words = shlex.split(command.replace("data_dir=DATA", f"data_dir={_DATA}"))
  match words:
    case ["git", "clone", "<this", "repository>"] | ["cd", "protojax"]:
      pass  # where the reader is now
    case ["python3.11", "-m", "venv", _] | [".", _]:
      pass
    case ["pip", "install", "--no-deps", pinned]:
      assert pinned in (ROOT / "protojax" / "interop" / "compiled.py").read_text()
    case ["pip", "install", "-e", "."]:
      pass  # no extras
    case ["pip", "install", *rest]:
      _check_extras(rest)
    case ["mkdocs", "build", "--strict"]:
      pass  # needs the extra docs; that it knows every page is tested below
    case ["python", "docs/fidelity.py"]:
      pass  # writes a page here; fidelity_test holds the page against it
    case ["bash", "launch/gpu_local.sh", *rest]:
      main.parse(rest)
    case ["sbatch", *options, "launch/slurm.sh", config, workdir, name, images]:
      assert all(option.startswith("--") for option in options)
      main.parse([config, workdir, name, images])
    case ["JAX_NUM_CPU_DEVICES=4", "protojax", "train", *rest]:
      main.parse(rest)  # one of several processes, which loop_test starts
    case ["bash", "launch/test.sh", *_]:
      subprocess.run(["bash", "-n", "launch/test.sh"], cwd=ROOT, check=True)
    case ["bash", "launch/quickstart.sh"]:
      if _ALL:
        _quickstart(cwd)
    case ["ruff", *_] | ["python", "-m", "mypy"]:
      program = " ".join(words).removeprefix("python -m ")
      assert f'" -m {program} ' in (ROOT / "launch" / "test.sh").read_text()  # which runs it
    case ["python", "-m", "pytest", path]:
      assert (ROOT / path).is_file()
    case ["protojax", "plan", *rest]:
      plan.parse(rest)  # a full recipe takes minutes to compile
    case ["protojax", "replay" | "verify-resume" as verb, *rest]:
      # Of a run that this page has not; replay_test and verify_resume_test run them.
      own = [word for word in rest if not word.startswith("--config.")]
      _check_flags(runpy.run_module, f"protojax.{__main__.MODULES[verb]}", own, capsys)
    case ["protojax", verb, *rest] if verb in __main__.MODULES:
      words = ["python", "-m", f"protojax.{__main__.MODULES[verb]}", *rest]
      run(shlex.join(words), cwd, capsys, last=last, again=again)
    case ["python", "-m", "protojax.main", *_, "--help"]:
      with pytest.raises(SystemExit):
        main.main(words[3:])
    case ["python", "-m", "protojax.main", *rest]:
      debug = [w + ":debug" if re.fullmatch(r"--config=[^:]*", w) else w for w in rest]
      prepared = f"--config.data.data_dir={_DATA}" in rest  # CIFAR-10: 10,000 test images
      few = ["--config.data.name=cifar10", "--config.probe.test_split=test[:40]"] * prepared
      # Debug mode is on digits unless something else is named.
      few += ["--config.data.name=folder"] * ("--config.data.data_dir=IMAGES" in rest)
      with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(main, "_connect", lambda args: None)  # to a cluster, before JAX has started
        if last and not _ALL:
          main.parse(rest)
        elif "--config.seed=1" in rest:  # the run before with another seed: its programs
          _as_with_another_seed(main.parse([*debug, *_SHORT, *few]))
        else:
          main.main([*debug, *_SHORT, *few])
    case ["python", "-m", "protojax.prepare", "cifar10" | "cifar100", *_]:
      pass  # downloads; the training that follows finds the set prepared before
    case ["python", "-m", "protojax.embed", *rest] if again and not _ALL:
      _check_flags(runpy.run_module, "protojax.embed", rest, capsys)  # embed_test runs each kind
    case ["python", "-m", module, *rest] if module.startswith("protojax."):
      with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        importlib.import_module(module).main(rest)
    case ["python", script, *rest] if script.startswith("benchmarks/"):
      _check_flags(runpy.run_path, str(ROOT / script), rest, capsys)
    case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
      _check_flags(runpy.run_module, module, rest, capsys)
    case _:
      raise AssertionError(f"this test does not know how to run {command!r}")


@pytest.fixture
def folder(tmp_path):
  for name in ("configs", "benchmarks"):
    (tmp_path / name).symlink_to(ROOT / name)
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    for i in range(48):
      path = tmp_path / "IMAGES" / split / f"class{i % 2}" / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
  network = foreign_layouts.vit()
  safetensors.numpy.save_file(network, tmp_path / "vit.safetensors")
  parts = {"backbone": network, "head": foreign_layouts.head(prototypes=64)}
  teacher = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
  torch_format.save(tmp_path / "checkpoint.pth", {"teacher": teacher, "epoch": 3})
  return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_of_the_page_runs(page, folder, capsys):
  found = commands(page)
  assert found
  for i, command in enumerate(found):
    workdir = re.search(r"--workdir=(\S+)", command)
    last = workdir is not None and workdir[1] not in " ".join(found[i + 1 :])
    needs = "$PROTOJAX_DATA_DIR" in command or "data_dir=DATA" in command
    if needs and not (_DATA / "cifar10").is_dir():
      pytest.skip("needs the prepared CIFAR-10")
    verb = " ".join(command.split()[:2])
    again = any(before.startswith(verb) for before in found[:i])
    run(command, folder, capsys, last=last, again=again)


def test_the_site_knows_every_page_and_no_other():
  text = (ROOT / "mkdocs.yml").read_text()
  listed = re.findall(r"^  - (\S+\.(?:md|ipynb))$", text, re.MULTILINE)
  there = {p.name for pattern in ("*.md", "*.ipynb") for p in (ROOT / "docs").glob(pattern)}
  assert set(listed) == there | {"index.md", "contributing.md"}  # README, CONTRIBUTING
  assert len(listed) == len(set(listed))


def test_a_command_that_nobody_knows_is_an_error(folder, capsys):
  with pytest.raises(AssertionError, match="does not know how to run 'rm -rf /'"):
    run("rm -rf /", folder, capsys)


def test_tables_of_the_readme_are_those_of_the_published_results():
  """Every number of the two tables is in docs/results/cifar10/ROW.json, from a result.json."""
  readme = (ROOT / "README.md").read_text()
  readme = readme.replace(collect.published_section(readme), "")  # has a test of its own
  shown = [line for line in readme.splitlines() if line.startswith("|") and line.count("|") > 10]
  rows = [line for table in cifar10.tables() for line in table.splitlines()]
  assert rows == shown


def test_table_of_storage_sizes_is_that_of_its_results():
  rows = json.loads(storage.RESULTS.read_text())["rows"]
  page = (ROOT / "docs" / "data.md").read_text()
  assert storage.table(rows) in page
  (at_512,) = (row["cap"] for row in rows if row["size"] == 512)
  assert all(kept == [1.0, 0.0] for kept in at_512.values())  # photos of 500 pixels: nothing lost


def test_tables_of_causes_weights_tails_and_precision_are_those_of_their_results():
  causes = json.loads(collapse_causes.RESULTS.read_text())
  assert collapse_causes.tables(causes) in (ROOT / "docs" / "collapse.md").read_text()
  instruments = (ROOT / "docs" / "instruments.md").read_text()
  for module in (adapt, long_tail):
    assert module.table(json.loads(module.RESULTS.read_text())) in instruments
  errors_of = json.loads(precision.RESULTS.read_text())["errors"]
  assert precision.table(errors_of) in (ROOT / "docs" / "scale.md").read_text()
  beside = json.loads(beside_pytorch.RESULTS.read_text())["rows"]
  assert beside_pytorch.table(beside) in (ROOT / "benchmarks" / "README.md").read_text()


def test_table_of_slices_is_that_of_its_results():
  """docs/scale.md holds what `benchmarks.scaling` has written last, or that nothing is written."""
  assert scaling.section(scaling.published()) in scaling.PAGE.read_text()


def test_table_of_the_quickstart_is_that_of_its_published_results():
  """Three seeds a row; what the README says of them holds for each."""
  assert quickstart.table() in (ROOT / "README.md").read_text()
  rows = quickstart.published()["rows"]
  assert list(rows) == list(quickstart.ROWS) and all(len(runs) == 3 for runs in rows.values())
  for joint, decoupled in zip(rows["joint"], rows["decoupled"], strict=True):
    assert decoupled["collapse/unique_0.25"] > joint["collapse/unique_0.25"]
    assert decoupled["collapse/unique_0.5"] > joint["collapse/unique_0.5"] + 0.2


def test_tables_of_the_early_warning_are_those_of_the_zoo():
  """Every fault was named, every slow run told so, no healthy run was: those of the README, too."""
  page = (ROOT / "docs" / "collapse.md").read_text()
  assert all(table in page for table in collapse_zoo.tables())
  records = collapse_zoo.published()
  assert set(records) == set(collapse_zoo.CASES)
  assert all(records[name]["label"] for name in collapse_zoo.FAULTS)
  assert all(set(records[name]["labels"]) <= _IDLE for name in collapse_zoo.SLOW)
  assert all(records[name]["labels"] for name in collapse_zoo.SLOW)
  healthy = {name: records[name] for name in collapse_zoo.HEALTHY}
  assert all(not r["labels"] and r["last"] == "ok" for r in healthy.values())
  of_readme = [r["verdict"] for r in cifar10.published().values() if "verdict" in r]
  assert of_readme.count("ok") == 16 and set(of_readme) <= {"ok", *_IDLE}
  assert len(healthy) + of_readme.count("ok") >= 20 and len(collapse_zoo.FAULTS) >= 8


_OF_FEWER = ("floor/knn", "floor/linear")


def test_every_published_ok_is_well_above_its_untrained_net():
  """By the two standard deviations that the verdict asks for, so that it is the same by them."""
  ok = [r["measures"] for r in collapse_zoo.published().values() if r["last"] == "ok"]
  rows = cifar10.published()
  floor = {
    "floor/knn_untrained": rows["untrained encoder"]["probe/knn"],
    "floor/knn_pixels": rows["raw pixels"]["probe/knn"],
    "floor/linear_pixels": rows["raw pixels"]["probe/linear_fitted"],
    "floor/test_images": 10_000,
  }
  # Accuracies on fewer images have floors of their own.
  whole = [{k: v for k, v in row.items() if k not in _OF_FEWER} for row in rows.values()]
  ok += [row | floor for row in whole if row.get("verdict") == "ok"]
  for row in (*ok, *quickstart.published()["rows"]["decoupled"]):
    known = {
      k: v for k, v in row.items() if k.startswith(("floor/", "probe/knn", "probe/linear_f"))
    }
    known |= {"collapse/rankme": 20.0}
    assert verdicts.judge(known, num_prototypes=0, step=None).label == "ok"
  assert len(ok) == 21


_IDLE = {"little learned yet", "unique but unused"}


def test_the_page_of_faults_is_what_the_tests_say():
  survives = runpy.run_path(str(ROOT / "docs" / "survives.py"))
  rows = list(survives["rows"]())
  assert len(rows) > 40 and all(all(row[:4]) for row in rows)
  assert survives["PAGE"].read_text() == survives["page"](), "run python docs/survives.py"


def test_the_page_of_claims_is_what_the_results_say():
  assert results.PAGE.read_text() == results.page(), "run python -m benchmarks.results"
  value = results.Value
  assert results._above(value(3.0, 0.5, 3), value(1.9, 0.5, 3))
  assert not results._above(value(3.0, 0.5, 3), value(2.1, 0.5, 3))
  assert not results._above(value(3.0, 0.0, 1), value(1.0, 0.0, 1))  # one seed
