"""Every constant of the published runs beside ours: the list behind docs/fidelity.md.

  python docs/fidelity.py        writes docs/fidelity.md

A test holds the list against the recipes (tests/fidelity_test.py): a constant with a key must have
`value` there or say in `note` why not, and docs/fidelity.md must be what this file writes.
"""

import pathlib
from typing import Any, NamedTuple

from protojax import recipes, trees

PAGE = pathlib.Path(__file__).with_suffix(".md")


class Constant(NamedTuple):
  """One constant of a published run.

  Attributes:
    name: what it is.
    published: as the source says it.
    key: our setting; "" where there is none.
    value: the published one in the units of our setting.
    note: of a constant that differs, why, or the switch; of one without a key, what ours is.
  """

  name: str
  published: str
  key: str = ""
  value: Any = None
  note: str = ""


class Run(NamedTuple):
  """A published run.

  Attributes:
    recipe: ours, as `--config` takes it.
    source: where the constants are from.
    constants: of the run.
  """

  recipe: str
  source: str
  constants: tuple[Constant, ...]


C = Constant


_FILE = C(
  "what is cropped",
  "the file",
  "data.image_size",
  None,
  "the file too, but a side of more than 512 pixels is shrunk to that first",
)
_PILLOW_BLUR = C(
  "blur",
  "Pillow's Gaussian of radius .1 to 2",
  note="differs because ours is a true Gaussian, Pillow's a sum of boxes, which differs below .5",
)
_FLOAT16 = C(
  "precision",
  "float16 where it is safe",
  "precision",
  None,
  "bfloat16, which accelerators of today have; losses and statistics in float32",
)
_FLOAT32 = C(
  "precision",
  "float32",
  "precision",
  None,
  "bfloat16 in the encoder's products; switch precision=float32",
)
_LEARNED = C("prototypes", "learned", "method.prototypes", "learned")
_MEAN = C("mean subtracted", "ImageNet's", "augment.mean", (0.485, 0.456, 0.406))
_NORMAL = C("start of the head", "normal, .02", "head.init", "normal")
_UNIFORM = C("start of the head", "PyTorch's uniform", "head.init", "uniform")
_BIASES = C(
  "start of biases in the head",
  "PyTorch's uniform",
  note="differs because they start at 0",
)
_UNIT = C("features normalised", "yes", "head.l2", True)


def _constant_decay(value, text):
  return (
    C("weight decay, start", text, "optim.weight_decay", value),
    C("weight decay, end", text, "optim.final_weight_decay", value),
  )


def _running(published):
  return C(
    "running statistics move",
    published,
    note="differs because they move once a call of the encoder here",
  )


def _crops(scale, local_scale=None, num_local=0, *, interpolation="bicubic"):
  constants = [
    C("global views", "2 of 224 px", "augment.global_size", 224),
    C("their share of the image", str(scale), "augment.global_scale", scale),
    C("local views", str(num_local), "augment.num_local", num_local),
    C("filter of the crops", interpolation, "augment.interpolation", interpolation),
    C("flip", ".5", "augment.flip", 0.5),
    _FILE,
    _MEAN,
  ]
  if num_local:
    constants += [
      C("their size", "96 px", "augment.local_size", 96),
      C("their share of the image", str(local_scale), "augment.local_scale", local_scale),
    ]
  return tuple(constants)


def _colours(jitter, blur, solarize, *, std=(0.229, 0.224, 0.225)):
  names = ("brightness", "contrast", "saturation", "hue")
  constants = [
    C(name, f"{x:g}", f"augment.{name}", x) for name, x in zip(names, jitter, strict=True)
  ]
  return (
    *constants,
    C("colours jittered with probability", ".8", "augment.jitter_prob", 0.8),
    C("grey with probability", ".2", "augment.gray_prob", 0.2),
    C("blurred with probability", str(blur), "augment.blur_prob", blur),
    C("solarised with probability", str(solarize), "augment.solarize_prob", solarize),
    C("standard deviation divided by", str(std), "augment.std", std),
  )


_DINO_COLOURS = _colours((0.4, 0.4, 0.2, 0.1), (1.0, 0.1, 0.5), (0.0, 0.2, 0.0))

_VIT = (
  C("backbone", "ViT-S", "model.name", "vit_small"),
  C("patches", "16 px", "model.patch_size", 16),
  C("epsilon of layer norms", "1e-6", "model.norm_eps", 1e-6),
)

