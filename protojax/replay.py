"""What broke in a step whose loss was not finite: protojax replay --workdir=RUN --step=N

A batch follows from the seed and the number of the step, and so does everything random: the step
can be made again. It is made as it was trained and in float32, and each layer is looked at.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax import cli, errors, files, methods, progress, trees
from protojax import config as configs
from protojax.data import augment
from protojax.models import watching
from protojax.training import checkpoint, datasets, programs, train_step

_DESCRIPTION = """\
Makes one step of a run again, from the newest checkpoint before it that is left, and says which
layer was the first to be not finite: as it was trained, and in float32.

  protojax replay --workdir=runs/gmm --step=812            the 812th update, as the log counts
  protojax replay --workdir=runs/gmm --step=812 --json=step.json

Which updates were not finite stands in bad_steps.jsonl of the run, with the rows of their
batches."""


class Look(NamedTuple):
  """A step in one precision.

  Attributes:
    loss: float.
    outputs: [(module, norm of its output)] in the order of the computation; of a module that runs
      several times (views, teacher) each, "ViT/blocks_0 (2)" the second.
    gradients: {parameter: norm of its gradient}.
  """

  loss: float
  outputs: list[tuple[str, float]]
  gradients: dict[str, float]


def look(config, state: train_step.TrainState, batch: dict[str, jax.Array]) -> Look:
  """The loss of state n on batch n, its gradients, and what each module gave.

  Args:
    config: resolved; its precision is the one that is looked at.
    state: state n.
    batch: as `train_step.train_step` takes it.
  """
  config = config.copy_and_resolve_references()
  config.model.scan = False  # a loop has one body for all blocks
  config.model.remat = False
  method = methods.load(config.method.name).make(config)
  names: list[str] = []

  def loss(trained, frozen, views, key, step):
    (value, _), found = watching.norms(method.loss, trained, frozen, views, key, step)
    names[:] = [name for name, _ in found]
    return value, [norm for _, norm in found]

  @jax.jit
  def run(state, batch):
    augment_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    views = {**augment.make(config.augment)(augment_key, batch), "index": batch["index"]}
    variables = train_step.variables_of(state)
    trained, frozen = train_step.split(variables, method.learns_prototypes)
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, outputs), grads = grad(trained, frozen, views, loss_key, state.step)
    return value, outputs, jax.tree.map(watching.norm, grads)

  value, outputs, grads = jax.device_get(run(state, batch))
  return Look(
    float(value),
    [(name, float(norm)) for name, norm in zip(names, outputs, strict=True)],
    {name: float(norm) for name, norm in trees.flat(grads).items()},
  )


def first_broken(found: Look) -> str:
  """Where a step stops to be finite, as a sentence; "finite throughout" of one that is."""
  for name, norm in found.outputs:
    if not jnp.isfinite(norm):
      return f"the output of {name} is the first that is not finite"
  if not jnp.isfinite(found.loss):
    return "every layer's output is finite, the loss is not: scores of prototypes, or their targets"
  broken = [name for name, norm in found.gradients.items() if not jnp.isfinite(norm)]
  if broken:
    return (
      f"loss and outputs are finite, the gradients of {len(broken)} of {len(found.gradients)} "
      f"parameters are not: {', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}"
    )
  return "finite throughout"


def state_before(
  workdir: str, step: int, say: Callable[[str], Any]
) -> tuple[Any, train_step.TrainState, dict[str, jax.Array]]:
  """(resolved config, the state before update `step`, its batch) of a run.

  Args:
    workdir: of the run.
    step: updates done after it, from 1.
    say: takes a line about how far away the state is.

  Raises:
    UserError: if the workdir is not a run or no checkpoint before the step is left.
  """
  folder = pathlib.Path(workdir).expanduser()
  if not folder.is_dir():
    raise errors.UserError(f"there is no workdir={workdir}: give the folder of a run")
  config = configs.of_run(folder)
  if not config.num_steps:
    raise errors.UserError(f"workdir={workdir} holds weights and no run: give the folder of a run")
  if not 1 <= step <= config.num_steps:
    raise errors.UserError(f"step={step}: give one of 1 to {config.num_steps}")
  train_source, bank, test = datasets.of_run(config)
  program = programs.Program(config, bank.num_classes if test is not None else 0)
  steps = checkpoint.steps(folder)
  before = [number for number in steps if number < step]
  if not before:
    left = ", ".join(map(str, sorted(steps))) or "none"
    raise errors.UserError(
      f"no checkpoint before step {step} is left in {folder / 'checkpoints'} (there: {left}): a "
      "run with a larger config.keep_checkpoints keeps more"
    )
  checkpoints = checkpoint.Checkpoints(folder)
  start, state, metadata = checkpoints.restore_latest(program.restore_target, max(before))
  checkpoints.close()
  state, _ = program.with_own_probe(state, metadata["config"]["probe"])
  say(f"from checkpoint {start}, {step - 1 - start} updates before it")
  streams = [
    program.batches(
      train_source, seed=config.seed, step=start, batch_size=config.batch_size, keys=program.keys
    )
  ]
  if program.probe_apart:
    streams.append(
      program.batches(
        bank,
        seed=config.seed + 1,
        step=start,
        batch_size=config.probe.batch_size,
        keys=("image", "size", "label"),
      )
    )
  if program.refresh and any(
    n >= program.method.refresh_from and n % config.steps_per_epoch == 0 for n in range(start, step)
  ):
    raise errors.UserError(
      f"between checkpoint {start} and step {step} lies a clustering of all images, which replay "
      "does not make again: train on from the checkpoint with a smaller config.save_every"
    )
  try:
    with jax.set_mesh(program.mesh), progress.Line("step", step - 1, done=start) as line:
      for number in range(start, step - 1):
        batches = [next(stream)[0] for stream in streams]
        state, _ = program.step(state, batches[0], batches[1] if len(batches) > 1 else None)
        line.to(number + 1)
      return config, state, next(streams[0])[0]
  finally:
    for stream in streams:
      stream.close()


def _table(looks: dict[str, Look], count: int = 12) -> list[str]:
  """The longest gradients and where they lie, the looks side by side."""
  names = list(next(iter(looks.values())).gradients)
  finite = [name for name in names if all(jnp.isfinite(v.gradients[name]) for v in looks.values())]
  first = next(iter(looks.values()))
  shown = sorted(finite, key=lambda name: -first.gradients[name])[:count]
  wide = max([len(name) for name in shown] + [9])
  lines = [f"{'norm of the gradient of':<{wide}}" + "".join(f"  {kind:>10}" for kind in looks)]
  for name in shown:
    values = "".join(f"  {v.gradients[name]:>10.3g}" for v in looks.values())
    lines.append(f"{name:<{wide}}{values}")
  return lines


def main(argv: Sequence[str]) -> None:
  """The program; see --help."""
  parser = cli.parser("replay", _DESCRIPTION)
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--step", type=int, required=True, help="the update, as the log counts")
  parser.add_argument("--json", help="file to write every norm to")
  args: argparse.Namespace = parser.parse_args(argv)
  config, state, batch = state_before(args.workdir, args.step, print)
  looks = {}
  for precision in dict.fromkeys((config.precision, "float32")):
    with config.unlocked():
      config.precision = precision
    with progress.during(f"the step in {precision}"):
      looks[precision] = look(config, state, batch)
    print(f"{precision}: loss {looks[precision].loss:.6g}; {first_broken(looks[precision])}")
  print("\n".join(_table(looks)))
  if args.json:
    files.write_json(
      args.json, {"step": args.step} | {kind: found._asdict() for kind, found in looks.items()}
    )
    print(f"every norm: {args.json}")


if __name__ == "__main__":
  cli.guarded(main, sys.argv[1:])
