"""What the package promises before any array exists: its imports, its size, its scripts."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from protojax import __main__, errors, main

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
_SCRIPTS = [*sorted((_ROOT / "launch").glob("*.sh")), _ROOT / ".ci" / "run"]
# Imports go from a room to those before it; modules beside the rooms are rooms of one.
_ROOMS = (
  *("errors", "environment", "files", "npy", "sizes", "trees", "own_modules"),
  *("program_log", "progress", "schedules", "losses", "hosts", "local_devices", "placement"),
  *("prototypes", "models", "data", "metrics", "evals", "methods", "config", "recipes"),
  *("typed", "resolving", "training", "planning", "pretrained", "loading", "interop"),
  *("reports", "diagnosing", "evaluating", "verifying", "api", "cli"),
)
_VERBS = (*__main__.MODULES.values(), "__main__")
# Only checkpoint.py knows orbax, only these know flax, so that either can be exchanged.
_LAYERS = {
  "orbax": ("protojax/training/checkpoint.py",),
  "flax": (
    "protojax/models/",
    "protojax/training/train_step.py",
    "protojax/methods/base.py",
    "protojax/trees.py",
  ),
}


def _canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def _floors(requirements: list[str]) -> dict[str, str]:
  """{canonical name: version} of lines such as "name>=1.2,<3" or "name==1.2"."""
  matches = [re.match(r"([\w.-]+)(?:>=|==)([\w.]+)", r) for r in requirements]
  assert all(matches), f"a requirement has no floor: {requirements}"
  return {_canonical(m[1]): m[2] for m in matches}


def _declared(*extras: str) -> dict[str, str]:
  lines = _PROJECT["dependencies"] + sum(
    (_PROJECT["optional-dependencies"][extra] for extra in extras), []
  )
  return _floors(lines)


def _constraints() -> dict[str, str]:
  lines = (_ROOT / "launch" / "floors.txt").read_text().splitlines()
  return _floors([line for line in lines if line and not line.startswith("#")])


def _files(*folders: str) -> list[pathlib.Path]:
  files = sorted(f for folder in folders for f in (_ROOT / folder).rglob("*.py"))
  assert files
  return files


_PACKAGE = _files("protojax")


def _imports(file: pathlib.Path) -> set[str]:
  """The dotted names that a file imports anywhere, also inside functions."""
  names = set()
  for node in ast.walk(ast.parse(file.read_text(), str(file))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names.add(node.module)
  return names


def _top(names: set[str]) -> set[str]:
  return {name.partition(".")[0] for name in names}


def _name(file: pathlib.Path) -> str:
  return file.relative_to(_ROOT).as_posix()


def _python(code: str) -> str:
  environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_floors_file_agrees_with_pyproject():
  assert _constraints() == _declared("test")


@pytest.mark.skipif(
  "PROTOJAX_AT_FLOORS" not in os.environ, reason="this environment was not made from the floors"
)
def test_the_suite_runs_with_exactly_the_floors():
  assert {name: importlib.metadata.version(name) for name in _constraints()} == _constraints()


@pytest.mark.parametrize(
  "folder, extras",
  [
    ("protojax", ("onnx", "tiff", "wandb")),
    ("configs", ()),
    ("tests", ("test", "peers", "onnx")),
    ("benchmarks", ("test", "peers")),
  ],
)
def test_every_import_is_a_declared_dependency(folder, extras):
  declared = set(_declared(*extras))
  distributions = importlib.metadata.packages_distributions()
  own = {"protojax", "configs", "benchmarks", "tests"} | set(sys.stdlib_module_names)
  own |= {file.stem for file in _files("tests")}
  own |= {"jax2onnx"}  # optional, and its requirements contradict ours: see the extra "onnx"
  undeclared = {
    f"{_name(file)}: {module}"
    for file in _files(folder)
    for module in _top(_imports(file)) - own
    if not declared & {_canonical(d) for d in distributions.get(module, [module])}
  }
  assert not undeclared


def test_no_module_imports_tensorflow_or_torch():
  assert not [_name(f) for f in _files("protojax") if {"tensorflow", "torch"} & _top(_imports(f))]


@pytest.mark.parametrize("library", _LAYERS)
def test_a_replaceable_library_is_imported_only_by_its_layer(library):
  users = {_name(f) for f in _files("protojax") if library in _top(_imports(f))}
  assert not {u for u in users if not u.startswith(_LAYERS[library])}


def _rooms_imported(file: pathlib.Path) -> set[str]:
  """The rooms that a module of protojax imports from, its own included."""
  rooms = set()
  for node in ast.walk(ast.parse(file.read_text(), str(file))):
    if isinstance(node, ast.ImportFrom) and node.module == "protojax":
      rooms |= {alias.name for alias in node.names} - {"__version__"}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("protojax."):
      rooms.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("protojax.")}
  return rooms


def test_imports_go_from_a_room_to_those_before_it():
  order = {room: i for i, room in enumerate(_ROOMS)} | dict.fromkeys(_VERBS, len(_ROOMS))
  files = [f for f in _files("protojax") if f != _ROOT / "protojax" / "__init__.py"]
  backwards = {}
  for file in files:
    room = file.relative_to(_ROOT / "protojax").with_suffix("").parts[0]
    assert room in order, f"{_name(file)}: no room of that name; see docs/architecture.md"
    wrong = {r for r in _rooms_imported(file) if r != room and order[r] >= order[room]}
    if wrong:
      backwards[_name(file)] = wrong
  assert not backwards


def test_the_list_of_modules_in_the_architecture_is_whole_and_in_the_order_of_imports():
  text = (_ROOT / "docs" / "architecture.md").read_text().partition("## Every module")[2]
  listed = re.findall(r"`([\w/]+\.py)`", text)
  modules = [f.relative_to(_ROOT / "protojax").as_posix() for f in _PACKAGE]
  edit = 'edit docs/architecture.md, "Every module"'
  lacks, gone = set(modules) - set(listed), set(listed) - set(modules)
  assert not lacks and not gone, f"{edit}: add {sorted(lacks)}, take out {sorted(gone)}"
  assert sorted(listed) == sorted(modules), f"{edit}: a module is there twice"
  rooms = dict.fromkeys(name.removesuffix(".py").split("/")[0] for name in listed[1:])
  order = [*_ROOMS, *_VERBS]
  assert list(rooms) == order, f"{edit}: its order is not that of the imports, {order}"


def test_importing_every_module_loads_no_tensorflow_and_starts_no_backend():
  # Once a backend runs, JAX refuses another number of CPU devices.
  seen = _python("""
