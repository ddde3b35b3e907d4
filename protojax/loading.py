"""Loading a trained encoder: from a run's checkpoint, or from exported or converted weights."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from protojax import config as configs
from protojax import errors, losses, pretrained, sizes, trees
from protojax.models import encoder as encoders
from protojax.prototypes import scoring
from protojax.training import checkpoint, export, programs, sharding, train_step

PyTree = Any


def load(path: str | os.PathLike, *, step: int | None = None) -> pretrained.Trained:
  """Loads the teacher (the encoder where there is none) of a run, or exported weights.

  Exported weights are what a run leaves in exported/ and what `protojax convert` writes; a warning
  names tensors that were missing when they were converted.

  Args:
    path: workdir of a run, or a folder with encoder.safetensors and config.json, or that file.
    step: checkpoint of a run; None takes the newest that can be read.

  Raises:
    UserError: if there is nothing of the kind, or it cannot be read.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.exists():
    raise errors.UserError(f"there is no {path}: give the workdir of a run or its exported/ folder")
  if (folder / "env.json").is_file() or (folder / "checkpoints").is_dir():
    return _run(path, folder, step)
  if step is not None:
    raise errors.UserError(f"step={step}: {path} is no run, so there are no checkpoints to choose")
  return _exported(path, folder)


def _run(path: str | os.PathLike, folder: pathlib.Path, step: int | None) -> pretrained.Trained:
  config = configs.of_run(folder)
  # This machine's, not the run's.
  config.mesh.update({"data": -1, "model": 1, "rules": (), "fsdp": False})
  config.model.attention = "xla"
  if checkpoint.leaves(folder) is None:
    raise errors.UserError(
      f"{path} holds no checkpoint yet: wait for the first one (save_every), or give another run"
    )
  program = programs.Program(config)
  checkpoints = checkpoint.Checkpoints(folder)
  try:
    restored = checkpoints.restore_latest(program.restore_target, step)
  finally:
    checkpoints.close()
  if restored is None:
    raise errors.UserError(f"{path} holds no checkpoint any more: give another run")
  step, state, _ = restored
  return of_state(path, program, state, step)


def of_state(
  path: str | os.PathLike, program: programs.Program, state: train_step.TrainState, step: int
) -> pretrained.Trained:
  """The encoder of a state of the run in `path` after `step` updates; all processes call it."""
  weights, tree = train_step.encoder_of(state)
  variables = train_step.variables_of(state)
  replicated = sharding.replicated(program.mesh)
  matrices = jax.jit(program.method.prototype_matrices, out_shardings=replicated)(variables)
  return pretrained.Trained(
    path=str(path),
    kind="run",
    config=program.config,
    step=step,
    weights=weights,
    **tree,
    encoder=encoders.build(encoders.for_evaluation(program.config)),
    prototypes=jax.device_get(matrices),
    method=program.method,
    variables=variables,
    mesh=program.mesh,
  )


def untrained(model: pretrained.Trained) -> pretrained.Trained:
  """The same net before its first step, for features: the weights that the seed of its run gives.

  Of exported weights, which do not say how they began, those of seed 0.
  """
  if model.kind == "encoder":
    config = model.config
    size, channels = config.augment.global_size, config.data.channels
    fresh = jax.jit(
      lambda key: encoders.init(model.encoder, key, size, channels),
      out_shardings=sharding.replicated(model.mesh),
    )
    params, batch_stats = fresh(jax.random.key(0))
    return model._replace(step=0, params=params, batch_stats=batch_stats)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(model.mesh))
  def start(seed: int) -> Any:
    method_key, _, _ = jax.random.split(jax.random.key(seed), 3)  # as `train_step.init_state`
    return model.method.init(method_key)

  _, tree = train_step.encoder_of(start(model.config.seed))
  return model._replace(step=0, **tree)


