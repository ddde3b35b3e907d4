"""What a training state looks like: collapse measures, k-NN and linear accuracy.

`Snapshot.monitor` is cheap and sees a fixed sample; `Snapshot.evaluate` runs the whole labelled
bank through the encoder. Features come from the teacher's backbone (the encoder's where there is no
teacher) under the evaluation transform, detached: nothing here has a gradient.
"""

import functools
import math

import jax
import numpy as np
from absl import logging

from protojax import errors, metrics, progress, sizes
from protojax.data import augment, pipeline
from protojax.evals import knn, linear, purity
from protojax.metrics import collapse, uniqueness
from protojax.prototypes import scoring
from protojax.training import encode, sharding, train_step

# What a floor costs is bounded: images of the bank and of the test, pixels a side, and what the
# linear classifier tries.
FLOOR_IMAGES = 10_000
FLOOR_SIDE = 16
_FLOOR_STRENGTHS, _FLOOR_STEPS = (1e-1, 1e-2, 1e-3), 30
# Before them where images are fewer than this many a pixel value: 300 of CIFAR-10 get 27 % with
# them and 24 % without, 1,000 get 33 and 30 %.
_FLOOR_FEW, _FLOOR_STRONG = 1.5, (10.0, 1.0)
_FLOOR_PRODUCTS = 2e9  # of the linear floor, images x pixels x classes; beyond, it is left out

# All pairs of prototypes are compared while training where there are at most so many; of more so
# many stand for all, which errs by .011 of K at most (one standard error).
_ALL_PAIRS, _LOOKED_AT = 65_536, 2048


def looked_at(num: int, asked: int | None, *, ended: bool) -> int:
  """How many of K prototypes are compared with all others.

  Args:
    num: K.
    asked: monitor.prototypes; 0 takes all, None all at the end of training and, while it lasts, all
      of 65,536 and 2,048 of more.
    ended: whether training has ended.
  """
  if asked is None:
    asked = 0 if ended or num <= _ALL_PAIRS else _LOOKED_AT
  return min(asked or num, num)


def pixels(config, batch) -> dict[str, jax.Array]:
  """Images as the rows of a floor: {"pixels": float32 [B, H * W * C], 0 to 1, "label": [B]}.

  The evaluation transform without its normalisation, at most `FLOOR_SIDE` pixels a side.

  Args:
    config: resolved.
    batch: as `encode.chunks` has it.
  """
  channels, sides = batch["image"].shape[-1], _floor_sides(config)
  images = augment.evaluate(
    batch["image"],
    sizes.checked("augment.global_size", sides),
    (0.0,) * channels,
    (1.0,) * channels,
    crop=config.probe.crop,
    original=batch["size"],
  )
  return {"pixels": images.reshape(len(images), -1), "label": batch["label"]}


def _floor_sides(config) -> list[int]:
  return [min(side, FLOOR_SIDE) for side in sizes.pair(config.augment.global_size)]


