"""DINO's and Barlow Twins' training steps of our configs in PyTorch, to time ours against.

What a strong user writes for one GPU: `scaled_dot_product_attention`, bfloat16 autocast around the
encoder, fused AdamW, `torch._foreach` for clipping and teacher average, `torch.compile` of forwards
and backward as one graph. A step gets views that are ready; augmentation is not part of it.

What differs from ours, knowingly: layer norms leave autocast in float32 and ours in bfloat16;
frozen prototypes get no Adam step, where ours computes one and drops it; the float32 products of
the loss may use TF32, where ours do not, see `build`.
"""

import dataclasses
import math
from typing import Any

import jax
import ml_collections
import numpy as np
import torch
from torch import nn
from torch.nn import attention, functional
from torch.utils import flop_counter

from protojax import trees
from protojax.models import encoder as encoders
from protojax.models import vit
from protojax.training import optim

_ACTIVATIONS = {
  "gelu": functional.gelu,
  "relu": functional.relu,
  "leaky_relu": functional.leaky_relu,
}
_ANY = {
  "model.registers": 0,
  "model.layer_scale": None,
  "model.joint_norm": False,
  "model.remat": False,
  "accum_steps": 1,
  "optim.name": "adamw",
}
_OF_METHOD = {
  "dino": {
    "method.prototypes": "learned",
    "method.targets": "center",
    "method.koleo": 0.0,
    "method.koleo_proto": 0.0,
    "method.vmf": False,
    "method.train_prototype_norm": False,
  },
  "barlow_twins": {"method.prototypes": "none", "augment.num_local": 0, "head.l2": False},
}
# Leaves of Flax under their names in PyTorch.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _linear(entering: int, leaving: int, bias: bool = True, init: str = "normal") -> nn.Linear:
  layer = nn.Linear(entering, leaving, bias=bias)
  if init == "normal":  # "uniform" is PyTorch's own
    nn.init.normal_(layer.weight, std=0.02)
  if bias:
    nn.init.zeros_(layer.bias)
  return layer