class Sets(NamedTuple):
  """In the place of a method, for prototypes that were exported; see `prototypes.scoring`.

  `variables` are (params, batch_stats, {set: Scoring}).
  """

  encoder: encoders.Encoder

  def embeddings(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    params, batch_stats, sets = variables
    patches = any(one.tokens == "patch" for one in sets.values())
    out, _ = encoders.embed(
      self.encoder, params, batch_stats, {"global": images[:, None]}, train=False, patches=patches
    )
    z = {"class": out.z[:, 0]}
    if out.patches is not None:
      z["patch"] = out.patches[:, 0]
    return {name: scoring.embeddings(one, z[one.tokens]) for name, one in sets.items()}

  def scoring(self, variables: Any) -> dict[str, Any]:
    return variables[2]

  def codes(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    found = self.embeddings(variables, images)
    return {name: scoring.scores(one, found[name]) for name, one in variables[2].items()}


def _exported(path: str | os.PathLike, folder: pathlib.Path) -> pretrained.Trained:
  tensors, info = export.read(folder)
  if said := export.initialised(export.lacked(info)):
    logging.warning("%s: %s", path, said)
  return of_export(path, tensors, info, export.read_prototypes(folder, info))


def of_export(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  info: Mapping[str, Any],
  sets: Mapping[str, scoring.Scoring],
) -> pretrained.Trained:
  """The encoder of exported or converted weights.

  Args:
    path: what they are called.
    tensors, info: as `export.read` gives them.
    sets: {set: its prototypes}; of use only with the head among the tensors.

  Raises:
    UserError: if `info` describes no encoder, or another than that of the tensors.
  """
  try:
    image = info["image"]
    config = configs.restored(
      {
        **{k: info[k] for k in ("model", "head", "method", "precision") if k in info},
        "augment": {k: image[k] for k in ("global_size", "mean", "std")},
        "probe": {"crop": image.get("crop", 1.0)},
        "data": {
          "image_size": image.get("image_size", _stored(image["global_size"])),
          **{k: image[k] for k in ("channels", "value_range") if k in image},
        },
      }
    )
    if "method" not in info:
      config.method.prototypes = "learned"  # as other libraries' are
    config.model.image_size = config.model.image_size or config.augment.global_size
    weights, step = info["weights"], info["step"]
  except errors.UserError:
    raise
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise errors.UserError(
      f"the description of the weights at {path} is not one of protojax ({error}): export or "
      "convert them again"
    ) from None
  encoder = encoders.build(encoders.for_evaluation(config))
  tree = {"params": {}, "batch_stats": {}} | trees.nested(tensors)
  _require_fit(path, encoder, tree["params"], config)
  if "head" not in tree["params"]:
    sets = {}
  mesh = sharding.make_mesh()
  tree, sets = jax.device_put((tree, dict(sets)), sharding.replicated(mesh))
  normalized = jax.jit(lambda rows: losses.l2_normalize(rows.astype(jnp.float32)))
  return pretrained.Trained(
    path=str(path),
    kind="encoder",
    config=config,
    step=step,
    weights=weights,
    encoder=encoder,
    params=tree["params"],
    batch_stats=tree["batch_stats"],
    prototypes={name: np.asarray(normalized(one.rows)) for name, one in sets.items()},
    method=Sets(encoder) if sets else None,
    variables=(tree["params"], tree["batch_stats"], sets) if sets else None,
    mesh=mesh,
    initialised=export.lacked(info),
  )


def _stored(size: int | tuple[int, int]) -> int:
  """Pixels that images are stored at where nothing says: as for the ImageNet recipes 512 of 224.

  At the size of the views a wide photo would be squashed before its square is cut.
  """
  return round(max(sizes.pair(size)) * 512 / 224)


def _require_fit(
  path: str | os.PathLike,
  encoder: encoders.Encoder,
  params: PyTree,
  config: ml_collections.ConfigDict,
) -> None:
  """Refuses weights that are not those of the backbone their description names."""
  size, channels = config.augment.global_size, config.data.channels
  abstract, _ = jax.eval_shape(
    lambda key: encoders.init(encoder, key, size, channels), jax.random.key(0)
  )
  there, here = (
    {name: leaf.shape for name, leaf in trees.flat(tree.get("backbone", {})).items()}
    for tree in (params, abstract)
  )
  there.pop("mask_token", None)  # of iBOT: evaluation hides nothing
  wrong = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
  if wrong:
    raise errors.UserError(
      f"the weights at {path} are not of the model described beside them: backbone.{wrong[0]} has "
      f"shape {there.get(wrong[0], 'none')}, the model {here.get(wrong[0], 'none')} "
      f"({len(wrong)} differences): export or convert them again"
    )
