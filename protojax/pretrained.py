"""A trained encoder, ready to look at images: from a run's checkpoint or from exported weights."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from protojax import config as configs
from protojax import errors
from protojax.data import augment, sources
from protojax.models import encoder as encoders
from protojax.models import features as backbone_layers
from protojax.training import checkpoint, encode, export, programs, sharding, train_step, workdir

PyTree = Any


class Trained(NamedTuple):
  """See `load`.

  Attributes:
    path: as given.
    kind: "run" or "encoder".
    config: resolved; of exported weights the defaults with model, head, method and image of theirs.
    step: updates done; None where nobody wrote it down.
    weights: "teacher" or "encoder", whose weights these are.
    encoder: modules of the backbone and the head.
    params, batch_stats: {"backbone": ..., "head": ...}; exported weights may lack the head.
    prototypes: {set: float32 [K, D]} unit rows; {} for methods without and for exported weights.
    method, variables: of the run (`methods.base`); None for exported weights.
    mesh: all devices along "data".
  """

  path: str
  kind: str
  config: ml_collections.ConfigDict
  step: int | None
  weights: str
  encoder: encoders.Encoder
  params: PyTree
  batch_stats: PyTree
  prototypes: dict[str, np.ndarray]
  method: Any
  variables: Any
  mesh: jax.sharding.Mesh


def load(path: str, *, step: int | None = None) -> Trained:
  """The teacher (the encoder where there is none) of a run, or what `convert` or a run exported.

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


def _run(path, folder, step) -> Trained:
  try:
    config = configs.restored(json.loads((folder / "config.json").read_text()))
  except errors.UserError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{folder / 'config.json'} cannot be read ({type(error).__name__}): it says what the "
      f"checkpoints in {path} are; copy it along with them"
    ) from None
  # This machine's, not the run's.
  config.mesh.update({"data": -1, "model": 1, "rules": ()})
  config.model.attention = "xla"
  leaves = checkpoint.leaves(folder)
  if leaves is None:
    raise errors.UserError(
      f"{path} holds no checkpoint yet: wait for the first one (save_every), or give another run"
    )
  probe = leaves.get("carry/probe/params/bias")  # "float32[10]": one for each class
  program = programs.Program(config, int(probe.partition("[")[2][:-1]) if probe else 0)
  target = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    program.abstract,
    program.shardings,
  )
  checkpoints = checkpoint.Checkpoints(folder)
  try:
    step, state, _ = checkpoints.restore_latest(target, step)
  finally:
    checkpoints.close()
  return of_state(path, program, state, step)


def of_state(path: str, program: programs.Program, state, step: int) -> Trained:
  """The encoder of a state of the run in `path` after `step` updates; all processes call it."""
  weights, tree = workdir.encoder_of(state)
  variables, whole = train_step.variables_of(state), sharding.replicated(program.mesh)
  matrices = jax.jit(program.method.prototype_matrices, out_shardings=whole)(variables)
  return Trained(
    path=path,
    kind="run",
    config=program.config,
    step=step,
    weights=weights,
    **tree,
    encoder=encoders.build(_calm(program.config)),
    prototypes=jax.device_get(matrices),
    method=program.method,
    variables=variables,
    mesh=program.mesh,
  )


def _exported(path, folder) -> Trained:
  tensors, info = export.read(folder)
  try:
    image = info["image"]
    config = configs.restored(
      {
        **{k: info[k] for k in ("model", "head", "method", "precision") if k in info},
        "augment": {k: image[k] for k in ("global_size", "mean", "std")},
        "probe": {"crop": image.get("crop", 1.0)},
        "data": {"image_size": image.get("image_size", image["global_size"])},
      }
    )
    config.model.image_size = config.model.image_size or config.augment.global_size
    weights, step = info["weights"], info["step"]
  except errors.UserError:
    raise
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise errors.UserError(
      f"the description of the weights at {path} is not one of protojax ({error}): export or "
      "convert them again"
    ) from None
  net = encoders.build(_calm(config))
  tree = {"params": {}, "batch_stats": {}}
  for name, tensor in tensors.items():
    *parents, leaf = name.split(".")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[leaf] = tensor
  _require_fit(path, net, tree["params"], config.augment.global_size)
  mesh = sharding.make_mesh()
  tree = jax.device_put(tree, sharding.replicated(mesh))
  return Trained(
    path=path,
    kind="encoder",
    config=config,
    step=step,
    weights=weights,
    encoder=net,
    params=tree["params"],
    batch_stats=tree["batch_stats"],
    prototypes={},
    method=None,
    variables=None,
    mesh=mesh,
  )


