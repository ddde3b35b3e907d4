"""Whether a run may go on under other settings, and how a finished one becomes a longer one."""

import json
import pathlib

import jax

from protojax import config as configs
from protojax import errors, files, trees
from protojax.training import optim

# What may differ between the run that saved and the run that goes on: it changes where, how fast or
# how often, not what is computed. Everything else is refused, so a new option is safe by default.
_FREE = (
  "resume",
  "overwrite",
  "log_every",
  "save_every",
  "eval_every",
  "keep_checkpoints",
  "wandb",
  "monitor.",
  "accum_steps",
  "model.attention",
  "model.remat",
  "model.scan",
  "method.block",
  "method.precision",
  "mesh.",
  "data.data_dir",
  "data.num_workers",
  "data.cache",
  "optim.skip_nonfinite",
  "probe.",  # no gradient of a probe reaches the encoder
  # Compared as the steps they come to:
  "num_epochs",
  "optim.warmup_epochs",
  "optim.freeze_prototypes_epochs",
  "optim.freeze_backbone_epochs",
)


# What follows from the length of a run, see `resolving.resolve`: differs when a run is extended.
_OF_LENGTH = (
  "num_steps",
  "optim.warmup_steps",
  "optim.freeze_prototypes_steps",
  "optim.freeze_backbone_steps",
  "mixture.horizon_steps",
  "mixture.horizon_final",
  "mixture.anneal_steps",
)

_FOLLOWING = ("steps_per_epoch", *_OF_LENGTH[1:])  # from length and batch, where not typed


def _differing(before: dict, config) -> dict[str, tuple]:
  """{key: (before, now)} of the settings that make another run.

  What only the older one knows is none; what it does not know yet had its default then.
  """
  with_defaults = configs.restored(before) if "method" in before else before
  old, new = (json.loads(json.dumps(trees.flat(c))) for c in (with_defaults, config))
  return {
    key: (old[key], value)
    for key, value in new.items()
    if key in old
    and old[key] != value
    and not any(key == free or (free[-1] == "." and key.startswith(free)) for free in _FREE)
  }


def _listed(differing: dict[str, tuple]) -> str:
  said = (f"{key} {old} -> {new}" for key, (old, new) in differing.items())
  return ", ".join(errors.in_line(one) for one in said)


def refuse_mismatch(before: dict, config) -> None:
  """Refuses to go on with a run under settings that would make it another run.

  A larger `num_steps` alone, with what follows from it, is allowed where `config.resume` is
  "extend".

  Args:
    before: config of the run that is there, nested dict.
    config: resolved. Settings that it no longer has are not compared; those that the run did not
      have yet, of an older version, had their defaults.

  Raises:
    UserError: one line that names every setting that differs, with both values.
  """
  differing = _differing(before, config)
  old, new = differing.get("num_steps", (0, 0))
  longer = old < new and differing.keys() <= set(_OF_LENGTH)
  if longer and config.resume != "extend":
    raise errors.UserError(
      f"the workdir holds a run of {old} steps; with {new} its learning rate and other schedules "
      "would jump: set config.resume=extend to go on like that, or train a new run from its "
      "weights, another workdir with config.init_from=WORKDIR/exported"
    )
  if not differing or longer:
    return
  # What follows from others is no news beside them, nor is what may change.
  extends = config.resume == "extend" and old < new
  quiet = {*_FOLLOWING, *(["num_steps"] * extends)}
  causes = {k: v for k, v in differing.items() if k not in quiet} or differing
  if causes.keys() == {"data.num_records"}:
    there, here = causes["data.num_records"]
    raise errors.UserError(
      f"the workdir holds a run on {there:,} images, and data.name={config.data.name!r} has "
      f"{here:,} now: bring back those that were there, or train a new run from its weights, "
      "another workdir with config.init_from=WORKDIR/exported"
    )
  more = " (resume=extend takes a larger one)" * (config.resume == "extend" and old > new)
  raise errors.UserError(
    f"the workdir holds a run with other settings: {_listed(causes)}{more}: type them as before, "
    "choose another workdir, or set config.overwrite=True, which deletes the whole run"
  )


def extend(folder: pathlib.Path, config, step: int) -> list[str]:
  """Makes the run in the folder one of `config.num_steps`, where it was shorter.

  The result of the shorter run, eval/final, becomes eval/step_N.

  Args:
    folder: from `claim`, which has compared the settings.
    config: resolved.
    step: updates done.

  Returns:
    The line that says what changes; none where nothing does, and in processes that do not write.
  """
  known = folder / "config.json"
  if jax.process_index() != 0:
    return []
  plain = json.loads(known.read_text())
  differing = _differing(plain, config)
  if not differing:
    return []
  before = configs.restored(plain)
  final = folder / "eval" / "final"
  if final.exists():
    final.rename(final.with_name(f"step_{before.num_steps}"))
  files.write_json(known, config.to_dict())

  def rates(c):
    rate = optim.learning_rate(c, num_steps=c.num_steps, batch_size=c.batch_size)
    return float(rate(step)), float(optim.weight_decay(c, num_steps=c.num_steps)(step))

  (lr, decay), (new_lr, new_decay) = rates(before), rates(config)
  return [
    f"extended at step {step}, from here on with the schedules of {config.num_steps} steps: "
    f"learning rate {lr:.3g} -> {new_lr:.3g}, weight decay {decay:.3g} -> {new_decay:.3g}, "
    f"{_listed(differing)}"
  ]