class Snapshot:
  """Measures of a state, compiled once.

  Args:
    program: `programs.Program`.
    bank: source of the images (and, if labelled, the k-NN's train set).
    test: labelled source for k-NN and linear accuracy, or None.
    cached: {source: `cache.Cache`} of those that lie on the devices.
  """

  def __init__(self, program, *, bank, test=None, cached=None):
    config, method = program.config, program.method
    self._config, self._mesh, self._method = config, program.mesh, method
    self._evaluation, self._probe = program.evaluation, program.probe
    self._bank, self._test, self._cached = bank, test, cached or {}
    self._floor_pixels = math.prod(_floor_sides(config)) * config.data.channels
    replicated = sharding.replicated(self._mesh)
    self._forward = jax.jit(self._forward_fn, out_shardings=replicated)
    self._pixels = jax.jit(functools.partial(pixels, config), out_shardings=replicated)
    self._matrices = jax.jit(
      lambda s: method.prototype_matrices(train_step.variables_of(s)), out_shardings=replicated
    )

    @jax.jit
    def start(seed):
      method_key, _, _ = jax.random.split(jax.random.key(seed), 3)
      return method.prototype_matrices(method.init(method_key))

    # The prototypes of step 0 are a function of the seed: drift needs no copy of them.
    self._start = functools.cache(lambda: jax.device_get(start(config.seed)))

  def _forward_fn(self, state, batch):
    """Features [B, D] and codes {set: [B]}; labels come back too; all of it on every process."""
    if self._config.mesh.fsdp:  # gathered once a batch, whatever XLA would do at each product
      together = functools.partial(
        jax.lax.with_sharding_constraint, shardings=sharding.replicated(self._mesh)
      )
      state = state.replace(encoder=together(state.encoder))
      if state.teacher != ():
        teacher = state.teacher["encoder"]
        state = state.replace(teacher={**state.teacher, "encoder": together(teacher)})
    variables = train_step.variables_of(state)
    images = self._evaluation(batch)
    return {
      "features": self._method.features(variables, images),
      "embeddings": self._method.embeddings(variables, images),
      "codes": scoring.codes(self._method, variables, images),
      "index": batch["index"],
      "label": batch["label"],
    }

  def _run(self, state, source, limit=0, parts=("features", "codes", "label")):
    """Rows of all images of `source`, on the host of every process: {part: array or {set: array}}.

    Args:
      state: `train_step.TrainState`.
      source: the images.
      limit: evenly spread subset; 0 takes all.
      parts: of what `_forward` returns; embeddings [N, D] are left on the device unless asked for.
    """

    def forward(batch):
      out = self._forward(state, batch)
      return {name: out[name] for name in parts}

    return self._rows(forward, source, limit)

  def _rows(self, forward, source, limit):
    config = self._config
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
    """Embeds all images of `source` that can be read: (embeddings [N, D], index int32 [N])."""
    encoded = self._run(state, source, parts=("embeddings", "index"))
    return encoded["embeddings"]["prototypes"], encoded["index"]

  def floors(self, state) -> dict[str, float]:
    """What accuracies are without training, to be measured once, of the state of step 0.

    Of at most `FLOOR_IMAGES` images of the bank and as many of the test, evenly spread, and at most
    `FLOOR_SIDE` pixels a side. Says so where raw pixels are worse than the net, and so no bar.

    Returns:
      {"floor/knn_pixels", "floor/linear_pixels": accuracies of the images themselves, 0 to 1, the
      latter only if it is cheap; "floor/knn_untrained": that of the net as it is, called
      "floor/knn_start" where it starts from other weights (config.init_from);
      "floor/bank_images", "floor/test_images": how many there were}; {} without labels.
    """
    if self._test is None:
      return {}
    bank, test = (self._rows(self._pixels, *of) for of in self._floor_images())
    rows = *_labelled(bank, "pixels"), *_labelled(test, "pixels")
    for source, split, found, used in (
      (self._bank, "train_split", bank, rows[1]),
      (self._test, "test_split", test, rows[3]),
    ):
      num = len(found["label"])
      if not len(used):
        raise errors.UserError(
          f"none of {num} images of {source.name} has a label: name labelled ones, "
          f"config.probe.{split}=SPLIT"
        )
      if len(used) < num:
        logging.info(
          "%d of %d images of %s have no label: accuracies leave them out",
          num - len(used),
          num,
          source.name,
        )
    out = {"floor/knn_pixels": self._knn(*rows)}
    if self._has_linear_floor(*rows[0].shape):
      out["floor/linear_pixels"] = self._linear_floor(*rows)
    bank, test = (self._run(state, *of, ("features", "label")) for of in self._floor_images())
    rows = *_labelled(bank, "features"), *_labelled(test, "features")
    which = "start" if self._config.init_from else "untrained"
    out[f"floor/knn_{which}"] = self._knn(*rows)
    if out["floor/knn_pixels"] < out[f"floor/knn_{which}"]:
      name = "net it starts from" if self._config.init_from else "untrained net"
      logging.info(
        "raw pixels are worse than the %s here: the verdict compares k-NN with that net alone", name
      )
    return out | {"floor/bank_images": len(rows[1]), "floor/test_images": len(rows[3])}

  def _has_linear_floor(self, images: int, pixels: int) -> bool:
    """Whether a linear classifier of so many images of so many pixels is cheap."""
    return images >= 10 and images * pixels * self._bank.num_classes <= _FLOOR_PRODUCTS

  def _linear_floor(self, bank, bank_labels, test, labels) -> float:
    """Accuracy of a linear classifier, fitted as that of the raw pixels is."""
    few = len(bank) < _FLOOR_FEW * bank.shape[1]
    strengths = (*_FLOOR_STRONG, *_FLOOR_STRENGTHS) if few else _FLOOR_STRENGTHS
    return linear.evaluate(
      *(bank, bank_labels, test, labels),
      num_classes=self._bank.num_classes,
      strengths=strengths,
      max_steps=_FLOOR_STEPS,
    )["linear"]

  def _floor_images(self):
    """(source, how many of its images) of bank and test."""
    limit = min(self._config.probe.limit or FLOOR_IMAGES, max(FLOOR_IMAGES, self._config.probe.k))
    return (self._bank, limit), (self._test, FLOOR_IMAGES)

  def _knn(self, bank, bank_labels, queries, labels) -> float:
    probe = self._config.probe
    return knn.accuracy(
      bank,
      bank_labels,
      queries,
      labels,
      num_classes=self._bank.num_classes,
      k=probe.k,
      temperature=probe.temperature,
    )

  def monitor(self, state) -> dict[str, float]:
    """Collapse measures of the prototypes and of a fixed sample of the bank.

    Of many prototypes some stand for all, see `looked_at`.
    """
    return self._monitor(state, self._partners(state, ended=False))

  def _partners(self, state, *, ended: bool) -> dict[str, collapse.Partners]:
    found = {}
    for name, matrix in self._matrices(state).items():
      looked = looked_at(len(matrix), self._config.monitor.prototypes, ended=ended)
      with progress.during(f"comparing {looked:,} prototypes with {len(matrix):,}"):
        found[name] = collapse.partners(matrix, looked)
    return found

  def _monitor(self, state, partners) -> dict[str, float]:
    limit = min(self._config.monitor.images, len(self._bank))
    encoded = self._run(state, self._bank, limit, ("features", "codes", "embeddings"))
    teacher = {}
    if state.teacher != ():
      teacher = {"encoder": state.encoder, "teacher": state.teacher["encoder"]}
    return metrics.summary(
      prototypes=self._matrices(state),
      initial_prototypes=self._start(),
      partners=partners,
      sample=True,
      **encoded,
      **teacher,
    )

  def evaluate(self, state) -> dict[str, float]:
    """Usage of the prototypes over the whole bank, and accuracies where there are labels."""
    return self._judge(state, *self._encode(state))

  def final(self, state) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Everything about the end of a run.

    Returns:
      Measures: those of `monitor` and `evaluate`; with labels "probe/linear_fitted", the accuracy
      of a linear classifier fitted to frozen features, and "floor/linear", the same on the images
      of the floors and fitted as theirs, where there are more; "data/unreadable_bank" and "_test",
      how many images could not be read, where some could not; and the arrays that the report
      draws: "usage" [K], "nearest" and "nearest_random" [M] (cosine distance of every prototype
      that was looked at to its nearest neighbour, and quantiles of that of random ones), "spectrum"
      [D], and with labels "majority" and "purity" [K], the most frequent class of each prototype's
      images and its share.
    """
    bank, test = self._encode(state)
    partners = self._partners(state, ended=True)
    measures = self._monitor(state, partners) | self._judge(state, bank, test)
    measures |= self._unreadable(bank, test)
    arrays = {"spectrum": np.asarray(collapse.spectrum(bank["features"]))}
    if matrices := self._matrices(state):
      name = "prototypes" if "prototypes" in matrices else next(iter(matrices))
      matrix = matrices[name]
      num, dim = matrix.shape
      arrays["usage"] = np.bincount(bank["codes"][name], minlength=num)
      if self._bank.num_classes:
        arrays["majority"], arrays["purity"] = purity.majority(
          *_labelled(bank["codes"] | {"label": bank["label"]}, name), num
        )
      arrays["nearest"] = near = partners[name].nearest
      arrays["nearest_random"] = uniqueness.null_nearest(
        num, dim, (np.arange(len(near)) + 0.5) / len(near)
      ).astype(np.float32)
    if test is not None:
      rows = *_labelled(bank, "features"), *_labelled(test, "features")
      fitted = linear.evaluate(*rows, num_classes=self._bank.num_classes)
      measures["probe/linear_fitted"] = fitted["linear"]
      few = self._of_floors(bank, test)
      if few is not None and self._has_linear_floor(len(few[0]), self._floor_pixels):
        measures["floor/linear"] = self._linear_floor(*few)
    return measures, arrays

  def _encode(self, state):
    """Rows of the bank and, or None, of the test images."""
    bank = self._run(state, self._bank, self._config.probe.limit)
    return bank, None if self._test is None else self._run(state, self._test)

  def _unreadable(self, bank, test) -> dict[str, float]:
    """How many images could not be read, of these rows; {} if all could."""
    asked = min(self._config.probe.limit or len(self._bank), len(self._bank))
    lacking = {"bank": asked - len(bank["label"])}
    if test is not None:
      lacking["test"] = len(self._test) - len(test["label"])
    return {f"data/unreadable_{of}": float(n) for of, n in lacking.items() if n}

  def _judge(self, state, bank, test) -> dict[str, float]:
    sizes = {name: len(matrix) for name, matrix in self._start().items()}
    out = metrics.summary(codes=bank["codes"], num_prototypes=sizes)
    if test is not None:
      rows = *_labelled(bank, "features"), *_labelled(test, "features")
      out["probe/knn"] = self._knn(*rows)
      if (few := self._of_floors(bank, test)) is not None:
        out["floor/knn"] = self._knn(*few)
      if self._probe is not None:
        _, _, features, labels = rows
        predicted = self._probe.predict(state.carry["probe"], features)
        out["probe/linear"] = float(np.mean(np.asarray(predicted) == labels))
    return out

  def _of_floors(self, bank, test):
    """Features and labels of both on the images of the floors; None if these are all there are."""
    (_, few), (_, fewer) = self._floor_images()
    if few >= len(bank["label"]) and fewer >= len(test["label"]):
      return None
    chosen = ()
    for rows, most in (bank, few), (test, fewer):
      some = pipeline.spread(len(rows["label"]), most)
      chosen += _labelled({name: rows[name][some] for name in ("features", "label")}, "features")
    return chosen


def _labelled(rows: dict[str, np.ndarray], part: str) -> tuple[np.ndarray, np.ndarray]:
  """`part` [n, ...] and labels [n] of the images that have a label."""
  known = rows["label"] >= 0
  if known.all():  # no copy of what may be gigabytes
    return rows[part], rows["label"]
  return rows[part][known], rows["label"][known]
