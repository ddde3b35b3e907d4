"""How soon the monitor names a collapse, and whether it cries wolf: the tables of docs/collapse.md.

  python benchmarks/collapse_zoo.py --workdir=runs/zoo [--cases ...]

Trains small nets on scikit-learn's digits, 400 steps of 64 images if nothing else is said. Each
healthy recipe must come to its end without an alarm, which is any verdict but "ok" and those that
say that too little was seen; each slow one must be called "little learned yet" at its end; each
deliberate fault must be named, and runs with a fault have monitor.stop_on_collapse. The monitor
looks every 20 steps and says nothing before step 100; k-NN is measured at the end. Faults are
settings where a setting can do it; the others (`tamper`) are bugs as they happen in one's own
training code. Every line of metrics.jsonl is judged, by what was known then; --judge does it again
without training. Writes docs/results/collapse_zoo.json and prints the tables.
"""

import argparse
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from protojax import errors, methods, recipes
from protojax.methods import base
from protojax.metrics import verdicts
from protojax.reports import record as records
from protojax.training import loop

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "collapse_zoo.json"


def _aliased(method: base.Method) -> base.Method:
  """The teacher is the student, as when both names hold one array."""

  def update(variables, stats, step):
    variables = method.update(variables, stats, step)
    return variables.replace(teacher={**variables.teacher, "encoder": variables.encoder})

  return method._replace(update=update)


