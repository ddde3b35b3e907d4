"""A resolved config as compiled functions over a mesh."""

import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from protojax import methods, sizes
from protojax.data import augment, cache, decoding, pipeline
from protojax.evals import linear
from protojax.training import datasets, optim, sharding, train_step

_PROBE_BIAS = "carry/probe/params/bias"  # in the leaves of a checkpoint


class Program:
  """A resolved config as compiled functions; the loop below and the benchmarks run it.

  Attributes:
    config: resolved; see `resolving.resolve`.
    mesh, method, tx, evaluation, probe: what the step is made of.
    probe_rows: of a batch that are the probe's too; 0 where there is no probe or where it has
      batches of its own, for its images are others or their number is no divisor of a batch.
    keys: of a batch, see `pipeline.batches`.
    abstract, shardings: of the `train_step.TrainState`.
    init: jitted (seed) -> state 0.
    step: jitted (state, batch, probe_batch) -> (state, metrics); donates the state. The probe's
      batch is None unless `probe_apart`.
    refresh: jitted (state, embeddings, index) -> state, donates the state; None without.
    exported: jitted (state) -> (`train_step.encoder_of` it, {set: `prototypes.scoring.Scoring`}),
      on every device.

  Args:
    config: resolved.
    num_classes: of the labelled source; 0 leaves the online probe out.
    devices: list of devices to use instead of all.
  """

  def __init__(self, config, num_classes: int = 0, devices=None):
    self.config = config
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices)
    self.method = methods.load(config.method.name).make(config)
    self.tx = optim.build(config, num_steps=config.num_steps, batch_size=config.batch_size)
    views = config.augment

    def evaluation(batch):
      return augment.evaluate(
        batch["image"],
        views.global_size,
        views.mean,
        views.std,
        crop=config.probe.crop,
        original=batch["size"],
      )

    self.evaluation = evaluation
    self.probe = None
    if num_classes and config.probe.batch_size:
      self.probe = self._probe_of(num_classes)
    self.probe_rows = 0
    if self.probe and datasets.one_source(config):
      divides = config.batch_size % config.probe.batch_size == 0
      self.probe_rows = config.probe.batch_size if divides else 0
    self.keys = ("image", "size", "index") + ("label",) * bool(self.probe_rows)

    def init(seed):
      return train_step.init_state(
        jax.random.key(seed), method=self.method, tx=self.tx, probe=self.probe
      )

    self.abstract = jax.eval_shape(init, 0)
    self.shardings = self._shardings_of(self.abstract)
    self.init = jax.jit(init, out_shardings=self.shardings)
    rows = sharding.batch_sharding(self.mesh)
    self.step = jax.jit(
      functools.partial(
        train_step.train_step,
        method=self.method,
        tx=self.tx,
        augment=augment.make(views),
        evaluation=self.evaluation,
        probe=self.probe,
        probe_rows=self.probe_rows,
        skip_nonfinite=bool(config.optim.skip_nonfinite),
      ),
      in_shardings=(self.shardings, rows, rows if self.probe_apart else None),
      out_shardings=(self.shardings, sharding.replicated(self.mesh)),
      donate_argnums=0,
    )
    replicated = sharding.replicated(self.mesh)
    scoring = self.method.scoring or (lambda variables: {})

    def exported(state):
      return train_step.encoder_of(state)[1], scoring(train_step.variables_of(state))

    self.exported = jax.jit(exported, out_shardings=replicated)
    self.refresh = None
    if self.method.refresh:
      self.refresh = jax.jit(
        functools.partial(train_step.refresh, method=self.method),
        in_shardings=(self.shardings, replicated, replicated),
        out_shardings=self.shardings,
        donate_argnums=0,
      )

  @property
  def probe_apart(self) -> bool:
    """Whether the probe has batches of its own."""
    return bool(self.probe) and not self.probe_rows

  def _probe_of(self, num_classes: int) -> linear.OnlineProbe:
    config = self.config
    shape = (1, *sizes.pair(config.augment.global_size), config.data.channels)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    features = jax.eval_shape(
      lambda key, x: self.method.features(self.method.init(key), x), jax.random.key(0), image
    )
    return linear.online_probe(num_classes, features.shape[-1], learning_rate=config.probe.lr)

  def _shardings_of(self, abstract: train_step.TrainState):
    mesh = self.config.mesh
    rules = mesh.rules or (sharding.FSDP_RULES if mesh.fsdp else sharding.DEFAULT_RULES)
    return sharding.state_shardings(abstract, self.mesh, rules)

  def restore_target(self, leaves: dict[str, str] | None = None) -> train_step.TrainState:
    """Shapes, dtypes and placement of the state: what a checkpoint is restored into.

    Args:
      leaves: of the checkpoint, see `checkpoint.leaves`. Then the target has the online probe that
        is there, another one or none; `with_own_probe` exchanges it.
    """
    abstract, shardings = self.abstract, self.shardings
    if leaves is not None:
      carry = {name: leaf for name, leaf in abstract.carry.items() if name != "probe"}
      if bias := leaves.get(_PROBE_BIAS):  # "float32[10]": one for each class
        there = self._probe_of(int(bias.partition("[")[2][:-1]))
        carry["probe"] = jax.eval_shape(there.init, jax.random.key(0))
      abstract = abstract.replace(carry=carry)
      shardings = self._shardings_of(abstract)
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      abstract,
      shardings,
    )

  def with_own_probe(
    self, state: train_step.TrainState, before: dict
  ) -> tuple[train_step.TrainState, str]:
    """A restored state with the online probe of this program.

    The one that was saved goes on if it is of as many classes and of the same images; else a new
    one starts. The encoder does not feel either.

    Args:
      state: restored into `restore_target(leaves)`.
      before: `config.probe` of the checkpoint.

    Returns:
      (state, what has changed, "" if nothing).
    """
    there, own = state.carry.get("probe"), self.abstract.carry.get("probe")
    carry = {name: leaf for name, leaf in state.carry.items() if name != "probe"}
    if own is None:
      return state.replace(carry=carry), "" if there is None else "the online linear probe ends"
    kept = ("name", "train_split")
    if there is None:
      why = "there was none"
    elif there["params"]["bias"].shape != own["params"]["bias"].shape:
      why = "the one before was of another number of classes"
    elif changed := [k for k in kept if before.get(k) != self.config.probe[k]]:
      why = f"config.probe.{changed[0]} was {before.get(changed[0])}"
    else:
      return state, ""
    _, key, _ = jax.random.split(jax.random.key(self.config.seed), 3)  # as init_state does
    fresh = jax.jit(self.probe.init, out_shardings=self.shardings.carry["probe"])(key)
    return (
      state.replace(carry={**carry, "probe": fresh}),
      f"the online linear probe starts fresh: {why}",
    )

  def trace(self) -> jax.stages.Traced:
    """Traces the step for the config's batch, so that a mistake of size shows before training."""
    config = self.config

    def rows(count, **shapes):
      return {
        k: jax.ShapeDtypeStruct((count, *shape), dtype) for k, (shape, dtype) in shapes.items()
      }

    image = ((config.data.image_size, config.data.image_size, config.data.channels), jnp.uint8)
    shapes = {"image": image, "size": ((2,), jnp.int32)}
    shapes |= dict.fromkeys(("index", "label"), ((), jnp.int32))
    batch = rows(config.batch_size, **{key: shapes[key] for key in self.keys})
    probe_batch = None
    if self.probe_apart:
      probe_batch = rows(
        config.probe.batch_size, **{key: shapes[key] for key in ("image", "size", "label")}
      )
    with jax.set_mesh(self.mesh):
      return self.step.trace(self.abstract, batch, probe_batch)

  def lower(self) -> jax.stages.Lowered:
    """The traced step in the compiler's language."""
    with jax.set_mesh(self.mesh):
      return self.trace().lower()

  def load(self, data) -> cache.Cache:
    """The images of a source on the devices."""
    part, parts = sharding.rows_of_process(self.mesh.size, self.mesh)
    return cache.load(
      data,
      image_size=self.config.data.image_size,
      mesh=self.mesh,
      num_workers=self.config.data.num_workers,
      part=part,
      parts=parts,
    )

  def decoders(self, data, *, batch_size: int) -> decoding.Plan:
    """Who decodes batches of `data` on each host, and how fast all of them together.

    Those trained on and those of a probe that has its own have their share of the cores each.
    """
    config = self.config
    both = config.batch_size + (config.probe.batch_size if self.probe_apart else 0)
    _, parts = sharding.rows_of_process(batch_size, self.mesh)
    plan = decoding.plan(
      data,
      image_size=config.data.image_size,
      batch_size=batch_size // parts,
      asked=config.data.num_workers,
      share=batch_size / both,
    )
    return plan._replace(rate=plan.rate * parts)

  def batches(
    self, data, *, seed: int, step: int, batch_size: int, keys: tuple[str, ...], cached=None
  ) -> Iterator[tuple[dict[str, jax.Array], np.ndarray, float]]:
    """Global batches of `data` from `step` on, those from the host two ahead of the device.

    Args:
      data: from `sources.build`.
      seed: of the order.
      step: number of the first batch.
      batch_size: global.
      keys: of `pipeline.batches`.
      cached: `cache.Cache` of `data`, which takes the host's place, or None.

    Yields:
      ({key: global array}, rows replaced for a corrupt image int32 [b], seconds waited).
    """
    if cached is not None:
      gathered = cache.batches(cached, seed=seed, step=step, batch_size=batch_size, keys=keys)
      while True:
        start = time.perf_counter()
        batch, skipped = next(gathered)
        yield batch, skipped, time.perf_counter() - start
    workers = self.config.data.num_workers
    if workers is None:
      workers = self.decoders(data, batch_size=batch_size).workers
    part, parts = sharding.rows_of_process(batch_size, self.mesh)
    host = pipeline.batches(
      data,
      seed=seed,
      step=step,
      batch_size=batch_size,
      image_size=self.config.data.image_size,
      num_workers=workers,
      process_index=part,
      process_count=parts,
    )
    try:
      ready = []
      while True:
        start = time.perf_counter()
        while len(ready) < 2:
          batch = next(host)
          put = sharding.put_batch({k: batch[k] for k in keys}, self.mesh)
          ready.append((put, batch["skipped"]))
        yield *ready.pop(0), time.perf_counter() - start
    finally:
      host.close()