import importlib, pkgutil, sys
import jax, protojax
modules = [m.name for m in pkgutil.walk_packages(protojax.__path__, "protojax.")]
for module in modules:
  importlib.import_module(module)
  jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
print(len(modules), "tensorflow" in sys.modules, "torch" in sys.modules)
""")
  number, *loaded = seen.split()
  assert int(number) >= len([f for f in _files("protojax") if f.name != "__init__.py"])
  assert loaded == ["False", "False"]


def test_tensorflow_datasets_comes_up_without_tensorflow():
  code = "import sys, tensorflow_datasets; print('tensorflow' in sys.modules)"
  assert _python(code) == "False"


def test_every_folder_of_modules_is_a_package_that_gets_installed():
  folders = {file.parent for file in _files("protojax")}
  assert not [_name(folder) for folder in folders if not (folder / "__init__.py").exists()]
  project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
  built = project["tool"]["hatch"]["build"]["targets"]["wheel"]
  # And the recipes, where protojax/recipes.py looks for them.
  assert built["only-include"] == ["protojax", "configs"]
  assert built["sources"] == {"configs": "protojax/configs"}


def test_the_clone_s_own_folder_is_no_package_that_hides_it(tmp_path):
  """Who cloned it runs Python in the folder above, where the clone is a folder called protojax."""
  (tmp_path / "protojax").mkdir()
  code = "import protojax; print(protojax.__file__)"
  seen = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
  ).stdout
  assert pathlib.Path(seen.strip()) == _ROOT / "protojax" / "__init__.py"


def test_public_functions_say_what_they_return():
  silent = []
  for file in _PACKAGE:
    for node in ast.parse(file.read_text()).body:
      inside = node.body if isinstance(node, ast.ClassDef) else [node]
      functions = [f for f in inside if isinstance(f, ast.FunctionDef) and f.name[0] != "_"]
      silent += [f"{_name(file)}: {f.name}" for f in functions if f.returns is None]
  assert not silent


def test_version_is_said_twice_alike():
  assert f'__version__ = "{_PROJECT["version"]}"' in (_ROOT / "protojax/__init__.py").read_text()


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda s: s.name)
def test_script_parses_and_stops_at_the_first_failure(script):
  subprocess.run(["bash", "-n", script], check=True)
  if script.name != "venv.sh":  # only sourced
    assert "\nset -euo pipefail\n" in script.read_text()


def test_ci_entry_is_executable():
  assert os.access(_ROOT / ".ci" / "run", os.X_OK)


def _command(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)


def _bash(code: str, **environment) -> subprocess.CompletedProcess:
  # Found here, so that a test may give it another PATH.
  command = [shutil.which("bash"), "-c", f"source '{_ROOT}/launch/venv.sh'\n{code}"]
  environment = {"PATH": os.environ["PATH"], **environment}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_python_command_that_does_not_run_is_passed_over(tmp_path):
  this = f"{sys.version_info.major}.{sys.version_info.minor}"
  working = tmp_path / ".pyenv" / "versions" / f"{this}.0" / "bin" / "python"
  _command(tmp_path / "bin" / f"python{this}", "exit 127")
  _command(working, f'exec "{sys.executable}" "$@"')
  done = _bash(f"find_python 3.99 {this}", HOME=str(tmp_path), PATH=str(tmp_path / "bin"))
  assert done.stdout.strip() == str(working), done.stderr


def test_a_missing_python_is_one_line(tmp_path):
  done = _bash("require_python 3.98 3.99", HOME=str(tmp_path))
  assert done.returncode == 1 and done.stdout == ""
  assert len(done.stderr.strip().splitlines()) == 1 and "3.98 3.99" in done.stderr


def test_a_python_is_downloaded_where_the_machine_s_is_too_old(tmp_path):
  uv = 'echo "$@" >>"$HOME/log"; [ "$2" != find ] || echo /there/python3.12'
  _command(tmp_path / ".local" / "bin" / "uv", uv)
  done = _bash("find_python 3.99 || fetch_python 3.12", HOME=str(tmp_path))
  assert done.stdout.strip() == "/there/python3.12", done.stderr
  assert (tmp_path / "log").read_text() == "python install --quiet 3.12\npython find 3.12\n"


def test_an_environment_is_not_made_over_other_files(tmp_path):
  (tmp_path / "thesis.tex").write_text("x")
  done = _bash(f"cd '{_ROOT}' && make_venv '{tmp_path}' '{sys.executable}' -e .", HOME="/")
  assert done.returncode == 1 and "move it away" in done.stderr
  assert (tmp_path / "thesis.tex").exists()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  """A git clone that holds one commit and the launch scripts."""
  folder = tmp_path_factory.mktemp("clone")
  shutil.copytree(_ROOT / "launch", folder / "launch")
  identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
  for command in ["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]:
    subprocess.run(["git", *command], cwd=folder, check=True)
  return folder


def _tpu(clone, *arguments, first="--dry-run", **names):
  environment = {"PATH": os.environ["PATH"], "HOME": str(clone), **names}
  command = [
    "bash",
    "launch/tpu_pod.sh",
    *[first] * bool(first),
    "--config=configs/x.py",
    *arguments,
  ]
  return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
  "workdir", [["--workdir=/mnt/shared/run"], ["--workdir", "/mnt/shared/run"]]
)
def test_tpu_dry_run_prints_every_command_and_needs_no_gcloud(clone, workdir):
  done = _tpu(clone, *workdir, NAME="pod", ZONE="z", PROJECT="p")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.strip().splitlines()
  assert [line.split()[:2] for line in lines[:2]] == [["git", "archive"], ["gcloud", "compute"]]
  gcloud = [line for line in lines if line.startswith("gcloud")]
  assert len(gcloud) == 4
  assert all(x in line for line in gcloud for x in ("pod", "--zone=z", "--project=p", "worker=all"))
  assert "make_venv" in gcloud[2] and "ServerAliveInterval" in gcloud[3]
  assert all(x in gcloud[3] for x in ("protojax.main", "--config=configs/x.py", "/mnt/shared/run"))


# A slice whose state is a file, and whose runs end as the lines of another say: STATUS STATE, and
# how often nothing is to be learned of the slice behind it.
_GCLOUD = """
echo "$4 $*" | cut -c1-600 | tr '\\n' ' ' >>{log}; echo >>{log}
case "$4" in
  describe)
    read -r down <{down}
    if [ "$down" -gt 0 ]; then
      echo $((down - 1)) >{down}
      echo "ERROR: Network is unreachable" >&2
      exit 1
    fi
    cat {state} 2>/dev/null || {{ echo "NOT_FOUND: nodes/pod was not found" >&2; exit 1; }} ;;
  create) echo READY >{state} ;;
  delete) rm {state} ;;
  ssh)
    case "$*" in *"-m protojax.main"*)
      read -r status after down <{ends}
      sed -i 1d {ends}
      echo ${{down:-0}} >{down}
      echo $after >{state}
      exit $status ;;
    esac ;;
