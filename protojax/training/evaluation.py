"""What a training state looks like: collapse measures, k-NN and linear accuracy.

`Snapshot.monitor` is cheap and looks at a fixed sample; `Snapshot.evaluate` runs the whole labelled
bank through the encoder. Features come from the teacher's backbone (the encoder's where there is no
teacher) under the evaluation transform, detached: nothing here has a gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from protojax.evals import knn, linear, purity
from protojax.metrics import collapse
from protojax.training import encode, sharding, train_step


class Snapshot:
  """Measures of a state, compiled once.

  Args:
    program: `programs.Program`.
    bank: source whose images are looked at (and, if labelled, the k-NN's train set).
    test: labelled source for k-NN and linear accuracy, or None.
    cached: {source: `cache.Cache`} of those that lie on the devices.
  """

  def __init__(self, program, *, bank, test=None, cached=None):
    config, method = program.config, program.method
    self._config, self._mesh, self._method = config, program.mesh, method
    self._evaluation, self._probe = program.evaluation, program.probe
    self._bank, self._test, self._cached = bank, test, cached or {}
    whole = sharding.replicated(self._mesh)
    self._forward = jax.jit(self._forward_fn, out_shardings=whole)
    self._matrices = jax.jit(
      lambda s: method.prototype_matrices(train_step.variables_of(s)), out_shardings=whole
    )

    @jax.jit
    def start(seed):
      method_key, _, _ = jax.random.split(jax.random.key(seed), 3)
      return method.prototype_matrices(method.init(method_key))

    # The prototypes of step 0 are a function of the seed: drift needs no copy of them.
    self._start = functools.cache(lambda: jax.device_get(start(config.seed)))

  def _forward_fn(self, state, batch):
    """Features [B, D] and codes {set: [B]}; labels come back too, whole everywhere."""
    variables = train_step.variables_of(state)
    images = self._evaluation(batch)
    codes = {
      name: jnp.argmax(scores, axis=-1).astype(jnp.int32)
      for name, scores in self._method.codes(variables, images).items()
    }
    return {
      "features": self._method.features(variables, images),
      "embeddings": self._method.embeddings(variables, images),
      "codes": codes,
      "index": batch["index"],
      "label": batch["label"],
    }

  def _run(self, state, source, limit=0, parts=("features", "codes", "label")):
    """Rows of `source`, whole on the host of every process: {part: array or {set: array}}.

    Args:
      state: `train_step.TrainState`.
      source: what to look at.
      limit: evenly spread subset; 0 takes all.
      parts: of what `_forward` returns; embeddings [N, D] are left on the device unless asked for.
    """
    config = self._config

    def forward(batch):
      out = self._forward(state, batch)
      return {name: out[name] for name in parts}

    return encode.rows(
      forward,
      source,
      mesh=self._mesh,
      batch_size=config.batch_size,
      image_size=config.data.image_size,
      num_workers=config.data.num_workers,
      limit=limit,
      cached=self._cached.get(source),
    )

  def embeddings(self, state, source) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings [N, D], index int32 [N]) of all images of `source` that can be read."""
    seen = self._run(state, source, parts=("embeddings", "index"))
    return seen["embeddings"]["prototypes"], seen["index"]

  def monitor(self, state) -> dict[str, float]:
    """Collapse measures of the prototypes and of a fixed sample of the bank."""
    config = self._config
    limit = min(config.monitor.images, len(self._bank))
    seen = self._run(state, self._bank, limit, ("features", "codes", "embeddings"))
    features, codes = seen["features"], seen["codes"]
    out = {
      "collapse/feature_std": collapse.feature_std(features),
      "collapse/mean_cosine": collapse.mean_pairwise_cosine(features),
      "collapse/rankme": collapse.rankme(features),
    }
    if state.teacher != ():
      out["collapse/teacher_distance"] = collapse.teacher_distance(
        state.encoder, state.teacher["encoder"]
      )
    for name, matrix in self._matrices(state).items():
      tag = "" if name == "prototypes" else f"{name}_"
      out |= {f"collapse/{tag}{k}": v for k, v in self._prototypes(name, matrix).items()}
      k = matrix.shape[0]
      out[f"collapse/{tag}used_sample"] = collapse.used_fraction(codes[name], k)
      out[f"collapse/{tag}perplexity_sample"] = collapse.usage_perplexity(codes[name], k)
      out[f"collapse/{tag}relative_uniqueness"] = collapse.relative_uniqueness(
        matrix, seen["embeddings"][name]
      )
      out[f"collapse/{tag}embedding_cosine"] = collapse.mean_pairwise_cosine(
        seen["embeddings"][name]
      )
    return {k: float(v) for k, v in jax.device_get(out).items()}

  def _prototypes(self, name, matrix) -> dict[str, float]:
    num, dim = matrix.shape
    counts = np.asarray(collapse.unique_counts(matrix)) / num
    null = np.asarray(collapse.random_unique(num, dim)) / num
    out = {f"unique_{t}": c for t, c in zip(collapse.THRESHOLDS, counts, strict=True)}
    out |= {f"unique_{t}_random": c for t, c in zip(collapse.THRESHOLDS, null, strict=True)}
    out["drift"] = collapse.drift(matrix, self._start()[name])
    return out

  def evaluate(self, state) -> dict[str, float]:
    """Usage of the prototypes over the whole bank, and accuracies where there are labels."""
    return self._judge(state, *self._encode(state))

  def final(self, state) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Everything about the end of a run.

    Returns:
      Measures: those of `monitor` and `evaluate` and, with labels, "probe/linear_fitted", the
      accuracy of a linear classifier fitted to frozen features; and the arrays that the report
      draws: "usage" [K], "nearest" and "nearest_random" (cosine distance of every prototype to its
      nearest neighbour, [K]), "spectrum" [D], and with labels "majority" and "purity" [K], the most
      frequent class of each prototype's images and its share.
    """
    bank, test = self._encode(state)
    measures = self.monitor(state) | self._judge(state, bank, test)
    arrays = {"spectrum": np.asarray(collapse.spectrum(bank["features"]))}
    if matrices := self._matrices(state):
      name = "prototypes" if "prototypes" in matrices else next(iter(matrices))
      matrix = matrices[name]
      num, dim = matrix.shape
      arrays["usage"] = np.bincount(bank["codes"][name], minlength=num)
      if self._bank.num_classes:
        arrays["majority"], arrays["purity"] = purity.majority(
          bank["codes"][name], bank["label"], num
        )
      arrays["nearest"] = np.asarray(collapse.nearest_distances(matrix))
      arrays["nearest_random"] = np.asarray(
        collapse.nearest_distances(collapse.random_prototypes(num, dim))
      )
    if test is not None:
      fitted = linear.evaluate(
        bank["features"],
        bank["label"],
        test["features"],
        test["label"],
        num_classes=self._bank.num_classes,
      )
      measures["probe/linear_fitted"] = fitted["linear"]
    return measures, arrays

  def _encode(self, state):
    """Rows of the bank and, or None, of the test images."""
    bank = self._run(state, self._bank, self._config.probe.limit)
    return bank, None if self._test is None else self._run(state, self._test)

  def _judge(self, state, bank, test) -> dict[str, float]:
    config, out = self._config, {}
    for name, code in bank["codes"].items():
      tag = "" if name == "prototypes" else f"{name}_"
      num = self._start()[name].shape[0]
      out[f"collapse/{tag}used"] = collapse.used_fraction(code, num)
      out[f"collapse/{tag}perplexity"] = collapse.usage_perplexity(code, num)
    if test is not None:
      out["probe/knn"] = knn.accuracy(
        bank["features"],
        bank["label"],
        test["features"],
        test["label"],
        num_classes=self._bank.num_classes,
        k=config.probe.k,
        temperature=config.probe.temperature,
      )
      if self._probe is not None:
        predicted = self._probe.predict(state.carry["probe"], test["features"])
        out["probe/linear"] = np.mean(np.asarray(predicted) == test["label"])
    return {k: float(v) for k, v in jax.device_get(out).items()}