_ADAMW = (
  C("optimizer", "AdamW", "optim.name", "adamw"),
  C("its first beta", ".9", "optim.beta1", 0.9),
  C("its second beta", ".999", "optim.beta2", 0.999),
  C("weight decay, start", ".04", "optim.weight_decay", 0.04),
  C("weight decay, end", ".4", "optim.final_weight_decay", 0.4),
  C("norms and biases decay", "no", "optim.decay_all", False),
  C("tokens and position embeddings decay", "yes", "optim.decay_embeddings", True),
)

_DINO_HEAD = (
  C("layers of the head", "3", "head.layers", 3),
  C("hidden width of the head", "2,048", "head.hidden", 2048),
  C("dimension D", "256", "head.bottleneck", 256),
  C("activation of the head", "GELU", "head.activation", "gelu"),
  C("norm in the head", "none", "head.norm", "none"),
  C("features normalised", "yes", "head.l2", True),
)

_RESNET = (C("backbone", "ResNet-50", "model.name", "resnet50"),)

_LARS_DENOMINATOR = C(
  "denominator of the trust ratio",
  "norm of gradient plus decay",
  note="differs because all LARS here is SwAV's: norm of the gradient plus decay times norm of the "
  "weight; at a decay of 1e-6 they differ in the last digits",
)

DINO = Run(
  "dino_vit_s",
  "facebookresearch/dino at 7c446df, defaults of main_dino.py",
  (
    *_VIT,
    C("drop path", ".1", "model.drop_path", 0.1),
    C("offset of interpolated positions", ".1", "model.position_offset", 0.1),
    *_DINO_HEAD,
    _NORMAL,
    _LEARNED,
    C("prototypes K", "65,536", "method.num_prototypes", 65_536),
    C("prototypes' norms trained", "no", "method.train_prototype_norm", False),
    C("epochs", "100", "num_epochs", 100.0),
    C("batch", "512 (8 x 64)", "batch_size", 512),
    *_ADAMW,
    C("learning rate per 256", "5e-4", "optim.lr", 5e-4),
    C("learning rate, end", "1e-6", "optim.final_lr", 1e-6),
    C("warm-up", "10 epochs", "optim.warmup_epochs", 10.0),
    C("prototypes decay", "yes", "optim.decay_prototypes", True),
    C("longest gradient", "3 per tensor", "optim.clip", 3.0),
    C("what is clipped", "each tensor", "optim.clip_mode", "tensor"),
    C("prototypes stand still", "1 epoch", "optim.freeze_prototypes_epochs", 1.0),
    C("temperature of the student", ".1", "method.student_temp", 0.1),
    C("targets", "centred", "method.targets", "center"),
    C("temperature of the teacher, start", ".04", "method.teacher_temp_start", 0.04),
    C("temperature of the teacher, end", ".04", "method.teacher_temp", 0.04),
    C("its warm-up", "0 epochs", "method.teacher_temp_warmup_epochs", 0),
    C("momentum of the centre", ".9", "method.center_momentum", 0.9),
    C("momentum of the teacher, start", ".996", "teacher.momentum", 0.996),
    C("its way to 1", "cosine", "teacher.schedule", "cosine"),
    *_crops((0.4, 1.0), (0.05, 0.4), 8),
    *_DINO_COLOURS,
    _PILLOW_BLUR,
    _FLOAT16,
  ),
)