def _duplicated(method: base.Method) -> base.Method:
  """Every prototype is one of eight."""

  def init(key):
    variables = method.init(key)

    def copies(rows):
      return jnp.tile(rows[:8], (rows.shape[0] // 8, *[1] * (rows.ndim - 1)))

    return variables.replace(
      prototypes=jax.tree.map(copies, variables.prototypes),
      teacher={**variables.teacher, "prototypes": jax.tree.map(copies, variables.prototypes)},
    )

  return method._replace(init=init)


def _dead(method: base.Method) -> base.Method:
  """No hidden unit of the projector is ever above 0 (with head.activation=relu)."""

  def init(key):
    variables = method.init(key)

    def kill(path, leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      hidden = name.startswith("head/fc") and name.endswith("bias")
      return leaf - 100.0 if hidden else leaf

    encoder = jax.tree_util.tree_map_with_path(kill, variables.encoder)
    return variables.replace(
      encoder=encoder, teacher={**variables.teacher, "encoder": jax.tree.map(jnp.copy, encoder)}
    )

  return method._replace(init=init)


class Case(NamedTuple):
  """Attributes:
  recipe: in configs/, brought to digits by `on_digits`.
  changes: settings by dotted key with "__".
  steps: of the run.
  tamper: what happens to the method.
  """

  recipe: str
  changes: dict = {}
  steps: int = 400
  tamper: Callable[[base.Method], base.Method] | None = None


# Without it joint prototypes stay at ln K here: the monitor is right to stop them at step 100.
_NORMED = {"head__norm": "batch"}
_CENTRED = {
  **_NORMED,
  "method__targets": "center",
  "method__teacher_temp_start": 0.04,
  "method__teacher_temp": 0.04,
  "optim__lr": 1e-3,
}
_SMALL = {"model__width": 48, "model__depth": 2, "head__hidden": 256, "head__bottleneck": 256}
HEALTHY = {
  "dino, mixture, 1,000 steps": Case("gmm_cifar10", _NORMED, 1000),
  "self-classifier": Case("self_classifier_cifar10"),
  "falcon": Case("falcon_cifar10"),
  "vicreg": Case("vicreg_cifar10"),
  "vicreg, small net": Case("vicreg_cifar10", _SMALL),
}
# They do not collapse, and 400 steps are too few for them.
SLOW = {
  "dino, mixture": Case("gmm_cifar10"),
  "dino, joint": Case("dino_cifar10", _NORMED),
  "dino, joint, centred": Case("dino_cifar10", _CENTRED),
  "dino, frozen": Case("frozen_cifar10", _NORMED),
  "ibot, mixture": Case("ibot_cifar10", {"method__prototypes": "mixture"}),
  "msn": Case("msn_cifar10"),
  "carp": Case("carp_cifar10"),
  "swav, mixture": Case("swav_cifar10", {"method__prototypes": "mixture"}),
}
FAULTS = {
  "teacher aliased": Case("gmm_cifar10", tamper=_aliased),
  "no centring": Case("dino_cifar10", {**_CENTRED, "method__center_momentum": 1.0}),
  "teacher's temperature 1": Case(
    "dino_cifar10",
    {
      **_CENTRED,
      "method__teacher_temp": 1.0,
      "method__teacher_temp_start": 1.0,
    },
  ),
  "Sinkhorn's epsilon 1": Case(
    "dino_cifar10",
    {
      **_NORMED,
      "method__teacher_temp": 1.0,
      "method__teacher_temp_start": 1.0,
    },
  ),
  "learning rate x 50": Case("dino_cifar10", {**_NORMED, "optim__lr": 0.2}),
  "joint prototypes, 8 at the start": Case("dino_cifar10", _NORMED, tamper=_duplicated),
  "mixture too soft and too fast": Case(
    "gmm_cifar10",
    {
      "mixture__kappa": 3.0,
      "mixture__horizon_steps": 10.0,
      "mixture__balanced": False,
    },
  ),
  "dead projector": Case(
    "dino_cifar10", {"head__activation": "relu", "head__norm": "none"}, tamper=_dead
  ),
  "falcon without batch norm": Case("falcon_cifar10", {"head__norm_output": False}),
}


CASES = HEALTHY | SLOW | FAULTS


def on_digits(recipe: str, changes: dict, steps: int, stop: bool):
  """A CIFAR-10 recipe on digits: steps of 64, K = 256, the quickstart's views and pace."""
  config = recipes.load(f"configs/{recipe}.py")
  digits = recipes.load("configs/quickstart.py")
  config.update(
    {
      "num_steps": steps,
      "batch_size": 64,
      "log_every": 20,
      "save_every": steps,
      "eval_every": steps,
    }
  )
  config.monitor.update({"every": 20, "stop_on_collapse": stop})
  config.data.update({"name": "digits", "data_dir": None})
  for key in ("flip", "saturation", "hue", "gray_prob", "solarize_prob", "mean", "std"):
    config.augment[key] = digits.augment[key]
  config.optim.update({"lr": digits.optim.lr, "warmup_steps": 40})
  if config.method.num_prototypes:
    config.method.num_prototypes = 256
  if "coarse_clusters" in config.method:
    config.method.coarse_clusters = (64, 128)
  for key, value in changes.items():
    section, _, leaf = key.rpartition("__")
    config[section][leaf] = value
  return config


def train(name: str, folder: pathlib.Path) -> None:
  """Trains one case; its last words, if it was stopped, go into stopped.txt."""
  case = CASES[name]
  config = on_digits(case.recipe, case.changes, case.steps, stop=name in FAULTS)
  module = methods.load(config.method.name)
  make, tamper = module.make, case.tamper or (lambda method: method)
  with mock.patch.object(module, "make", lambda c: tamper(make(c))):
    try:
      loop.run(config, str(folder))
    except errors.UserError as error:
      (folder / "stopped.txt").write_text(str(error))


def judged(name: str, folder: pathlib.Path) -> dict:
  """What is said of a case that was trained, when, and what its result says."""
  case, fault = CASES[name], name in FAULTS
  said = dict(records.history(folder))  # of two lines of a step the later one counts
  alarms = {step: found.label for step, found in said.items() if verdicts.is_alarm(found)}
  words = folder / "stopped.txt"
  result = folder / "eval" / "final" / "result.json"
  measures = json.loads(result.read_text())["measures"] if result.exists() else {}
  kept = (
    *("probe/knn", "floor/knn_pixels", "floor/knn_untrained", "floor/test_images"),
    *("collapse/used", "collapse/perplexity", "collapse/used_sample"),
    *("collapse/used_sample_random", "train/loss", "train/ln_k", "floor/loss_start"),
  )
  return {
    "case": name,
    "fault": fault,
    "recipe": case.recipe,
    "changes": case.changes,
    "steps": case.steps,
    "last": said[max(said)].label,
    "tamper": case.tamper and case.tamper.__doc__,
    "step": min(alarms, default=None),
    "label": alarms.get(min(alarms, default=None)),
    "labels": sorted(set(alarms.values())),
    "stopped": words.read_text() if words.exists() else None,
    "measures": {k: measures[k] for k in kept if k in measures},
  }


def published() -> dict[str, dict]:
  """{case: what `judged` returned} of docs/results/collapse_zoo.json, in the order of this file."""
  found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  return {name: found[name] for name in CASES if name in found}


def tables() -> list[str]:
  """Markdown: the faults, then the healthy runs and the slow ones."""
  faults = ["| fault | what was done | named at step | as | and |", "|---" * 5 + "|"]
  heads = ["run", "steps", "alarms", "at the end", "used %", "of the sample", "random ones"]
  heads += ["perplexity", "k-NN %", "untrained", "loss", "at the end", "ln K"]
  healthy = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
  for name, record in published().items():
    if record["fault"]:
      changes = ", ".join(f"`{k.replace('__', '.')}={v}`" for k, v in record["changes"].items())
      done = "; ".join(filter(None, [changes, record["tamper"]])).rstrip(".")
      also = re.search(r"\(also: ([^)]+)\)", record["stopped"] or "")
      faults.append(
        f"| {name} | {done} | {record['step'] or 'never'} | {record['label'] or '–'} | "
        f"{also[1] if also else '–'} |"
      )
    else:
      measures = record["measures"]
      cells = [
        format(scale * measures[key], form) if key in measures else "–"
        for key, scale, form in (
          ("collapse/used", 100, ".1f"),
          ("collapse/used_sample", 100, ".1f"),
          ("collapse/used_sample_random", 100, ".1f"),
          ("collapse/perplexity", 1, ".0f"),
          ("probe/knn", 100, ".1f"),
          ("floor/knn_untrained", 100, ".1f"),
          ("floor/loss_start", 1, ".2f"),
          ("train/loss", 1, ".2f"),
          ("train/ln_k", 1, ".2f"),
        )
      ]
      alarms = ", ".join(record["labels"]) or "none"
      cells = [name, str(record["steps"]), alarms, record["last"], *cells]
      healthy.append("| " + " | ".join(cells) + " |")
  return ["\n".join(faults), "\n".join(healthy)]


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="runs/zoo")
  parser.add_argument("--cases", nargs="*", default=list(CASES), metavar="CASE")
  parser.add_argument("--judge", action="store_true", help="what was trained before, again")
  arguments = parser.parse_args()
  for name in arguments.cases:
    folder = pathlib.Path(arguments.workdir) / re.sub(r"\W+", "_", name)
    if not arguments.judge:
      shutil.rmtree(folder, ignore_errors=True)
      train(name, folder)
    found = judged(name, folder)
    RESULTS.write_text(json.dumps(published() | {name: found}, indent=1, sort_keys=True) + "\n")
    jax.clear_caches()
  print("\n\n".join(tables()))
