"""What tensors are called here and elsewhere, as data.

"Plain" names are those of timm, which DINO, iBOT and DINOv2 (arXiv 2104.14294, 2111.07832,
2304.07193) use for transformers and torchvision for ResNets. Hugging Face has its own.
"""

import re
from collections.abc import Mapping

import numpy as np

# (regular expression, replacement) from our names below "backbone" to plain ones, all applied.
_VIT = (
  (r"^patch_embed\.", r"patch_embed.proj."),
  (r"^blocks_(\d+)\.", r"blocks.\1."),
  (r"\.(ls[12])$", r".\1.gamma"),
  (r"^registers$", "register_tokens"),
  (r"\.(kernel|scale)$", ".weight"),
)
_RESNET = (
  (r"^stage(\d)_(\d+)\.", r"layer\1.\2."),
  (r"\bconv_shortcut\.", "downsample.0."),
  (r"\bnorm_shortcut\.", "downsample.1."),
  (r"\bnorm(\d)\.", r"bn\1."),
  (r"\.(mean|var)$", r".running_\1"),
  (r"\.(kernel|scale)$", ".weight"),
)
# (plain, ViT of Hugging Face, DINOv2 of Hugging Face); a block's begin with blocks.N., there with
# encoder.layer.N.
_HF_BLOCK = (
  ("norm1", "layernorm_before", "norm1"),
  ("attn.q", "attention.attention.query", "attention.attention.query"),
  ("attn.k", "attention.attention.key", "attention.attention.key"),
  ("attn.v", "attention.attention.value", "attention.attention.value"),
  ("attn.proj", "attention.output.dense", "attention.output.dense"),
  ("ls1", None, "layer_scale1"),
  ("norm2", "layernorm_after", "norm2"),
  ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
  ("mlp.fc2", "output.dense", "mlp.fc2"),
  ("ls2", None, "layer_scale2"),
)
# What transformers 5 calls them in memory; its files keep the names above.
_HF_BLOCK_V5 = {
  "attention.q_proj": "attn.q",
  "attention.k_proj": "attn.k",
  "attention.v_proj": "attn.v",
  "attention.o_proj": "attn.proj",
}
_HF_REST = {
  "cls_token": "embeddings.cls_token",
  "pos_embed": "embeddings.position_embeddings",
  "register_tokens": "embeddings.register_tokens",
  "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
  "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
  "norm.weight": "layernorm.weight",
  "norm.bias": "layernorm.bias",
}
_HF_COLUMN = {"vit": 1, "dinov2": 2}


def plain(ours: str, kind: str) -> str:
  """The plain name of a tensor of the backbone.

  Args:
    ours: below "params.backbone" or "batch_stats.backbone": "blocks_0.attn.qkv.kernel".
    kind: "vit" or "resnet".
  """
  for pattern, replacement in _VIT if kind == "vit" else _RESNET:
    ours = re.sub(pattern, replacement, ours)
  return ours


def turn(name: str, tensor: np.ndarray, *, back: bool = False) -> np.ndarray:
  """A kernel from PyTorch's order of axes to ours, (out, in, h, w) -> (h, w, in, out), or `back`.

  Args:
    name: ours; what is no kernel stays as it is.
    tensor: [out, in] of a linear layer, [out, in, h, w] of a convolution, or anything else.
  """
  if not name.endswith("kernel"):
    return tensor
  if tensor.ndim == 2:
    return tensor.T
  return tensor.transpose((3, 2, 0, 1) if back else (2, 3, 1, 0))


def from_hugging_face(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Hugging Face's names below "vit." or "dinov2." to plain ones, queries, keys, values as one.

  A name that is none of theirs stays as it is.
  """
  block = {row[c]: row[0] for row in _HF_BLOCK for c in _HF_COLUMN.values() if row[c]}
  block |= _HF_BLOCK_V5
  rest = {theirs: ours for ours, theirs in _HF_REST.items()}
  out = {}
  for name, tensor in tensors.items():
    found = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias|lambda1)", name)
    if found and found[2] in block:
      leaf = found[3].replace("lambda1", "gamma")
      out[f"blocks.{found[1]}.{block[found[2]]}.{leaf}"] = tensor
    else:
      out[rest.get(name, name)] = tensor
  for name in [name for name in out if ".attn.q." in name]:
    parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
    if all(part in out for part in parts):
      out[name.replace(".q.", ".qkv.")] = np.concatenate([out.pop(part) for part in parts])
  return out


def to_hugging_face(tensors: Mapping[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
  """Plain names to those in a file of Hugging Face's "vit" or "dinov2"."""
  block = {row[0]: row[_HF_COLUMN[model_type]] for row in _HF_BLOCK}
  out = {}
  for name, tensor in tensors.items():
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)", name)
    if not found:
      out[_HF_REST[name]] = tensor
      continue
    start, leaf = f"encoder.layer.{found[1]}.", found[3].replace("gamma", "lambda1")
    if found[2] == "attn.qkv":
      for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
        out[f"{start}{block[f'attn.{part}']}.{leaf}"] = rows
    else:
      out[f"{start}{block[found[2]]}.{leaf}"] = tensor
  return out


def in_hugging_face(plain: str, model_type: str) -> str:
  """What a file of Hugging Face's calls a tensor; three names of queries, keys and values in one.

  A name that is none of its kind stays as it is.
  """
  try:
    return ", ".join(to_hugging_face({plain: np.zeros(3)}, model_type))
  except KeyError:
    return plain


def from_variants(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Dialects of the plain names of transformers to one: DINOv2's chunks, timm's registers.

  Chunks name a block twice, blocks.CHUNK.BLOCK. timm adds the class token's position to the token
  itself where there are registers; zeros take its place.
  """
  out = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in tensors.items()}
  if "reg_token" in out:
    out["register_tokens"] = out.pop("reg_token")
  if "pos_embed" in out and out["pos_embed"].ndim == 3:
    position = out["pos_embed"]
    if round(position.shape[1] ** 0.5) ** 2 == position.shape[1]:
      out["pos_embed"] = np.concatenate([np.zeros_like(position[:, :1]), position], axis=1)
  return out
