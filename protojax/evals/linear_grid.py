"""The linear probe of the papers: a grid of SGD heads, all trained at once on frozen features.

Every learning rate with every layer is a head of its own; all are given the same batches. As in
arXiv 2104.14294, 2111.07832 and 2304.07193: momentum .9, no weight decay, cosine to 0, weights from
N(0, .01), features as they come. Unlike there, features are computed once with the evaluation
transform, so there is no train augmentation, and the winner is not chosen on test images unless
asked for.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from protojax import errors, progress, schedules
from protojax.evals import linear

# Per 256 images, over the range of arXiv 2111.07832.
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_MOMENTUM = optax.trace(decay=0.9)
_IMAGES = 4096  # tested at a time


def _logits(heads, features):
  """{layer: [R, B, C]} of heads {"weight": [R, F, C], "bias": [R, C]} a layer, R rates."""
  product = functools.partial(jnp.einsum, "bf,rfc->rbc", precision=jax.lax.Precision.HIGHEST)
  return {
    layer: product(features[layer], head["weight"]) + head["bias"][:, None, :]
    for layer, head in heads.items()
  }


@functools.partial(jax.jit, donate_argnums=0)
def _step(state, features, labels, rates):
  """One step of SGD of every head; `rates` [R] are those of this step."""

  def loss(heads):
    each = {
      layer: optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.broadcast_to(labels, logits.shape[:-1])
      )
      for layer, logits in _logits(heads, features).items()
    }
    # Heads share nothing, so the gradient of the sum is every head's own.
    return sum(jnp.sum(losses.mean(axis=1)) for losses in each.values())

  heads, trace = state
  directions, trace = _MOMENTUM.update(jax.grad(loss)(heads), trace)

  def move(parameter, direction):
    return parameter - rates.reshape(-1, *[1] * (direction.ndim - 1)) * direction

  return jax.tree.map(move, heads, directions), trace


@jax.jit
def _right(heads, features, labels):
  """{layer: int32 [R]}: images that each head gets right; none for one that is not finite."""
  out = {}
  for layer, logits in _logits(heads, features).items():
    right = jnp.sum(logits.argmax(axis=-1) == labels[None, :], axis=1)
    out[layer] = jnp.where(jnp.isfinite(logits).all(axis=(1, 2)), right, 0)
  return out


def train(
  features: Mapping[str, np.ndarray],
  labels: np.ndarray,
  indices: np.ndarray,
  *,
  num_classes: int,
  rates: Sequence[float] = RATES,
  epochs: int = 100,
  batch_size: int = 256,
  seed: int = 0,
) -> dict[str, dict[str, jax.Array]]:
  """Trains a linear classifier for every learning rate and layer.

  Args:
    features: {layer: [N, F]}, any float dtype, on the host.
    labels: int [N], 0 to num_classes - 1.
    indices: int [n], the images to train on.
    num_classes: C.
    rates: R learning rates per 256 images.
    epochs: over these images, in a new order each; what does not fill a batch is left out.
    batch_size: at most n are taken.
    seed: of the first weights and the orders.

  Returns:
    {layer: {"weight": [R, F, C], "bias": [R, C]}} float32.
  """
  labels, batch_size = np.asarray(labels, np.int32), min(batch_size, len(indices))
  key, rng, heads = jax.random.key(seed), np.random.default_rng(seed), {}
  for i, (layer, x) in enumerate(features.items()):
    weight = 0.01 * jax.random.normal(jax.random.fold_in(key, i), (x.shape[1], num_classes))
    # The same start for every rate.
    heads[layer] = {
      "weight": jnp.tile(weight, (len(rates), 1, 1)),
      "bias": jnp.zeros((len(rates), num_classes)),
    }
  state = heads, _MOMENTUM.init(heads)
  largest = np.asarray(rates, np.float32) * np.float32(batch_size / 256)
  steps = len(indices) // batch_size  # of an epoch
  cosine = schedules.cosine(1.0, 0.0, epochs * steps)
  decay = np.asarray(jax.vmap(cosine)(np.arange(epochs * steps)))
  for step in progress.over(range(epochs * steps), "training linear heads, step"):
    if step % steps == 0:
      order = rng.permutation(indices)
    some = order[step % steps * batch_size :][:batch_size]
    batch = {layer: np.asarray(x[some], np.float32) for layer, x in features.items()}
    state = _step(state, batch, labels[some], decay[step] * largest)
  return state[0]


def accuracies(
  heads: dict[str, dict[str, jax.Array]],
  features: Mapping[str, np.ndarray],
  labels: np.ndarray,
  indices: np.ndarray,
) -> dict[str, np.ndarray]:
  """Tests every head: {layer: accuracies [R], 0 to 1}; 0 for a head that diverged.

  Args:
    heads: from `train`.
    features: {layer: [M, F]}.
    labels: int [M].
    indices: int [n], the images to test on.
  """
  total = {layer: 0 for layer in heads}
  for start in range(0, len(indices), _IMAGES):
    some = indices[start : start + _IMAGES]
    batch = {layer: np.asarray(features[layer][some], np.float32) for layer in heads}
    right = _right(heads, batch, np.asarray(labels[some]))
    total = {layer: total[layer] + np.asarray(right[layer], np.int64) for layer in heads}
  return {layer: right / len(indices) for layer, right in total.items()}


def _best(found: dict[str, np.ndarray]) -> tuple[str, int]:
  """(layer, number of the rate) of the highest accuracy; of equals the first."""
  layer = max(found, key=lambda name: found[name].max())
  if not found[layer].max() > 0.0:
    raise errors.UserError(
      "linear probe: no head of the grid learned anything: lower the learning rates, or see "
      "whether the features are all alike"
    )
  return layer, int(found[layer].argmax())


def evaluate(
  bank: Mapping[str, np.ndarray],
  bank_labels: np.ndarray,
  queries: Mapping[str, np.ndarray],
  query_labels: np.ndarray,
  *,
  num_classes: int,
  mode: str = "honest",
  rates: Sequence[float] = RATES,
  epochs: int = 100,
  batch_size: int = 256,
  seed: int = 0,
) -> dict[str, float | str]:
  """Measures the accuracy of the best head of the grid on test images.

  "honest": all heads are trained on nine tenths of the bank, the best on the last tenth
  (`linear.held_out`) is trained again on all of it, and only then tested. "paper": all heads are
  trained on the whole bank and the best one *on the test images* is reported, as in the papers.

  Args:
    bank: {layer: [N, F]}, features of the training images.
    bank_labels: int [N].
    queries: {layer: [M, F]}, features of the test images.
    query_labels: int [M].
    num_classes: C.
    mode: "honest" or "paper".
    rates: as for `train`.
    epochs: as for `train`.
    batch_size: as for `train`.
    seed: as for `train`.

  Returns:
    {"accuracy": on test, "layer", "rate": per 256 images, of the winner; and "best_of_last", ...:
    the best head of every layer on the images it was chosen by (held out, or test)}, 0 to 1.

  Raises:
    UserError: for fewer than ten bank images, or if every head diverged.
  """
  bank_labels, query_labels = np.asarray(bank_labels), np.asarray(query_labels)
  test = functools.partial(
    accuracies, features=queries, labels=query_labels, indices=np.arange(query_labels.size)
  )
  fit = functools.partial(
    train, num_classes=num_classes, epochs=epochs, batch_size=batch_size, seed=seed
  )
  everything = np.arange(bank_labels.size)
  if mode == "paper":
    found = test(fit(bank, bank_labels, everything, rates=rates))
    layer, i = _best(found)
    accuracy = found[layer][i]
  else:
    held = linear.held_out(bank_labels)
    heads = fit(bank, bank_labels, everything[~held], rates=rates)
    found = accuracies(heads, bank, bank_labels, everything[held])
    layer, i = _best(found)
    winner = fit({layer: bank[layer]}, bank_labels, everything, rates=rates[i : i + 1])
    accuracy = test(winner)[layer][0]
  best = {f"best_of_{name}": float(each.max()) for name, each in found.items()}
  return {"accuracy": float(accuracy), "layer": layer, "rate": float(rates[i])} | best