def _require_fit(path, net, params, image_size) -> None:
  """Refuses weights that are not those of the backbone their description names."""
  abstract, _ = jax.eval_shape(lambda key: encoders.init(net, key, image_size), jax.random.key(0))

  def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree.get("backbone", {}))
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf.shape for p, leaf in leaves}

  there, here = shapes(params), shapes(abstract)
  there.pop("mask_token", None)  # of iBOT: evaluation hides nothing
  wrong = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
  if wrong:
    raise errors.UserError(
      f"the weights at {path} are not of the model described beside them: backbone.{wrong[0]} has "
      f"shape {there.get(wrong[0], 'none')}, the model {here.get(wrong[0], 'none')} "
      f"({len(wrong)} differences): export or convert them again"
    )


def _calm(config):
  """For modules that only evaluate, whose blocks are to be seen."""
  config = config.copy_and_resolve_references()
  config.model.update({"drop_path": 0.0, "remat": False, "attention": "xla"})
  return config


def layers(model: Trained) -> tuple[str, ...]:
  """Names of the layers that `rows` can give."""
  return backbone_layers.available(model.encoder)


def _prepare(model: Trained, batch: dict[str, jax.Array]) -> jax.Array:
  """The evaluation transform: storage images -> normalised [B, S, S, 3]."""
  look = model.config.augment
  return augment.evaluate(
    batch["image"],
    look.global_size,
    look.mean,
    look.std,
    crop=model.config.probe.crop,
    original=batch["size"],
  )


def rows(
  model: Trained,
  source: sources.Source,
  *,
  parts: Sequence[str] = ("features",),
  layers: Sequence[str] = ("last",),
  limit: int = 0,
  batch_size: int = 256,
) -> dict[str, Any]:
  """What the encoder makes of every image that can be read, in evaluation mode.

  Args:
    model: from `load`.
    source: from `data.source.build`.
    parts: any of "features"; and, of a run with prototypes, "codes" and "embeddings".
    layers: of `layers(model)`.
    limit: at most so many images, evenly spread; 0 takes all.
    batch_size: images at a time, over all devices.

  Returns:
    Host arrays: "features" {layer: float32 [N, F]}, "codes" {set: int32 [N], argmax of the
    scores}, "embeddings" {set: float32 [N, D], what is compared with the prototypes}; always
    "label" int32 [N], -1 without, and "index" int32 [N], number in the source.

  Raises:
    UserError: for an unknown layer, or codes of something without prototypes.
  """
  if {"codes", "embeddings"} & set(parts) and not model.prototypes:
    raise errors.UserError(
      f"{model.path} has no prototypes: exported weights hold the encoder only, and some methods "
      "have none; give the workdir of a run that has some"
    )
  whole = sharding.replicated(model.mesh)

  @functools.partial(jax.jit, out_shardings=whole)
  def forward(params, batch_stats, variables, batch):
    images = _prepare(model, batch)
    out = {"label": batch["label"], "index": batch["index"]}
    if "features" in parts:
      out["features"] = backbone_layers.features(
        model.encoder, params, batch_stats, images, tuple(layers)
      )
    if "codes" in parts:
      scores = model.method.codes(variables, images)
      out["codes"] = {k: jnp.argmax(v, axis=-1).astype(jnp.int32) for k, v in scores.items()}
    if "embeddings" in parts:
      out["embeddings"] = model.method.embeddings(variables, images)
    return out

  return encode.rows(
    functools.partial(forward, model.params, model.batch_stats, model.variables),
    source,
    mesh=model.mesh,
    batch_size=batch_size,
    image_size=model.config.data.image_size,
    num_workers=model.config.data.num_workers,
    limit=limit,
  )


def attention(model: Trained, images: np.ndarray) -> np.ndarray:
  """Attention of the class token over the patches, last block of a ViT.

  Args:
    model: from `load`.
    images: uint8 [N, S, S, 3] of the storage size.

  Returns:
    float32 [N, heads, h, w]; see `models.layers.attention`.

  Raises:
    UserError: for an encoder without attention.
  """
  size = np.full((len(images), 2), images.shape[1], np.int32)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(model.mesh))
  def forward(params, image):
    prepared = _prepare(model, {"image": image, "size": size})
    return backbone_layers.attention(model.encoder, params, prepared)

  return np.asarray(forward(model.params, images))


def source(
  model: Trained,
  split: str,
  *,
  name: str | None = None,
  data_dir: str | None = None,
) -> sources.Source:
  """Images of the run's labelled source, or of another.

  Args:
    model: from `load`.
    split: "train" and "test" mean `probe.train_split` and `probe.test_split` of the run's own
      source; anything else, and every split of another source, is taken as it is.
    name, data_dir: of the other source; see `data.source.build`.

  Raises:
    UserError: if there is no such data.
  """
  probe, data = model.config.probe, model.config.data
  if name is None and model.kind == "encoder":
    raise errors.UserError(
      f"{model.path} does not say which images to look at: give --data, and --data_dir"
    )
  if name is None:
    split = {"train": probe.train_split, "test": probe.test_split}.get(split, split)
    name, own = probe.name or data.name, probe.data_dir or data.data_dir
    data_dir = data_dir or own
  return sources.build(name, split=split, data_dir=data_dir)