IBOT = Run(
  "ibot_vit_s",
  "bytedance/ibot at da316d8, its README's run for ViT-S/16",
  (
    *_VIT,
    C("drop path", ".1", "model.drop_path", 0.1),
    C("offset of interpolated positions", ".1", "model.position_offset", 0.1),
    *_DINO_HEAD,
    _NORMAL,
    _LEARNED,
    C("prototypes K", "8,192", "method.num_prototypes", 8192),
    C("prototypes' norms trained", "yes", "method.train_prototype_norm", True),
    C("one set for class and patch tokens", "yes, on both sides", "method.shared_head", True),
    C("epochs", "800", "num_epochs", 800.0),
    C("batch", "1,024 (16 x 64)", "batch_size", 1024),
    *_ADAMW,
    C("learning rate per 256", "5e-4", "optim.lr", 5e-4),
    C("learning rate, end", "1e-6", "optim.final_lr", 1e-6),
    C("warm-up", "10 epochs", "optim.warmup_epochs", 10.0),
    C("prototypes decay", "yes", "optim.decay_prototypes", True),
    C("longest gradient", "3 per tensor", "optim.clip", 3.0),
    C("what is clipped", "each tensor", "optim.clip_mode", "tensor"),
    C("prototypes stand still", "1 epoch", "optim.freeze_prototypes_epochs", 1.0),
    C("temperature of the student", ".1", "method.student_temp", 0.1),
    C("targets", "centred", "method.targets", "center"),
    C("temperature of class targets, start", ".04", "method.teacher_temp_start", 0.04),
    C("temperature of class targets, end", ".07", "method.teacher_temp", 0.07),
    C("temperature of patch targets, start", ".04", "method.patch_temp_start", 0.04),
    C("temperature of patch targets, end", ".07", "method.patch_temp", 0.07),
    C("their warm-up", "30 epochs", "method.teacher_temp_warmup_epochs", 30),
    C("momentum of the centres", ".9", "method.center_momentum", 0.9),
    C("weight of class tokens", "1", "method.class_weight", 1.0),
    C("weight of patch tokens", "1", "method.patch_weight", 1.0),
    C("hidden shares", "0 or .3", "method.mask_ratios", (0.0, 0.3)),
    C("their spread", "0 or .2", "method.mask_spreads", (0.0, 0.2)),
    C("shape of masks", "blocks", "method.mask_shape", "block"),
    C(
      "patches in the loss",
      "hidden ones",
      note="same: those alone are scored; there all are, and those that are seen count 0 "
      "(tests/methods/ibot_test.py)",
    ),
    C("momentum of the teacher, start", ".996", "teacher.momentum", 0.996),
    C("its way to 1", "cosine", "teacher.schedule", "cosine"),
    *_crops((0.25, 1.0), (0.05, 0.25), 10),
    *_DINO_COLOURS,
    _PILLOW_BLUR,
    _FLOAT16,
  ),
)

MSN = Run(
  "msn_vit_s",
  "facebookresearch/msn at db0d572, configs/pretrain/msn_vits16.yaml at b334057",
  (
    *_VIT,
    C("drop path", "0", "model.drop_path", 0.0),
    C("offset of interpolated positions", "none", "model.position_offset", 0.0),
    C("layers of the head", "3", "head.layers", 3),
    C("hidden width of the head", "2,048", "head.hidden", 2048),
    C("dimension D", "256", "head.bottleneck", 256),
    C("activation of the head", "GELU", "head.activation", "gelu"),
    C("norm in the head", "batch norm", "head.norm", "batch"),
    _NORMAL,
    _UNIT,
    _running("once a resolution"),
    C(
      "views that share its statistics",
      "those of one size on one side",
      "model.joint_norm",
      None,
      "one view at a time, so that the teacher's and the student's masked view are alike",
    ),
    C("start of the patch embedding", "Kaiming", note="differs because DINO's is the only one"),
    _LEARNED,
    C("prototypes K", "1,024", "method.num_prototypes", 1024),
    C(
      "gradient of prototypes",
      "summed over processes",
      note="differs because ours is that of the mean loss, which Adam does not notice",
    ),
    C("epochs", "800", "num_epochs", 800.0),
    C("batch", "1,024 (16 x 64)", "batch_size", 1024),
    *_ADAMW,
    C("learning rate per 256", ".001 / 4", "optim.lr", 2.5e-4),
    C("learning rate at the start, per 256", ".0002 / 4", "optim.warmup_start", 5e-5),
    C("learning rate, end", "1e-6", "optim.final_lr", 1e-6),
    C("warm-up", "15 epochs", "optim.warmup_epochs", 15.0),
    C("length of schedules over that of the run", "1.25", "optim.schedule_scale", 1.25),
    C("prototypes decay", "no", "optim.decay_prototypes", False),
    C("longest gradient", "3", "optim.clip", 3.0),
    C("what is clipped", "the encoder, together", "optim.clip_mode", "encoder"),
    C("prototypes stand still", "never", "optim.freeze_prototypes_epochs", 0.0),
    C("temperature", ".1", "method.temperature", 0.1),
    C("sharpening of targets", ".25", "method.sharpening", 0.25),
    C("targets balanced by Sinkhorn", "yes", "method.targets", "sinkhorn"),
    C("its iterations", "3", "method.sinkhorn_steps", 3),
    C("weight of the mean entropy", "1", "method.prior_weight", 1.0),
    C("weight of the entropy of each view", "0", note="same: there is no such term here"),
    C("patches left out", ".15", "method.drop_patches", 0.15),
    C(
      "patches that stay",
      "166 of 196",
      note="same: 166 (tests/methods/msn_test.py)",
    ),
    C("momentum of the teacher, start", ".996", "teacher.momentum", 0.996),
    C("its way to 1", "linear", "teacher.schedule", "linear"),
    C("prototypes of the teacher", "the student's", note="same: no average follows them"),
    *_crops((0.3, 1.0), (0.05, 0.3), 10, interpolation="bilinear"),
    *_colours((0.4, 0.4, 0.4, 0.1), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    _PILLOW_BLUR,
    _FLOAT32,
  ),
)

SWAV = Run(
  "swav_resnet50",
  "facebookresearch/swav at 04b8f43, scripts/swav_200ep_bs256_pretrain.sh",
  (
    *_RESNET,
    C("last norm of a block starts at 0", "no", "model.zero_init_residual", False),
    C("statistics of views of one size", "joint", "model.joint_norm", True),
    C("layers of the head", "2", "head.layers", 2),
    C("hidden width of the head", "2,048", "head.hidden", 2048),
    C("dimension D", "128", "head.bottleneck", 128),
    C("norm in the head", "batch norm", "head.norm", "batch"),
    C("activation of the head", "ReLU", "head.activation", "relu"),
    _UNIFORM,
    _BIASES,
    _UNIT,
    _running("once a resolution"),
    _LEARNED,
    C("prototypes K", "3,000", "method.num_prototypes", 3000),
    C(
      "prototypes of length 1",
      "scaled to it before each step",
      note="differs because a weight norm does it in the loss: the gradient along a row is none",
    ),
    C("epochs", "200", "num_epochs", 200.0),
    C("batch", "256 (4 x 64)", "batch_size", 256),
    C("optimizer", "SGD in apex's LARC", "optim.name", "lars"),
    C("its momentum", ".9", "optim.beta1", 0.9),
    C("trust coefficient", ".001", "optim.trust", 0.001),
    C("trust ratio clipped", "no", "optim.lars_clip", False),
    C("norms and biases decay and adapt", "yes", "optim.decay_all", True),
    *_constant_decay(1e-6, "1e-6"),
    C("learning rate", ".6", "optim.lr", 0.6),
    C("learning rate, end", ".0006", "optim.final_lr", 6e-4),
    C("warm-up", "0 epochs", "optim.warmup_epochs", 0.0),
    C("longest gradient", "any", "optim.clip", 0.0),
    C("prototypes stand still", "5,005 steps", "optim.freeze_prototypes_steps", 5005),
    C("temperature", ".1", "method.temperature", 0.1),
    C("epsilon of Sinkhorn", ".05", "method.epsilon", 0.05),
    C("its iterations", "3", "method.sinkhorn_steps", 3),
    C("length of the queue", "3,840", "method.queue_length", 3840),
    C("queue used from epoch", "15", "method.queue_start_epoch", 15.0),
    C(
      "queue filled from",
      "epoch 15",
      note="differs because ours fills from the first step and is full at epoch 15",
    ),
    *_crops((0.14, 1.0), (0.05, 0.14), 6, interpolation="bilinear"),
    *_colours((0.8, 0.8, 0.8, 0.2), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), std=(0.228, 0.224, 0.225)),
    C("blur", "a Gaussian of sigma .1 to 2", "augment.blur_sigma", (0.1, 2.0)),
    _FLOAT16,
  ),
)

