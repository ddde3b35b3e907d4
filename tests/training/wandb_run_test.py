"""Against a stand-in for the package wandb, which is not installed where tests run."""

import sys
import types

import pytest
import tiny

from protojax.training import console, metric_writer, wandb_run, workdir


class _Run:
  url = "https://wandb.test/run"

  def __init__(self, offline, fails):
    self.offline, self.fails = offline, fails
    self.rows, self.axes, self.finished = [], [], False

  def define_metric(self, name, step_metric=None):
    self.axes.append((name, step_metric))

  def log(self, row):
    if "log" in self.fails:
      raise OSError("the network\nis gone")
    self.rows.append(row)

  def finish(self):
    self.finished = True
    if "finish" in self.fails:
      raise OSError("no end")


@pytest.fixture
def wandb(monkeypatch):
  """The stand-in: `calls` of init and the `runs` they gave; `fails` names what raises."""
  module = types.ModuleType("wandb")
  module.calls, module.runs, module.fails = [], [], set()
  module.Settings = dict
  held = set()  # ids, also by an init that failed

  def init(**options):
    module.calls.append(options)
    offline = options.get("mode") == "offline"
    if options["id"] in held:
      raise RuntimeError("run ID is in use")
    if "init" in module.fails and not offline:
      held.add(options["id"])
      raise RuntimeError("No API key configured.")
    module.runs.append(_Run(offline, module.fails))
    return module.runs[-1]

  module.init, module.teardown = init, held.clear
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def _start(folder):
  return wandb_run.WandbRun("project", folder, {"seed": 0})


def _warnings(caplog):
  return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_a_resumed_run_goes_on_under_its_id(wandb, tmp_path):
  for step in (1, 2):
    run = _start(tmp_path)
    run.write(step, {"train/loss": 2.0})
    run.close()
    run.close()
  first, second = wandb.calls
  assert first["id"] == second["id"] == (tmp_path / "wandb_run_id").read_text()
  assert first["resume"] == "allow" and first["project"] == "project"
  assert first["config"] == {"seed": 0} and first["dir"] == str(tmp_path)
  assert [r.rows for r in wandb.runs] == [[{"step": n, "train/loss": 2.0}] for n in (1, 2)]
  # Steps that are done again after a crash are no error there.
  assert wandb.runs[0].axes == [("step", None), ("*", "step")]
  assert all(r.finished for r in wandb.runs)
  assert wandb_run.RUN_ID in workdir._OURS  # a run that is overwritten starts anew there


def test_what_cannot_be_reached_is_kept_offline_with_one_warning(wandb, tmp_path, caplog):
  wandb.fails.add("init")
  _start(tmp_path).write(3, {"a": 1.0})
  assert [c.get("mode") for c in wandb.calls] == [None, "offline"]
  assert wandb.runs[0].rows == [{"step": 3, "a": 1.0}]
  (line,) = _warnings(caplog)
  assert "wandb sync" in line and "No API key" in line


def test_what_fails_on_the_way_costs_one_warning_and_no_training(wandb, tmp_path, caplog):
  wandb.fails |= {"log", "finish"}
  run = _start(tmp_path)
  for step in range(3):
    run.write(step, {"a": 1.0})
  run.close()
  (line,) = _warnings(caplog)
  assert "training goes on without (OSError: the network is gone)" in line


def test_a_missing_package_is_one_warning(monkeypatch, tmp_path, caplog):
  monkeypatch.setitem(sys.modules, "wandb", None)
  run = _start(tmp_path)
  run.write(1, {"a": 1.0})
  run.close()
  (line,) = _warnings(caplog)
  assert 'pip install "protojax[wandb]"' in line and not list(tmp_path.iterdir())


def test_the_writer_sends_finite_numbers_and_closes_it(wandb, tmp_path):
  with metric_writer.Writer(tmp_path, total_steps=9, online=lambda: _start(tmp_path)) as out:
    out.write(4, {"loss": 1.5, "bad": float("nan"), "verdict": "ok"})
  assert wandb.runs[0].rows == [{"step": 4, "loss": 1.5}] and wandb.runs[0].finished


def test_other_processes_do_not_start_one(wandb, tmp_path):
  with metric_writer.Writer(
    tmp_path, total_steps=9, lead=False, online=lambda: _start(tmp_path)
  ) as out:
    out.write(4, {"loss": 1.5})
  assert not wandb.calls


def test_a_run_is_sent_only_where_its_config_names_a_project(wandb, tmp_path):
  config = tiny.config()
  console.RunLog(tmp_path, config, start=0, describe=str).__exit__(None, None, None)
  assert not wandb.calls
  config.wandb = "digits"
  console.RunLog(tmp_path, config, start=0, describe=str).__exit__(None, None, None)
  assert [(c["project"], c["name"]) for c in wandb.calls] == [("digits", tmp_path.name)]
  assert wandb.calls[0]["config"]["method"]["name"] == "dino"
