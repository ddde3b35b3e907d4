"""The networks that other libraries publish weights for, in PyTorch under their key names.

Written from the papers and key lists; the tests compare ours with them.
"""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

  def forward(self, x):
    n, tokens, width = x.shape
    qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
    return self.proj((weights @ value).transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

  def forward(self, x):
    return self.fc2(functional.gelu(self.fc1(x)))


class Scale(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.gamma = nn.Parameter(torch.ones(width))

  def forward(self, x):
    return self.gamma * x


class Block(nn.Module):
  def __init__(self, width, heads, scaled):
    super().__init__()
    self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
    self.attn, self.mlp = Attention(width, heads), Mlp(width)
    if scaled:
      self.ls1, self.ls2 = Scale(width), Scale(width)
    self.scaled = scaled

  def forward(self, x):
    y = self.attn(self.norm1(x))
    x = x + (self.ls1(y) if self.scaled else y)
    y = self.mlp(self.norm2(x))
    return x + (self.ls2(y) if self.scaled else y)


class ViT(nn.Module):
  """DINO's transformer (arXiv 2104.14294), with what DINOv2 added to it.

  `registers` go between class token and patches; with `no_embed_class`, as in timm, the class token
  has no position. At another size than its own DINO interpolates positions by the factor
  (n + .1) / N, models with registers with antialiasing.
  """

  def __init__(
    self, width, depth, heads, patch, side, registers=0, scaled=False, no_embed_class=False
  ):
    super().__init__()
    self.patch, self.side, self.registers = patch, side, registers
    self.no_embed_class = no_embed_class
    self.patch_embed = nn.Module()
    self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, side * side + (not no_embed_class), width))
    if registers:
      name = "reg_token" if no_embed_class else "register_tokens"
      self.register_parameter(name, nn.Parameter(torch.zeros(1, registers, width)))
    self.blocks = nn.ModuleList(Block(width, heads, scaled) for _ in range(depth))
    self.norm = nn.LayerNorm(width, eps=1e-6)

  def positions(self, height, width):
    start = int(not self.no_embed_class)
    rows, columns = height // self.patch, width // self.patch
    if (rows, columns) == (self.side, self.side):
      return self.pos_embed
    grid = self.pos_embed[:, start:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
    if self.registers:
      grid = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
    else:
      factor = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
      grid = functional.interpolate(grid, scale_factor=factor, mode="bicubic")
    grid = grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
    return torch.cat([self.pos_embed[:, :start], grid], dim=1)

  def forward(self, images):
    x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
    token = self.cls_token.expand(len(x), -1, -1)
    positions = self.positions(*images.shape[2:])
    if self.no_embed_class:
      x = torch.cat([token, x + positions], dim=1)
    else:
      x = torch.cat([token, x], dim=1) + positions
    if self.registers:
      registers = self.reg_token if self.no_embed_class else self.register_tokens
      x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for block in self.blocks:
      x = block(x)
    return self.norm(x)[:, 0]


class Head(nn.Module):
  """DINO's head without its last layer, which holds the prototypes."""

  def __init__(self, width, hidden, bottleneck, norm=False):
    super().__init__()
    layers = []
    for rows, columns in ((hidden, width), (hidden, hidden)):
      layers += [nn.Linear(columns, rows), *([nn.BatchNorm1d(rows)] if norm else []), nn.GELU()]
    self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))

  def forward(self, x):
    return functional.normalize(self.mlp(x), dim=-1)


class SwavHead(nn.Module):
  """SwAV's (arXiv 2006.09882)."""

  def __init__(self, width, hidden, bottleneck):
    super().__init__()
    self.projection_head = nn.Sequential(
      nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, bottleneck)
    )

  def forward(self, x):
    return functional.normalize(self.projection_head(x), dim=-1)


class ResNetBlock(nn.Module):
  """Basic or bottleneck, the stride on the 3 x 3."""

  def __init__(self, entering, inner, stride, bottleneck):
    super().__init__()
    shapes = ((inner, 1), (inner, 3), (4 * inner, 1)) if bottleneck else ((inner, 3), (inner, 3))
    first, width = (1 if bottleneck else 0), entering
    self.number = len(shapes)
    for i, (rows, side) in enumerate(shapes):
      conv = nn.Conv2d(width, rows, side, stride if i == first else 1, side // 2, bias=False)
      self.add_module(f"conv{i + 1}", conv)
      self.add_module(f"bn{i + 1}", nn.BatchNorm2d(rows))
      width = rows
    self.downsample = None
    if stride != 1 or width != entering:
      conv = nn.Conv2d(entering, width, 1, stride, bias=False)
      self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

  def forward(self, x):
    y = x
    for i in range(1, self.number + 1):
      y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
      y = y.relu() if i < self.number else y
    return (y + (self.downsample(x) if self.downsample else x)).relu()


class ResNet(nn.Module):
  """ResNet-18 or -50 (arXiv 1512.03385); `padding` of a 3 x 3 stem without pool, None: 7 x 7."""

  def __init__(self, bottleneck=False, padding=None):
    super().__init__()
    self.pool = padding is None
    side, stride, pad = (7, 2, 3) if padding is None else (3, 1, padding)
    self.conv1, self.bn1 = nn.Conv2d(3, 64, side, stride, pad, bias=False), nn.BatchNorm2d(64)
    entering = 64
    for stage, number in enumerate((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2), start=1):
      blocks = []
      for i in range(number):
        inner = 64 * 2 ** (stage - 1)
        stride = 2 if stage > 1 and i == 0 else 1
        blocks.append(ResNetBlock(entering, inner, stride, bottleneck))
        entering = inner * (4 if bottleneck else 1)
      self.add_module(f"layer{stage}", nn.Sequential(*blocks))

  def forward(self, images):
    x = self.bn1(self.conv1(images)).relu()
    if self.pool:
      x = functional.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
      x = getattr(self, f"layer{stage}")(x)
    return x.mean(dim=(2, 3))