SELF_CLASSIFIER = Run(
  "self_classifier_resnet50",
  "elad-amrani/self-classifier at e5e3fb9, the script of 100 epochs",
  (
    *_RESNET,
    C("last norm of a block starts at 0", "no", "model.zero_init_residual", False),
    C("statistics of views of one size", "joint", "model.joint_norm", True),
    C(
      "devices that share them",
      "22 of 66",
      note="differs because statistics are those of the global batch",
    ),
    _running("once a resolution"),
    C("layers of the head", "2", "head.layers", 2),
    C("hidden width of the head", "4,096", "head.hidden", 4096),
    C("dimension D", "128", "head.bottleneck", 128),
    C("norm in the head", "batch norm", "head.norm", "batch"),
    C("activation of the head", "leaky ReLU", "head.activation", "leaky_relu"),
    _NORMAL,
    _UNIT,
    C("classifiers", "learned", "method.prototypes", "learned"),
    C("classes", "1,000, 2,000, 4,000, 8,000", "method.num_prototypes", 1000),
    C("classes of the others", "", "method.more_classifiers", (2000, 4000, 8000)),
    C("classifiers' norms trained", "yes", "method.train_prototype_norm", True),
    C(
      "trust ratio of classifiers",
      "one each",
      note="differs because the four are one array here, with one norm",
    ),
    C("temperature over classes", ".1", "method.row_temp", 0.1),
    C("temperature over the batch", ".05", "method.column_temp", 0.05),
    C("epsilon of the logarithm", "1e-12", "method.eps", 1e-12),
    C(
      "queue of nearest neighbours",
      "262,144",
      note="differs because it is not built: a view is never replaced by its neighbour",
    ),
    C("epochs", "100", "num_epochs", 100.0),
    C("batch", "4,092 (66 x 62)", "batch_size", 4092, "4,096, which powers of two divide"),
    C("optimizer", "SGD in apex's LARC", "optim.name", "lars"),
    C("its momentum", ".9", "optim.beta1", 0.9),
    C("trust coefficient", ".001", "optim.trust", 0.001),
    C("trust ratio clipped", "no", "optim.lars_clip", False),
    C("norms and biases decay and adapt", "yes", "optim.decay_all", True),
    *_constant_decay(1e-6, "1e-6"),
    C("classifiers stand still", "never", "optim.freeze_prototypes_epochs", 0.0),
    C("learning rate per 256", "4.8 for the batch", "optim.lr", 0.3),
    C("learning rate at the start, per 256", ".3 for the batch", "optim.warmup_start", 0.01875),
    C("learning rate, end", ".0048", "optim.final_lr", 4.8e-3),
    C("warm-up", "10 epochs", "optim.warmup_epochs", 10.0),
    C("longest gradient", "any", "optim.clip", 0.0),
    *_crops((0.4, 1.0), (0.05, 0.4), 6),
    *_colours((0.4, 0.4, 0.2, 0.1), (0.1, 1.0, 0.5), (0.0, 0.2, 0.0)),
    _PILLOW_BLUR,
    _FLOAT32,
  ),
)

