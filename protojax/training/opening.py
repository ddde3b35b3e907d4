"""What a run says before it starts: what is trained, on which images, where, in how much memory."""

import math
import os
import pathlib
import textwrap

import jax

from protojax.data import sources
from protojax.models import encoder as encoders
from protojax.models import vit
from protojax.prototypes import prototype_set
from protojax.training import evaluation, optim, programs, train_step

_MANY = 16_384  # prototypes; comparing all pairs of fewer costs little beside the steps
_WIDTH, INDENT = 80, 12  # columns of a line, and of the word before its text


def lines(
  program: programs.Program,
  *,
  train: sources.Source,
  bank: sources.Source,
  test: sources.Source | None,
  folder: pathlib.Path,
) -> list[str]:
  """What is about to be trained, a few lines of at most 80 columns (a long path is not broken).

  Args:
    program: of the run.
    train, bank, test: as of `datasets.of_run`.
    folder: workdir.
  """
  config, mesh = program.config, program.mesh
  model, devices = program.abstract.encoder, mesh.devices.ravel()
  matrices = jax.eval_shape(
    lambda state: program.method.prototype_matrices(train_step.variables_of(state)),
    program.abstract,
  )
  sets = [
    f"{matrix.shape[0]:,} of {matrix.shape[1]} dimensions"
    + (f" ({name})" if len(matrices) > 1 else "")
    for name, matrix in matrices.items()
  ]
  images = f"{len(train):,} of {train.name}"
  if test is not None:
    images += f"; k-NN and linear probe: {len(bank):,} of {bank.name}" * (bank is not train)
    images += f"; tested on {len(test):,} of {test.name}, {test.num_classes:,} classes"
  processes = {device.process_index for device in devices}
  with jax.set_mesh(mesh):
    chosen = encoders.chosen(config)
    block = prototype_set.block_size(config) if matrices else 0
  at_once = f"{block:,} at a time on each device" if block else "all at once"
  at_a_time = [f"compared {at_once}"] * bool(matrices)
  rows = {
    "method": config.method.name + ", with a teacher" * (program.abstract.teacher != ()),
    "prototypes": ", ".join((config.method.prototypes, *sets, *at_a_time)),
    "looks": _looks(config, matrices),
    "encoder": f"{config.model.name}{_changed(config.model)}; "
    + ", ".join(f"{name} {_millions(part)}" for name, part in model.items())
    + " parameters"
    + f"; {chosen}" * bool(chosen),
    "images": images,
    "length": f"{config.num_steps:,} steps of {config.batch_size:,} images, "
    f"{config.num_steps / config.steps_per_epoch:.3g} epochs",
    "optimizer": optim.describe(config),
    "devices": f"{len(devices)} x {devices[0].device_kind}"
    + f" of {len(processes)} processes" * (len(processes) > 1)
    + f", mesh data {mesh.shape['data']} x model {mesh.shape['model']}",
    "workdir": str(folder),
  }
  return [line for name, text in rows.items() if text for line in _wrapped(name, text)]


def _changed(model) -> str:
  """ " of width 96, depth 2" where a transformer is not the one that its name stands for."""
  usual = dict(zip(("width", "depth", "heads"), vit.VARIANTS.get(model.name, ()), strict=False))
  changed = [f"{k} {model[k]}" for k, value in usual.items() if model[k] not in (None, value)]
  return " of " * bool(changed) + ", ".join(changed)


def _looks(config, matrices) -> str:
  """What the monitor compares, and in how many products; "" where that costs little."""
  shapes = [matrix.shape for matrix in matrices.values()]
  largest = max((num for num, _ in shapes), default=0)
  if largest < _MANY:
    return ""

  def said(*, ended: bool) -> str:
    asked, products, all_of_them = config.monitor.prototypes, 0, True
    for num, dim in shapes:
      looked = evaluation.looked_at(num, asked, ended=ended)
      products += (looked * num if looked < num else num * (num - 1) // 2) * dim
      all_of_them &= looked == num
    some = evaluation.looked_at(largest, asked, ended=ended)
    what = "all pairs of prototypes" if all_of_them else f"{some:,} prototypes with all {largest:,}"
    return f"{what} compared, {products:.1e} multiplications"

  looks, end = said(ended=False), said(ended=True)
  every = f"every {config.monitor.every:,} steps"
  return f"{every} and at the end {looks}" if end == looks else f"{every} {looks}; at the end {end}"


def memory(step: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> list[str]:
  """How much memory the compiled step takes of what a device has; nothing if nobody knows.

  Args:
    step: of one device; arguments, results that do not take their place, and what lies between.
    mesh: of the run. Devices that do not say how much they have, CPUs, share the machine's.
  """
  found = step.memory_analysis()
  if found is None:
    return []
  taken = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
  taken -= found.alias_size_in_bytes
  local = mesh.local_devices
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(local)
  there = min((device.memory_stats() or {}).get("bytes_limit", machine) for device in local)
  text = f"{_size(taken)} for the step, of {_size(there)} a device"
  if taken > there:
    text += (
      ": more than there is; raise config.accum_steps, set config.model.remat=True or lower "
      "config.batch_size"
    )
  return _wrapped("memory", text)


def disk(needed: int, free: int, keep: int) -> list[str]:
  """How much `keep` checkpoints will take, of what is free; see `checkpoint.Checkpoints.room`."""
  text = f"up to {_size(needed)} more for checkpoints, of {_size(free)} that are free"
  if needed > free:
    text += ": the run will stop when it is full, and a stop may not be saved then; free some space"
    text += " or lower config.keep_checkpoints" * (keep > 2)  # fewer are refused
  return _wrapped("disk", text)


def _wrapped(name: str, text: str) -> list[str]:
  return textwrap.wrap(
    text,
    _WIDTH,
    initial_indent=f"{name:<{INDENT}}",
    subsequent_indent=" " * INDENT,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _millions(params) -> str:
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  return f"{count / 1e6:.3g} M"


def _size(count: float) -> str:
  return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
