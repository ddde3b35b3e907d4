"""One row a method and kind of prototypes: what `train_step_test.py` holds all of them to."""

from typing import NamedTuple

import tiny


class Row(NamedTuple):
  """A method to test.

  Attributes:
    name: file in protojax/methods.
    prototypes: kind.
    changes: overrides of `tiny.config`, as pairs.
    collectives: other collectives than all-reduce that its step may hold: (op, most bytes, why).
    learns: overrides under which its loss falls within 60 steps, where it would not without.
    model: mesh.model of its step on eight devices. Above 1 it has K = 88 or 44, and no other size
      is a multiple of 11. Left at 1 where scores travel: CARP cuts all prototypes in a random
      order, several classifiers are parts of one array.
  """

  name: str
  prototypes: str
  changes: tuple = ()
  collectives: tuple = ()
  learns: tuple = ()
  model: int = 1

  def config(self, **more):
    split = {"method__num_prototypes": 88} if self.model > 1 and self.prototypes != "none" else {}
    return tiny.config(self.name, self.prototypes, **{**split, **dict(self.changes), **more})


# While a centre is still forming, DINO's loss may rise at first: balanced targets here.
_DINO = (("method__targets", "sinkhorn"),)

# Prototypes compared two at a time: two or eleven blocks of those of a device, whatever the mesh.
_BLOCKS = (("method__block", 2),)

# Every view hides two of its four patches: else the loss follows how many views are masked.
_IBOT = (
  *_DINO,
  ("method__mask_shape", "rand"),
  ("method__mask_ratios", (0.5,)),
  ("method__mask_spreads", (0.0,)),
)

_MSN = (("head__norm", "batch"), ("model__patch_size", 4), ("method__drop_patches", 0.3))

# Its scores have no temperature: from small features the way off ln K is long.
_CARP = (
  ("head__l2", False),
  ("head__norm", "batch"),
  ("method__partition_size", 8),
  ("head__init", "uniform"),
  ("head__norm_output", True),
  ("mixture__horizon_steps", 500.0),
)
_FALCON = (
  ("head__layers", 1),
  ("head__norm_output", True),
  ("head__init", "uniform"),
  ("head__l2", False),
)
_FALCON_BLOCKS = (
  *_FALCON,
  ("method__assign", "tanh"),
  ("method__prior", "forward"),
  *_BLOCKS,
)
# With more codes than images the forward prior says little.
_FALCON_FEW = (("method__num_prototypes", 16),)

_SWAV = (("method__queue_length", 32),)  # two batches: the third step uses it

# Features of length one: others start so near 0 that every image is in every cluster.
_GEDI = (("head__l2", False),)
_GEDI_LEGACY = (("head__l2", True), ("method__legacy", True))

_GEDI_GEN = (("method__generative", True), ("method__sgld_steps", 3), ("method__sgld_rate", 0.1))

_TWO_VIEWS = (
  ("augment__num_local", 0),
  ("head__l2", False),
  ("head__norm", "batch"),
  ("head__activation", "relu"),
  ("head__bias", False),
  ("head__init", "uniform"),
)

_KOLEO = (  # of [B, 2] features in the global batch
  ("all-gather", 4 * 16 * 2 * 32, "KoLeo compares each with all others [B, 2, F]"),
  ("all-to-all", 8 * 16 * 2, "the neighbours' numbers"),
)
_VMF = (
  ("method__vmf", True),
  ("method__train_prototype_norm", True),
  ("method__koleo_proto", 0.1),
  ("method__koleo_proto_rows", 8),
)

# PCL: no clusters before a refresh, so stand-ins; the queue of a small set holds its own images.
_PCL = (
  ("augment__num_local", 0),
  ("method__coarse_clusters", (8,)),
  ("method__queue_size", 32),
  ("method__num_prototypes", 44),  # fewer than images
)
_QUEUE = (("all-gather", 4 * 16 * 16, "every device holds the whole queue of keys"),)

# A new method adds its row here. An option of the loss alone is set in a row that is here anyway:
# the other row of its method keeps the default. Frozen prototypes take the path of a mixture that
# does not move.
METHODS = (
  Row("dino", "learned", learns=_DINO),
  Row("dino", "learned", _VMF, learns=_DINO),
  Row("dino", "mixture", (*_DINO, *_BLOCKS), model=4),
  Row("dino", "frozen", (*_DINO, ("method__koleo", 0.1)), _KOLEO),
  Row("ibot", "learned", learns=_IBOT),
  Row("ibot", "mixture", (*_IBOT, *_BLOCKS), model=2),
  Row("ibot", "frozen", (*_IBOT, ("method__shared_head", True))),
  Row("msn", "learned", (*_MSN, *_BLOCKS)),
  Row("msn", "mixture", (*_MSN, ("method__targets", "sharpened")), model=4),
  Row("carp", "learned", (*_CARP, *_BLOCKS)),
  Row("carp", "mixture", _CARP),
  Row("swav", "learned", (*_SWAV, *_BLOCKS), model=2),
  Row("swav", "mixture", _SWAV),
  Row("swav", "frozen", model=8),  # without a queue
  Row("gedi", "learned", (*_GEDI, *_BLOCKS), learns=(("head__l2", True),)),
  Row("gedi", "mixture", _GEDI_LEGACY),
  Row("gedi", "learned", (*_GEDI_GEN, *_BLOCKS), model=4),
  Row("self_classifier", "learned", (("method__more_classifiers", (8, 16)), *_BLOCKS)),
  Row("self_classifier", "mixture", _BLOCKS, model=4),
  Row("falcon", "dictionary", _FALCON),
  Row("falcon", "dictionary", _FALCON_BLOCKS, learns=_FALCON_FEW, model=4),
  Row("pcl", "kmeans", _PCL, _QUEUE, (("optim__name", "adamw"), ("optim__lr", 0.005)), model=4),
  Row("barlow_twins", "none", _TWO_VIEWS),
  Row("vicreg", "none", _TWO_VIEWS, model=2),
)