class Attention(nn.Module):
  """Self-attention, float [N, T, D] -> [N, T, D]."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv, self.proj = _linear(width, 3 * width), _linear(width, width)

  def forward(self, x):
    n, tokens, width = x.shape
    qkv = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    x = functional.scaled_dot_product_attention(query, key, value)
    return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
  """Two linear layers around an exact GELU, float [N, T, D] -> [N, T, D]."""

  def __init__(self, width):
    super().__init__()
    self.fc1, self.fc2 = _linear(width, 4 * width), _linear(4 * width, width)

  def forward(self, x):
    return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
  """Pre-norm block with drop path; the residual stream [N, T, D] is float32."""

  def __init__(self, width, heads, eps, drop_path):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
    self.attn, self.mlp = Attention(width, heads), Mlp(width)
    self.drop_path = drop_path

  def forward(self, x):
    x = x + self._dropped(self.attn(self.norm1(x)))
    return x + self._dropped(self.mlp(self.norm2(x)))

  def _dropped(self, y):
    if not self.drop_path:
      return y
    keep = 1.0 - self.drop_path
    return y * y.new_empty(len(y), 1, 1).bernoulli_(keep).div_(keep)


class Backbone(nn.Module):
  """The transformer that `ours`, a `vit.ViT`, describes; `sizes` are the images' it will see."""

  def __init__(self, ours: vit.ViT, sizes, drop_path):
    super().__init__()
    self.patch, self.depth, width = ours.patch_size, ours.depth, ours.width
    side = ours.image_size // self.patch
    self.patch_embed = nn.Linear(3 * self.patch**2, width)
    self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
    self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, width))
    for i, rate in enumerate(np.linspace(0.0, drop_path, self.depth)):
      block = Block(width, ours.num_heads, ours.norm_eps, float(rate))
      self.add_module(f"blocks_{i}", block)
    self.norm = nn.LayerNorm(width, ours.norm_eps)
    for size in sizes:
      if size != ours.image_size:
        axis = vit.position_weights(size // self.patch, side)
        both = torch.tensor(np.kron(axis, axis).astype(np.float32))
        self.register_buffer(f"resample_{size}", both, persistent=False)

  def positions(self, size):
    """[1, 1 + T, D] float32; outside autocast."""
    both = getattr(self, f"resample_{size}", None)
    if both is None:
      return self.pos_embed
    return torch.cat([self.pos_embed[:, :1], both @ self.pos_embed[:, 1:]], dim=1)

  def forward(self, images, positions):
    """[N, S, S, 3], [1, 1 + T, D] -> [N, D] float32."""
    n, size, p = len(images), images.shape[1], self.patch
    # One matrix product over channels-last patches: the images are copied once, in its dtype.
    patches = images.view(n, size // p, p, size // p, p, 3).transpose(2, 3)
    x = self.patch_embed(patches.reshape(n, -1, 3 * p * p))
    x = torch.cat([self.cls_token.expand(n, -1, -1), x], dim=1) + positions
    for i in range(self.depth):
      x = getattr(self, f"blocks_{i}")(x)
    return self.norm(x[:, 0])


class BatchNorm(nn.Module):
  """Batch statistics view by view: [B V, C] is normalised as [B, V C], which copies nothing."""

  def __init__(self, width, views):
    super().__init__()
    self.views = views
    self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
    # A row for each view; ours is their mean.
    self.register_buffer("running_mean", torch.zeros(views * width))
    self.register_buffer("running_var", torch.ones(views * width))

  def forward(self, x):
    y = functional.batch_norm(
      x.view(-1, self.running_mean.numel()),
      self.running_mean,
      self.running_var,
      self.weight.repeat(self.views),
      self.bias.repeat(self.views),
      training=True,
    )
    return y.view_as(x)


class Head(nn.Module):
  """The projector that `ours`, a `heads.Projector`, describes: [B V, F] -> [B V, D] float32."""

  def __init__(self, ours, width, views):
    super().__init__()
    self.layers, self.l2 = ours.layers, ours.l2
    self.activation = _ACTIVATIONS[ours.activation]
    widths = [width] + [ours.hidden] * (ours.layers - 1) + [ours.bottleneck]
    for i in range(1, ours.layers + 1):
      self.add_module(f"fc{i}", _linear(widths[i - 1], widths[i], ours.bias, ours.kernel_init))
      if ours.norm_output if i == ours.layers else ours.norm == "batch":
        self.add_module(f"norm{i}", BatchNorm(widths[i], views))

  def forward(self, x):
    for i in range(1, self.layers + 1):
      x = getattr(self, f"fc{i}")(x)
      last = i == self.layers
      x = x.float() if last else x
      if hasattr(self, f"norm{i}"):
        x = getattr(self, f"norm{i}")(x)
      x = x if last else self.activation(x)
    return functional.normalize(x, dim=-1) if self.l2 else x


class Network(nn.Module):
  """Backbone, head and, for DINO, prototypes `v` [K, D]; `views` are those it embeds together."""

  def __init__(self, config, views: int, drop_path: float, device: torch.device):
    super().__init__()
    plain = config.copy_and_resolve_references()
    plain.model.attention = "xla"  # asks for no GPU of JAX's; who computes it here is PyTorch
    ours, look = encoders.build(plain), config.augment
    self.bfloat16 = config.precision == "bfloat16"
    self.kind = "cuda" if device.type == "cuda" else "cpu"
    self.backbone = Backbone(ours.backbone, {look.global_size, look.local_size}, drop_path)
    self.head = Head(ours.head, ours.backbone.width, views)
    if config.method.prototypes == "learned":
      num, dim = config.method.num_prototypes, ours.head.bottleneck
      self.v = nn.Parameter((2.0 * torch.rand(num, dim) - 1.0) / math.sqrt(dim))

  def forward(self, *views):
    """float32 [B, V_i, S_i, S_i, 3] each -> [B, V, D] float32."""
    positions = [self.backbone.positions(images.shape[2]) for images in views]
    with torch.autocast(self.kind, torch.bfloat16, enabled=self.bfloat16):
      features = []
      for images, where in zip(views, positions, strict=True):
        rows = images.flatten(0, 1)
        rows = rows.bfloat16() if self.bfloat16 else rows
        features.append(self.backbone(rows, where).view(*images.shape[:2], -1))
      x = torch.cat(features, dim=1)
      return self.head(x.flatten(0, 1)).view(*x.shape[:2], -1)

  def scores(self, z):
    """[B, V, D] -> [B, V, K] float32, over prototypes of length one."""
    return functional.linear(z, functional.normalize(self.v, dim=-1))


@dataclasses.dataclass
class Peer:
  """What a step of a method changes.

  Attributes:
    config: resolved, ours.
    student: trained.
    teacher: its moving average, without drop path; None for Barlow Twins.
    center: float32 [K], likewise None.
    optimizer: AdamW over the student.
    step: updates so far, position in the schedules.
  """

  config: ml_collections.ConfigDict
  student: Network
  teacher: Network | None
  center: torch.Tensor | None
  optimizer: torch.optim.Optimizer
  step: int = 0


def _check(config) -> None:
  name, flat = config.method.name, trees.flat(config)
  if name not in _OF_METHOD or config.model.name not in vit.VARIANTS:
    raise ValueError(
      f"method.name={name!r} with model.name={config.model.name!r} has no peer in PyTorch: there "
      "are dino and barlow_twins with a ViT"
    )
  needed = _ANY | _OF_METHOD[name]
  # None, 0 and False all say "without".
  wrong = [f"{k}={flat[k]!r}" for k, v in needed.items() if (flat[k] or None) != (v or None)]
  if wrong:
    wanted = ", ".join(f"{key}={value!r}" for key, value in needed.items())
    raise ValueError(f"the peer of {name} does not cover {', '.join(wrong)}; it needs {wanted}")


def build(config: ml_collections.ConfigDict, device="cpu", *, tf32: bool = True) -> Peer:
  """The peer of a config, with weights of its own; `load` gives it ours.

  Args:
    config: resolved, see `resolving.resolve`; DINO with learned prototypes and centred targets or
      Barlow Twins, with a ViT. `precision` "bfloat16" is autocast around backbone and head; scores,
      softmax and loss stay float32.
    device: "cuda", "cpu" or "meta".
    tf32: on CUDA, whether float32 matrix products (scores and loss; all with `precision`
      "float32") may use TF32, which is faster than our "highest". Holds for the whole process.

  Raises:
    ValueError: one line, for a config that has no peer.
  """
  _check(config)
  device, options = torch.device(device), config.optim
  if device.type == "cuda":
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
  teacher = center = None
  with torch.device(device):
    student = Network(config, 2 + config.augment.num_local, config.model.drop_path, device)
    if config.method.name == "dino":
      teacher = Network(config, 2, 0.0, device).requires_grad_(False)
      for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.data.copy_(new.data)
      center = torch.zeros(config.method.num_prototypes)
  groups = {True: [], False: []}
  for name, parameter in student.named_parameters():
    leaf = name.rpartition(".")[2]
    groups[optim.decay_mask({leaf: parameter}, options)[leaf]].append(parameter)
  optimizer = torch.optim.AdamW(
    [{"params": params, "decays": decays} for decays, params in groups.items() if params],
    lr=0.0,
    betas=(options.beta1, options.beta2),
    eps=1e-8,
    fused=device.type == "cuda",
  )
  return Peer(config, student, teacher, center, optimizer)


def arrays(params: Any, views: int = 1) -> dict[str, np.ndarray]:
  """Our parameters or batch statistics under the names and in the shapes of a `Network`.

  Args:
    params: pytree {"backbone": ..., "head": ...}, {"v": ...} or the like.
    views: rows that a running statistic gets, see `BatchNorm`.
  """
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    *modules, name = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    x = np.asarray(leaf, np.float32)
    if name == "kernel":
      x = x.reshape(-1, x.shape[-1]).T
    if name in ("mean", "var"):
      x = np.tile(x, views)
    out[".".join([*modules, _LEAVES.get(name, name)])] = x
  return out


def load(peer: Peer, state) -> None:
  """Copies parameters, prototypes, teacher, batch statistics, centre and step of our state.

  Adam's moments are not copied: begin with a fresh peer from a state 0, or with others' moments.

  Args:
    peer: from `build` of the config that `state` belongs to.
    state: `train_step.TrainState`.

  Raises:
    RuntimeError: tensors are missing, left over or of other shapes; from PyTorch.
  """

  def fill(network, parts, batch_stats, views):
    named = arrays(parts["encoder"]) | arrays(batch_stats, views) | arrays(parts["prototypes"])
    network.load_state_dict({k: torch.tensor(v) for k, v in named.items()})

  batch_stats = state.carry["batch_stats"]
  student = {"encoder": state.encoder, "prototypes": state.prototypes}
  fill(peer.student, student, batch_stats["student"], 2 + peer.config.augment.num_local)
  if peer.teacher is not None:
    fill(peer.teacher, state.teacher, batch_stats["teacher"], 2)
    peer.center.copy_(torch.tensor(np.asarray(state.carry["center"])))
  peer.step = int(state.step)


def rates(config, step: int) -> dict[str, float]:
  """{"lr", "decay", "pace", "temperature"} of a step: our schedules without JAX, so no backend.

  "pace" is what the teacher takes over of the student, "temperature" the teacher's.
  """

  def cosine(start, end, step, count):
    left = max(count, 1) - min(step, max(count, 1) - 1)
    return end + (start - end) * math.sin(0.5 * math.pi * left / max(count, 1)) ** 2

  o, steps = config.optim, config.num_steps
  peak, warmup = o.lr * config.batch_size / 256, o.warmup_steps
  out = {
    "lr": peak * step / max(warmup - 1, 1)
    if step < warmup
    else cosine(peak, o.final_lr, step - warmup, steps - warmup),
    "decay": cosine(o.weight_decay, o.final_weight_decay, step, steps),
    "pace": cosine(1.0 - config.teacher.momentum, 0.0, step, steps),
    "temperature": 1.0,
  }
  if config.method.name == "dino":
    m, epoch = config.method, step // config.steps_per_epoch
    share = min(epoch / max(m.teacher_temp_warmup_epochs - 1, 1), 1.0)
    warm = epoch >= m.teacher_temp_warmup_epochs
    start, end = m.teacher_temp_start, m.teacher_temp
    out["temperature"] = end if warm else start + (end - start) * share
  return out


def _objective(peer: Peer):
  """(views, teacher's temperature) -> (loss, mean teacher scores [K] or None), for compiling."""
  student, teacher, center, options = peer.student, peer.teacher, peer.center, peer.config.method
  if teacher is None:
    scale, off_weight = float(options.scale), float(options.off_diagonal_weight)

    def barlow_twins(views, temperature):
      del temperature
      z = student(views["global"])
      z = z - z.mean(dim=0)
      z = z * (z.square().mean(dim=0) + 1e-5).rsqrt()
      correlation = z[:, 0].T @ z[:, 1] / len(z)
      diagonal = correlation.diagonal()
      off = correlation.square().sum() - diagonal.square().sum()
      return scale * ((1.0 - diagonal).square().sum() + off_weight * off), None

    return barlow_twins

  student_temp = float(options.student_temp)

  def dino(views, temperature):
    with torch.no_grad():
      scores = teacher.scores(teacher(views["global"]))
      mean = scores.mean(dim=(0, 1))
      targets = ((scores - center) / temperature).softmax(dim=-1)
    every = [views[name] for name in ("global", "local") if name in views]
    # Dividing the short vectors saves a pass over the scores.
    log_p = student.scores(student(*every) / student_temp).log_softmax(dim=-1)
    pair = -(log_p @ targets.mT).mean(dim=0)  # [V, 2]
    other = 1.0 - torch.eye(*pair.shape, device=pair.device)
    return (pair * other).sum() / other.sum(), mean

  return dino


def loss(peer: Peer, views: dict[str, torch.Tensor]) -> torch.Tensor:
  """The loss at the peer's parameters and step, [] float32 with a gradient.

  Args:
    peer: from `build`.
    views: {"global": [B, 2, S, S, 3], "local": [B, L, s, s, 3] if the config has any}, float32,
      contiguous, on the peer's device.
  """
  return _objective(peer)(views, rates(peer.config, peer.step)["temperature"])[0]


def _clip(grads: list[torch.Tensor], limit: float, mode: str) -> None:
  """As `optim.build`: min(1, limit / (norm + 1e-6)), of each tensor or of all."""
  norms = torch._foreach_norm(grads)
  if mode == "global":
    norms = [torch.linalg.vector_norm(torch.stack(norms))] * len(grads)
  factors = torch._foreach_reciprocal(torch._foreach_add(norms, 1e-6))
  torch._foreach_mul_(factors, limit)
  torch._foreach_clamp_max_(factors, 1.0)
  torch._foreach_mul_(grads, factors)


def make_step(peer: Peer, *, compiled: bool, backend: str = "inductor"):
  """One training step as a function that moves the peer.

  Both forwards, backward, clip, AdamW, teacher average and centre; the order of ours.

  Args:
    peer: from `build`.
    compiled: compile both forwards, loss and backward as one graph; costs minutes at the first
      call.
    backend: of `torch.compile`; "aot_eager" traces the same graph and generates no code.

  Returns:
    (views of `loss`) -> the loss before the step, [] float32, not waited for.
  """
  config, options = peer.config, peer.config.optim
  objective = _objective(peer)
  if compiled:
    objective = torch.compile(objective, dynamic=False, fullgraph=True, backend=backend)
  trained = list(peer.student.parameters())
  averaged = [] if peer.teacher is None else list(peer.teacher.parameters())

  def step(views):
    now = rates(config, peer.step)
    # On the device, so that a new value compiles nothing anew and waits for nothing.
    temperature = torch.full((), now["temperature"], device=views["global"].device)
    value, mean = objective(views, temperature)
    value.backward()
    with torch.no_grad():
      if options.clip:
        _clip([p.grad for p in trained], options.clip, options.clip_mode)
      if averaged and peer.step < options.freeze_prototypes_steps:
        peer.student.v.grad = None
      for group in peer.optimizer.param_groups:
        group.update(lr=now["lr"], weight_decay=now["decay"] if group["decays"] else 0.0)
      peer.optimizer.step()
      peer.optimizer.zero_grad(set_to_none=True)
      if averaged:
        torch._foreach_lerp_(averaged, trained, now["pace"])
        peer.center.lerp_(mean, 1.0 - config.method.center_momentum)
    peer.step += 1
    return value.detach()

  return step


def parameter_count(peer: Peer) -> int:
  """Trained numbers: the student's encoder and its prototypes."""
  return sum(p.numel() for p in peer.student.parameters())


def flops(peer: Peer, views: dict[str, torch.Tensor]) -> int:
  """Floating point operations of a step's matrix products, 2 a multiply-add; runs nothing.

  Student forward and backward, teacher forward. Attention counts as its two products and the four
  of their gradients, without what a fused kernel computes again.

  Args:
    peer: from `build`; left alone.
    views: as of `loss`; only the shapes matter.
  """
  twin = build(peer.config, "meta")
  views = {name: torch.empty_like(x, device="meta") for name, x in views.items()}
  counter = flop_counter.FlopCounterMode(display=False)
  with counter, attention.sdpa_kernel(attention.SDPBackend.MATH):
    _objective(twin)(views, 1.0)[0].backward()
  return counter.get_total_flops()