PCL = Run(
  "pcl_resnet50",
  "salesforce/PCL at af7287d, main_pcl.py --mlp --aug-plus --cos",
  (
    *_RESNET,
    C("last norm of a block starts at 0", "no", "model.zero_init_residual", False),
    C("layers of the head", "2", "head.layers", 2),
    C("hidden width of the head", "2,048", "head.hidden", 2048),
    C("dimension D", "128", "head.bottleneck", 128),
    C("norm in the head", "none", "head.norm", "none"),
    C("activation of the head", "ReLU", "head.activation", "relu"),
    _UNIFORM,
    _BIASES,
    _UNIT,
    C("clusters", "25,000, 50,000, 100,000", "method.num_prototypes", 100_000),
    C("clusters of the others", "", "method.coarse_clusters", (25_000, 50_000)),
    C("temperature", ".2", "method.temperature", 0.2),
    C("queue", "16,384", "method.queue_size", 16_384),
    C("epochs of InfoNCE alone", "20", "method.warmup_epochs", 20),
    C("iterations of k-means", "20", "method.kmeans_steps", 20),
    C("its starts", "5", "method.kmeans_restarts", 5),
    C(
      "images that k-means sees",
      "1,000 a centroid at most",
      note="same: all, since 25,000 centroids allow 25 million",
    ),
    C(
      "prototypes a query is compared with",
      "those of the device's batch and 16,384 drawn ones",
      note="differs because ours is compared with all: images of a cluster are no negatives",
    ),
    C("shuffled batch norm", "yes", note="differs because statistics are global"),
    C("epochs", "200", "num_epochs", 200.0),
    C("batch", "256", "batch_size", 256),
    C("optimizer", "SGD", "optim.name", "sgd"),
    C("its momentum", ".9", "optim.beta1", 0.9),
    *_constant_decay(1e-4, "1e-4"),
    C("norms and biases decay", "yes", "optim.decay_all", True),
    C("learning rate", ".03", "optim.lr", 0.03),
    C("learning rate, end", "0", "optim.final_lr", 0.0),
    C("warm-up", "none", "optim.warmup_epochs", 0.0),
    C(
      "steps of the cosine",
      "epochs",
      note="differs because schedules here move with every step",
    ),
    C("longest gradient", "any", "optim.clip", 0.0),
    C("momentum of the teacher", ".999", "teacher.momentum", 0.999),
    *_crops((0.2, 1.0), interpolation="bilinear"),
    *_colours((0.4, 0.4, 0.4, 0.1), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
    _PILLOW_BLUR,
    _FLOAT32,
  ),
)

_REDUNDANCY = (
  *_RESNET,
  C("last norm of a block starts at 0", "yes", "model.zero_init_residual", True),
  C("statistics of views", "one at a time", "model.joint_norm", False),
  C("layers of the head", "3", "head.layers", 3),
  C("hidden width of the head", "8,192", "head.hidden", 8192),
  C("dimension D", "8,192", "head.bottleneck", 8192),
  C("norm in the head", "batch norm", "head.norm", "batch"),
  C("activation of the head", "ReLU", "head.activation", "relu"),
  _UNIFORM,
  C("features normalised", "no", "head.l2", False),
  _running("once a view"),
  C("batch", "2,048", "batch_size", 2048),
  C("epochs", "1,000", "num_epochs", 1000.0),
  C("optimizer", "LARS", "optim.name", "lars"),
  C("its momentum", ".9", "optim.beta1", 0.9),
  C("trust coefficient", ".001", "optim.trust", 0.001),
  C("norms and biases decay and adapt", "no", "optim.decay_all", False),
  *_constant_decay(1e-6, "1e-6"),
  C("learning rate per 256", ".2", "optim.lr", 0.2),
  C("learning rate, end", "a thousandth", "optim.final_lr", 1.6e-3),
  C("warm-up", "10 epochs", "optim.warmup_epochs", 10.0),
  _LARS_DENOMINATOR,
  C("longest gradient", "any", "optim.clip", 0.0),
  *_crops((0.08, 1.0)),
  *_DINO_COLOURS,
  _PILLOW_BLUR,
  _FLOAT16,
)

BARLOW_TWINS = Run(
  "barlow_twins_resnet50",
  "facebookresearch/barlowtwins at 046eec3, defaults of main.py",
  (
    C("biases in the head", "no", "head.bias", False),
    C("weight of off-diagonal terms", ".0051", "method.off_diagonal_weight", 0.0051),
    C(
      "learning rate of norms and biases over that of weights",
      ".0048 / .2",
      "method.scale",
      0.024,
    ),
    C(
      "decay of weights over their gradient",
      "W times that of the true gradient, of W processes",
      note="differs because the scale of the loss makes it 42 times that",
    ),
    C(
      "gradient of norms and biases",
      "1 / W of the true one",
      note="differs because ours is the true one",
    ),
    *_REDUNDANCY,
  ),
)

VICREG = Run(
  "vicreg_resnet50",
  "facebookresearch/vicreg, main_vicreg.py at b42aa23, augmentations.py at cc1ef4f, README's run",
  (
    C(
      "biases in the head",
      "yes, but in the last layer",
      "head.bias",
      True,
      "none: they stand before a batch norm and would do nothing",
    ),
    C("weight of invariance", "25", "method.invariance_weight", 25.0),
    C("weight of variance", "25", "method.variance_weight", 25.0),
    C("weight of covariance", "1", "method.covariance_weight", 1.0),
    C("variance terms of the views", "averaged", "method.var_reduction", "mean"),
    *_REDUNDANCY,
  ),
)

CARP = Run(
  "carp_resnet50",
  "sthalles/carp at 8417b9b, defaults of main_carp.py and its README",
  (
    *_RESNET,
    C("last norm of a block starts at 0", "yes", "model.zero_init_residual", True),
    C("statistics of views of one size", "joint", "model.joint_norm", True),
    C("layers of the head", "3", "head.layers", 3),
    C("hidden width of the head", "2,048", "head.hidden", 2048),
    C("dimension D", "256", "head.bottleneck", 256),
    C("norm in the head", "batch norm", "head.norm", "batch"),
    C("activation of the head", "GELU", "head.activation", "gelu"),
    C("features normalised", "no", "head.l2", False),
    _NORMAL,
    _running("once a resolution"),
    _LEARNED,
    C("prototypes K", "65,536", "method.num_prototypes", 65_536),
    C("prototypes' norms trained", "no", "method.train_prototype_norm", False),
    C("prototypes a block", "512", "method.partition_size", 512),
    C("epochs of the best model", "400", "num_epochs", 400.0),
    C(
      "batch",
      "32 a device; gradients may be accumulated",
      "batch_size",
      None,
      "4,096, which is not in the code: as far as is remembered, the paper's",
    ),
    C(
      "images of statistics, blocks and entropy",
      "those of a microbatch, where gradients are accumulated",
      note="differs because they are those of the global batch",
    ),
    C("optimizer", "LARS", "optim.name", "lars"),
    C("its momentum", ".9", "optim.beta1", 0.9),
    C("trust coefficient", ".001", "optim.trust", 0.001),
    C("norms and biases decay and adapt", "no", "optim.decay_all", False),
    *_constant_decay(1e-6, "1e-6"),
    C("learning rate per 256", ".45", "optim.lr", 0.45),
    C("learning rate, end", ".0048", "optim.final_lr", 0.0048),
    C("warm-up", "0 epochs", "optim.warmup_epochs", 0.0),
    _LARS_DENOMINATOR,
    C("longest gradient", "any", "optim.clip", 0.0),
    C("prototypes stand still", "never", "optim.freeze_prototypes_epochs", 0.0),
    C("momentum of the teacher, start", ".99", "teacher.momentum", 0.99),
    C("its way to 1", "cosine", "teacher.schedule", "cosine"),
    C(
      "teacher moves",
      "before the optimizer's step",
      note="differs because every teacher here moves after it",
    ),
    *_crops((0.2, 1.0), (0.05, 0.2), 6),
    *_DINO_COLOURS,
    _PILLOW_BLUR,
    _FLOAT16,
  ),
)

_CIFAR = (
  C("views", "2 of 32 px", "augment.global_size", 32),
  C("their share of the image", "(0.08, 1)", "augment.global_scale", (0.08, 1.0)),
  C("filter of the crops", "bicubic", "augment.interpolation", "bicubic"),
  C("local views", "0", "augment.num_local", 0),
  C("flip", ".5", "augment.flip", 0.5),
  C("mean subtracted", "CIFAR-10's", "augment.mean", (0.4914, 0.4822, 0.4465)),
  *_colours((0.4, 0.4, 0.2, 0.1), (0.0, 0.0, 0.0), (0.0, 0.2, 0.0), std=(0.2470, 0.2435, 0.2616)),
  C("epochs", "1,000", "num_epochs", 1000.0),
  C("warm-up", "10 epochs", "optim.warmup_epochs", 10.0),
  C("learning rate, end", "0", "optim.final_lr", 0.0),
  C("backbone", "ResNet-18", "model.name", "resnet18"),
  C("its stem", "3 x 3, padding 2, no pool", "model.stem", "cifar_pad2"),
  C("last norm of a block starts at 0", "no", "model.zero_init_residual", False),
  C("longest gradient", "any", "optim.clip", 0.0),
  *_constant_decay(1e-4, "1e-4"),
  _UNIFORM,
  _BIASES,
  _running("once a view"),
  _FLOAT16,
)

FALCON = Run(
  "falcon_resnet18_cifar10",
  "emsansone/CPLearn at 6e0bd3b, its configuration for CIFAR-10",
  (
    C("codes c", "16,384", "method.num_prototypes", 16_384),
    C("dimension f", "2,048", "head.bottleneck", 2048),
    C("layers of the head", "1", "head.layers", 1),
    C("norm behind it", "batch norm", "head.norm_output", True),
    C("function behind it", "tanh", "method.assign", "tanh"),
    C("epsilon", "1e-8", "method.eps", 1e-8),
    C("beta", "1", "method.beta", 1.0),
    C("prior", "KL of the mean to the uniform", "method.prior", "reverse"),
    C("batch", "64", "batch_size", 64),
    C("optimizer", "Adam with L2", "optim.name", "adam"),
    C("learning rate per 256", ".001", "optim.lr", 1e-3),
    C("learning rate at the start, per 256", "3e-5 for the batch", "optim.warmup_start", 1.2e-4),
    C("its first beta", ".9", "optim.beta1", 0.9),
    C("its second beta", ".999", "optim.beta2", 0.999),
    C("norms and biases decay", "yes", note="same: under Adam everything does"),
    C("images in the inverse temperature", "64, a device's batch", "method.tau_batch", 64),
    C("codes", "random signs that never move", "method.prototypes", "dictionary"),
    *_CIFAR,
  ),
)

GEDI = Run(
  "gedi_resnet18_cifar10",
  "emsansone/CPLearn at 6e0bd3b, its configuration for CIFAR-10",
  (
    C("clusters c", "2,048", "method.num_prototypes", 2048),
    C("hidden width of the head", "2,048", "head.hidden", 2048),
    C(
      "last layer",
      "Linear(2048, 2048)",
      "head.bottleneck",
      None,
      "it goes through 512 dimensions, since prototypes are rows over an embedding, which are of "
      "length 1 here, without a bias",
    ),
    C("layers of the head before it", "1", "head.layers", 1, "2, the second to 512 dimensions"),
    C("norm in the head", "batch norm", "head.norm", "batch"),
    C("activation of the head", "ReLU", "head.activation", "relu"),
    _LEARNED,
    C("temperature", ".1", "method.temperature", 0.1),
    C("weight of uniformity", ".5 of a sum", "method.weight_uniformity", None, ".5 of a mean"),
    C("weight of invariance", ".05", "method.weight_invariance", 0.05),
    C(
      "uniformity",
      "sum over clusters, of the first view; invariance from the second to the first",
      "method.legacy",
      True,
      "the mean over clusters, 1 / 2,048 of that, and both terms in both directions; "
      "switch method.legacy=True",
    ),
    C("batch", "256", "batch_size", 256),
    C("optimizer", "LARS", "optim.name", "lars"),
    C("its momentum", ".9", "optim.beta1", 0.9),
    C("trust coefficient", ".001", "optim.trust", 0.001),
    C("trust ratio clipped", "no", "optim.lars_clip", False),
    C("norms and biases decay and adapt", "yes", "optim.decay_all", True),
    C("learning rate per 256", ".3", "optim.lr", 0.3),
    C("learning rate at the start, per 256", "3e-5", "optim.warmup_start", 3e-5),
    *_CIFAR,
  ),
)

GMM = Run(
  "gmm_vit_s:paper",
  "arXiv 2510.20108 as far as abstracts, figures, reviews and notes of it say; its body and code "
  "were not read, so most of these are choices",
  (
    C("model", "means, weights, diagonal covariances", "mixture.covariance", "diagonal"),
    C("features", "the teacher's, both global views", note="same: of the global batch"),
    C("order", "the mixture moves before the loss", "method.em_order", "before_loss"),
    C("prototypes in the loss", "the new ones, without gradient", note="same"),
    C("means on the sphere", "yes, as figures draw them", note="same: after every step"),
    C("forgetting", "by responsibility", note="same"),
    C("form of the forgetting", "not read", "mixture.mass", None, "Celaya and Agostini's"),
    C("EM steps a batch", "not read", note="differs because it is a choice: 1"),
    C(
      "eta",
      "not read",
      "mixture.window",
      None,
      "a window of 1,000 rows, eta = .999: our choice",
    ),
    C(
      "weights in the posterior",
      "yes",
      note="same, but with this forgetting they stay uniform and do nothing",
    ),
    C(
      "beta",
      "rises; how far was not read",
      "mixture.beta",
      None,
      ".1 to 1 over the first half of the run: our choice",
    ),
    C(
      "variances, start and floor",
      "not read",
      "mixture.variance_floor",
      None,
      "1 / D, and max(1e-4, .05 / D): our choice",
    ),
    C("means, start", "not read", note="differs because it is a choice: random directions"),
    C("balanced responsibilities", "not mentioned", "mixture.balanced", None, "off"),
    C("centred features", "not mentioned", "mixture.center_features", None, "off"),
    C("prototypes K, of CARP", "65,536", "method.num_prototypes", 65_536),
    C("dimension D, of CARP", "256", "head.bottleneck", 256),
    C("targets of DINO", "not read", "method.targets", None, "centred, as without a mixture"),
    C(
      "loss and encoder",
      "CARP, k-NN 67.7 to 69.5 (ResNet-50, to judge by the number); DINO in the second version",
      note="differs because this is DINO's recipe for ViT-S; carp_resnet50:gmm is the other pair",
    ),
  ),
)

RUNS = (DINO, IBOT, MSN, SWAV, SELF_CLASSIFIER, PCL, BARLOW_TWINS, VICREG, CARP, FALCON, GEDI, GMM)


def same(constant: Constant, settings: dict[str, Any]) -> bool:
  """Whether ours is the published one; `settings` is a recipe, flat."""
  if constant.key:
    return constant.value is not None and settings[constant.key] == constant.value
  return constant.note.startswith("same")


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else f"{value}".replace("|", "/")


def _row(constant: Constant, settings: dict[str, Any]) -> str:
  ours, verdict = "", constant.note
  if constant.key:
    ours = f"`{constant.key}` = {_text(settings[constant.key])}"
    if same(constant, settings):
      verdict = "same"
    elif not verdict.startswith("differs"):
      verdict = f"differs: {verdict}"
  return f"| {constant.name} | {constant.published or 'as above'} | {ours or '–'} | {verdict} |"


def page() -> str:
  """docs/fidelity.md."""
  parts = [
    "# Ours and the published runs",
    "",
    "Every constant of the published runs beside what our recipe has. Written by",
    "`python docs/fidelity.py` from a list that a test holds against the recipes. That losses and",
    "gradients are those of the published code is tested with golden values and NumPy in float64",
    "(`tests/methods`).",
  ]
  for run in RUNS:
    settings = trees.flat(recipes.load(run.recipe))
    equal = sum(same(constant, settings) for constant in run.constants)
    parts += [
      "",
      f"## {run.recipe}",
      "",
      f"Source: {run.source}. {equal} of {len(run.constants)} are the same.",
      "",
      "| constant | published | ours | |",
      "|---|---|---|---|",
      *(_row(constant, settings) for constant in run.constants),
    ]
  return "\n".join(parts) + "\n"


if __name__ == "__main__":
  PAGE.write_text(page())