esac
"""


@pytest.mark.parametrize(
  ("ends", "kind", "status", "did"),
  [
    (["0 READY"], "x", 0, "create run"),
    (
      ["143 PREEMPTED", "255 PREEMPTED", "0 READY"],
      "x",
      0,
      "create run" + " delete create clear run" * 2,
    ),
    (["75 READY", "137 READY", "0 READY"], "x", 0, "create run clear run clear run"),
    (["75 READY"] * 9, "x", 75, "create run clear run clear run clear run clear run"),
    (["143 READY"], "x", 143, "create run"),  # somebody has asked it to stop
    (["2 READY"], "x", 2, "create run"),
    (["143 PREEMPTED"], "", 1, "run"),  # nobody has said what to make
    (["255 READY 2", "0 READY"], "", 0, "run clear run"),  # this machine was off the network
    (["255 READY 9", "0 READY"], "x", 0, "create run clear run"),
    (["255 READY 999"], "x", 1, "create run"),
  ],
)
def test_tpu_launch_makes_a_preempted_slice_again_and_goes_on(
  clone, tmp_path, ends, kind, status, did
):
  log, state, script, down = (tmp_path / name for name in ("log", "state", "ends", "down"))
  down.write_text("0\n")
  script.write_text("".join(f"{line}\n" for line in ends))
  if not kind:
    state.write_text("READY\n")
  _command(
    tmp_path / "bin" / "gcloud", _GCLOUD.format(log=log, state=state, ends=script, down=down)
  )
  _command(tmp_path / "bin" / "sleep", "exit 0")
  names = {
    "NAME": "pod",
    "ZONE": "z",
    "PROJECT": "p",
    "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
  }
  names |= {"TYPE": kind, "VERSION": "v", "SPOT": "yes"}
  done = _tpu(clone, "--workdir=/mnt/shared/run", first="", **names, TMPDIR=str(tmp_path))
  assert done.returncode == status, done.stderr
  calls = []
  for line in log.read_text().splitlines():
    if "-m protojax.main" in line or "pkill" in line:
      calls.append("run" if "-m protojax.main" in line else "clear")
    elif line.split()[0] in ("create", "delete"):
      calls.append(line.split()[0])
  assert " ".join(calls) == did
  assert kind or status == 0 or "TYPE=... and" in done.stderr
  if status == 1 and kind:
    said = "tpu_pod.sh: nothing could be learned of pod for an hour: ERROR: Network is unreachable"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize("missing", ["NAME", "ZONE", "PROJECT"])
def test_tpu_launch_asks_for_what_it_lacks(clone, missing):
  names = {name: "x" for name in ("NAME", "ZONE", "PROJECT") if name != missing}
  done = _tpu(clone, "--workdir=/mnt/shared/run", **names)
  assert done.returncode != 0 and done.stdout == "" and f"{missing}: " in done.stderr


@pytest.mark.parametrize("workdir", ["runs/x", "gs://b/run", "/"])
def test_tpu_launch_refuses_a_workdir_that_hosts_do_not_share(clone, workdir):
  done = _tpu(clone, f"--workdir={workdir}", NAME="pod", ZONE="z", PROJECT="p")
  assert done.returncode == 1 and done.stdout == "" and "must be an absolute path" in done.stderr


def _launch(script: str, tmp_path, *arguments, **names) -> subprocess.CompletedProcess:
  """Runs a launch script with stand-ins from `tmp_path`: commands in bin, an environment in env."""
  path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
  names = {"PATH": path, "HOME": str(tmp_path), "VIRTUAL_ENV": str(tmp_path / "env"), **names}
  command = ["bash", _ROOT / "launch" / script, *arguments]
  return subprocess.run(command, env=names, capture_output=True, text=True, timeout=60)


def test_slurm_process_takes_every_gpu_of_its_node(tmp_path):
  _command(tmp_path / "bin" / "srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
  _command(tmp_path / "env" / "bin" / "python", 'echo "$JAX_LOCAL_DEVICE_IDS" "$@"')
  names = {"SLURM_SUBMIT_DIR": str(_ROOT), "SLURM_GPUS_ON_NODE": "4"}
  done = _launch("slurm.sh", tmp_path, "--config=x", "--config.name=two words", **names)
  expected = "0,1,2,3 -m protojax.main --config=x --config.name=two words"
  assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
  ("status", "restarts", "again"),
  [
    *((0, 0, False), (1, 0, False), (2, 0, False), (130, 0, False)),
    *((143, 0, True), (143, 9, True), (75, 0, True), (137, 0, True), (75, 5, False)),
  ],
)
def test_slurm_job_is_queued_again_by_the_status_of_the_run(tmp_path, status, restarts, again):
  _command(tmp_path / "bin" / "srun", f'echo "$*"; exit {status}')
  _command(tmp_path / "bin" / "scontrol", 'echo "scontrol $*"')
  _command(tmp_path / "env" / "bin" / "python", "exit 1")
  names = {"SLURM_SUBMIT_DIR": str(_ROOT), "SLURM_JOB_ID": "7"}
  names |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
  done = _launch("slurm.sh", tmp_path, "--config=x", "--config.overwrite", **names)
  assert done.returncode == status, done.stderr
  assert ("scontrol requeue 7" in done.stdout) == again
  # Who goes on must not delete what there is.
  assert ("--config.overwrite --config.overwrite=False" in done.stdout) == bool(restarts)


def test_slurm_job_that_is_cancelled_does_not_come_back(tmp_path):
  _command(tmp_path / "bin" / "srun", "kill -TERM $PPID; sleep 1; exit 143")
  _command(tmp_path / "bin" / "scontrol", 'echo "scontrol $*"')
  _command(tmp_path / "env" / "bin" / "python", "exit 1")
  names = {"SLURM_SUBMIT_DIR": str(_ROOT), "SLURM_JOB_ID": "7"}
  done = _launch("slurm.sh", tmp_path, "--config=x", **names)
  assert done.returncode == 143 and done.stdout == ""


def test_slurm_job_at_the_end_of_its_time_tells_its_processes_to_stop(tmp_path):
  told = tmp_path / "told"
  _command(
    tmp_path / "bin" / "srun",
    f"kill -USR1 $PPID; while [ ! -e {told} ]; do sleep .1; done; exit 143",
  )
  _command(tmp_path / "bin" / "scancel", f'echo "scancel $*"; touch {told}')
  _command(tmp_path / "bin" / "scontrol", 'echo "scontrol $*"')
  _command(tmp_path / "env" / "bin" / "python", "exit 1")
  names = {"SLURM_SUBMIT_DIR": str(_ROOT), "SLURM_JOB_ID": "7"}
  done = _launch("slurm.sh", tmp_path, "--config=x", **names)
  said = [line for line in done.stdout.splitlines() if line.startswith("sc")]
  assert said == ["scancel --signal=TERM 7", "scontrol requeue 7"] and done.returncode == 143


def test_jobset_starts_the_same_program_and_gives_up_where_slurm_does():
  yaml = pytest.importorskip("yaml")  # ml-collections brings it along
  jobset = yaml.safe_load((_ROOT / "launch" / "jobset.yaml").read_text())
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  nodes = container["env"][0]["value"]
  assert job["parallelism"] == job["completions"] == int(nodes) and job["backoffLimit"] == 0

  # The shell that starts it hands over: the signal must reach the program.
  words = shlex.split(container["command"][2])
  assert words[:4] == ["exec", "python", "-m", "protojax.main"] and pod["shareProcessNamespace"]
  values = {"$NODES": nodes, "$JOB_COMPLETION_INDEX": "3"}
  for name, value in values.items():
    words = [word.replace(name, value) for word in words]
  _, args = main.parse(words[4:])
  assert (args.num_processes, args.process_id) == (4, 3)
  host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
  assert args.coordinator_address.partition(":")[0] == host

  (rule,) = job["podFailurePolicy"]["rules"]
  codes = rule["onExitCodes"]
  assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
  assert codes["containerName"] == container["name"] and pod["restartPolicy"] == "Never"
  (given_up,) = jobset["spec"]["failurePolicy"]["rules"]
  assert given_up["action"] == "FailJobSet"
  assert given_up["onJobFailureReasons"] == ["PodFailurePolicy"]
  again = {143, *_again("slurm.sh")}
  assert set(codes["values"]) == again == {75, 137, 143} and errors.LOST in again
  assert pod["terminationGracePeriodSeconds"] == 120
  table = (_ROOT / "docs" / "accelerators.md").read_text()
  assert "| 143 | " in table and "| 75, 137 | " in table and "| 2, 1 and the rest | " in table


def _again(script: str) -> set[int]:
  """The statuses of a lost process, as a launch script has them."""
  (found,) = re.findall(r"^ *((?:\d+ \| )+\d+)\) ", (_ROOT / "launch" / script).read_text(), re.M)
  return {int(status) for status in found.split(" | ")}


def test_gpu_launch_without_a_gpu_is_one_line(tmp_path):
  _command(tmp_path / "bin" / "nvidia-smi", "exit 9")
  done = _launch("gpu_local.sh", tmp_path, "--config=x")
  assert done.returncode == 1 and done.stdout == ""
  assert len(done.stderr.strip().splitlines()) == 1 and "no NVIDIA GPU" in done.stderr


def test_gpu_launch_with_a_gpu_but_a_jax_for_cpu_says_what_to_install(tmp_path):
  _command(tmp_path / "bin" / "nvidia-smi", "exit 0")
  _command(tmp_path / "env" / "bin" / "python", "exit 1")
  done = _launch("gpu_local.sh", tmp_path, "--config=x")
  assert done.returncode == 1 and done.stdout == "" and "pip install -e '.[cuda]'" in done.stderr
