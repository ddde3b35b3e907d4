"""The training state and one step of it, for any method."""

import flax.struct
import jax
import optax

from protojax.methods import base


@flax.struct.dataclass
class TrainState:
  """Everything a checkpoint holds. Arrays only.

  State n is the state before update n. Fields named as in `base.Variables` are those; `carry` also
  holds "probe", the online linear probe.
  """

  step: jax.Array  # int32 []
  encoder: base.PyTree
  prototypes: base.PyTree
  teacher: base.PyTree
  carry: dict[str, base.PyTree]
  opt_state: optax.OptState
  key: jax.Array  # typed key; a step folds its number in, nothing is re-split and stored


def variables_of(state: TrainState) -> base.Variables:
  return base.Variables(state.encoder, state.prototypes, state.teacher, state.carry)


def encoder_of(state) -> tuple[str, dict]:
  """("teacher", its {"params", "batch_stats"}), or those of the encoder where there is none."""
  which = "teacher" if state.teacher != () else "encoder"
  params = state.teacher["encoder"] if which == "teacher" else state.encoder
  stats = state.carry.get("batch_stats", {})
  stats = stats.get("teacher" if which == "teacher" else "student", {})
  return which, {"params": params, "batch_stats": stats}


def split(variables: base.Variables, learns_prototypes: bool) -> tuple[dict, base.Variables]:
  """(trained, frozen): what optax sees, and the rest with () in the trained places."""
  trained, frozen = {"encoder": variables.encoder}, variables.replace(encoder=())
  if learns_prototypes:
    trained["prototypes"] = variables.prototypes
    frozen = frozen.replace(prototypes=())
  return trained, frozen


def init_state(key: jax.Array, *, method: base.Method, tx, probe=None) -> TrainState:
  """State 0. Call it inside jit with `out_shardings`: then no two leaves share a buffer.

  Args:
    key: typed key, the only source of randomness of the run.
    method: what to train.
    tx: optax transformation over `trained`.
    probe: `evals.linear.OnlineProbe` or None.
  """
  method_key, probe_key, loop_key = jax.random.split(key, 3)
  variables = method.init(method_key)
  trained, _ = split(variables, method.learns_prototypes)
  carry = variables.carry if probe is None else {**variables.carry, "probe": probe.init(probe_key)}
  return TrainState(
    step=jax.numpy.zeros((), jax.numpy.int32),
    encoder=variables.encoder,
    prototypes=variables.prototypes,
    teacher=variables.teacher,
    carry=carry,
    opt_state=tx.init(trained),
    key=loop_key,
  )


def train_step(
  state: TrainState,
  batch: base.Batch,
  probe_batch=None,
  *,
  method: base.Method,
  tx,
  augment,
  evaluation,
  probe=None,
  probe_rows: int = 0,
  skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update. Pure; the caller jits, shards and donates `state`.

  augment -> value_and_grad(loss) -> optax (which clips) -> method.update -> online probe.

  Args:
    state: state n.
    batch: {"image": uint8 [B, S, S, C], "size": int32 [B, 2], "index": int32 [B]}; with
      `probe_rows` also "label": int32 [B].
    probe_batch: {"image": uint8 [P, S, S, C], "size": int32 [P, 2], "label": int32 [P]}, with
      `probe` and without `probe_rows` only.
    method: what to train.
    tx: optax transformation over `trained`.
    augment: (key, batch) -> views, see `data.augment.make`.
    evaluation: (batch) -> images float32 [P, H, W, C], the evaluation transform.
    probe: `evals.linear.OnlineProbe` or None. It sees detached features of images as evaluation
      has them.
    probe_rows: P, a divisor of B: so many images of `batch`, evenly spread, are the probe's.
    skip_nonfinite: where the loss or a gradient is not finite, state n + 1 is state n but for its
      number. Takes the memory of what the step would otherwise write over, prototypes above all.

  Returns:
    (state n + 1, {name: float32 []}); with `skip_nonfinite` "train/skipped" is 1 or 0.
  """
  augment_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  with jax.named_scope("augment"):
    views = {**augment(augment_key, batch), "index": batch["index"]}

  variables = variables_of(state)
  trained, frozen = split(variables, method.learns_prototypes)
  grad_fn = jax.value_and_grad(method.loss, has_aux=True)
  (loss, out), grads = grad_fn(trained, frozen, views, loss_key, state.step)
  with jax.named_scope("optimizer"):
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)

  metrics = {f"train/{k}": v for k, v in out.metrics.items()}
  metrics["train/grad_norm"] = optax.tree.norm(grads)

  with jax.named_scope("update"):
    variables = variables.replace(**trained)
    variables = method.update(variables, out.stats, _after_all(state.step, grads, out))

  carry = variables.carry
  if probe is not None:
    with jax.named_scope("probe"):
      if probe_rows:
        probe_batch = _spread(batch, probe_rows)
      features = method.features(variables, evaluation(probe_batch))
      probe_state, probe_metrics = probe.update(carry["probe"], features, probe_batch["label"])
    carry = {**carry, "probe": probe_state}
    metrics |= probe_metrics

  after = state.replace(
    encoder=variables.encoder,
    prototypes=variables.prototypes,
    teacher=variables.teacher,
    carry=carry,
    opt_state=opt_state,
  )
  if skip_nonfinite:
    finite = jax.numpy.isfinite(loss) & jax.numpy.isfinite(metrics["train/grad_norm"])
    after = jax.tree.map(lambda new, old: jax.numpy.where(finite, new, old), after, state)
    metrics["train/skipped"] = 1.0 - finite.astype(jax.numpy.float32)
  return after.replace(step=state.step + 1), metrics


def _spread(batch: base.Batch, count: int) -> base.Batch:
  """`count` rows of a batch, as many of every device's, which stay where they are."""
  return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:])[:, 0], batch)


def _after_all(step: jax.Array, grads, out: base.LossOut) -> jax.Array:
  """The step's number, from when all that the loss reads of prototypes has been read.

  No norm is negative, but XLA does not know. See `prototype_set.after_step`.
  """
  vectors = [x for x in jax.tree.leaves(out.stats) if x.ndim <= 1 and x.dtype == jax.numpy.float32]
  return step + (optax.tree.norm((grads, out.metrics, vectors)) < 0)


def refresh(state: TrainState, embeddings: jax.Array, index: jax.Array, *, method) -> TrainState:
  """State n before its batch, with what the method learns from all images; see `base.Method`."""
  key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)[2]  # step n takes 0 and 1
  variables = method.refresh(variables_of(state), embeddings, index, key)
  return state.replace(prototypes=variables.prototypes, carry=variables.carry)
