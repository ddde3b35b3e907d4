"""What chips can do at most, as their makers publish it.

TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e (November 2026); the memory that a program gets
is what libtpu 0.0.52 says in refusing a larger one. GPUs: NVIDIA's data sheets of the A100 (80 GB),
H100 and H200, SXM, without sparsity.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """A chip at its best.

  Attributes:
    name: what a topology is called by, "v5e".
    kinds: what JAX calls the device, `device_kind`, or how that starts.
    memory: bytes that a program gets.
    flops: operations a second of products in bfloat16.
    float32: the same of products of float32 by the precision that is asked for; None where they are
      made of several products in bfloat16, see `passes`.
    bandwidth: bytes a second to and from main memory.
    links: bytes a second that leave a chip over all its links to other chips.
    axes: of the torus that the links make; 0: a switch, every chip reaches each other at once.
    ring: sides of the torus that are a multiple of this close to a ring.
    most: chips of the largest slice.
    hop: seconds from a chip to the next; 0 where it is not published.
  """

  name: str
  kinds: tuple[str, ...]
  memory: float
  flops: float
  float32: dict[str, float] | None
  bandwidth: float
  links: float
  axes: int
  ring: int
  most: int
  hop: float

  def rate(self, precision: str) -> float:
    """Operations a second of products as `counting` names them, "f32 x f32, highest"."""
    types, _, wanted = precision.partition(", ")
    if self.float32 is None or "f32" not in types:
      return self.flops / passes(precision)
    return self.float32["default" if "bf16" in types else wanted or "default"]


# A hop takes about a microsecond (jax-ml.github.io/scaling-book/tpus). A link carries as much in
# each direction: the published "bidirectional" figure is twice `links`.
CHIPS = (
  Chip(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    memory=15.75 * 2**30,
    flops=197e12,
    float32=None,
    bandwidth=819e9,
    links=200e9,
    axes=2,
    ring=16,
    most=256,
    hop=1e-6,
  ),
  Chip(
    name="v6e",
    kinds=("TPU v6",),
    memory=31.24 * 2**30,
    flops=918e12,
    float32=None,
    bandwidth=1638e9,
    links=400e9,
    axes=2,
    ring=16,
    most=256,
    hop=1e-6,
  ),
  Chip(
    name="v5p",
    kinds=("TPU v5",),  # after v5e, whose name starts so too
    memory=95.73 * 2**30,
    flops=459e12,
    float32=None,
    bandwidth=2765e9,
    links=600e9,
    axes=3,
    ring=4,
    most=6144,
    hop=1e-6,
  ),
  Chip(
    name="A100",
    kinds=("NVIDIA A100-SXM4-80GB",),
    memory=80e9,
    flops=312e12,
    float32={"default": 156e12, "high": 156e12, "highest": 19.5e12},  # TF32 but for highest
    bandwidth=2039e9,
    links=300e9,
    axes=0,
    ring=1,
    most=8,
    hop=0.0,
  ),
  Chip(
    name="H100",
    kinds=("NVIDIA H100 80GB HBM3",),
    memory=80e9,
    flops=989e12,
    float32={"default": 494e12, "high": 494e12, "highest": 67e12},
    bandwidth=3350e9,
    links=450e9,
    axes=0,
    ring=1,
    most=8,
    hop=0.0,
  ),
  Chip(
    name="H200",
    kinds=("NVIDIA H200",),
    memory=141e9,
    flops=989e12,
    float32={"default": 494e12, "high": 494e12, "highest": 67e12},
    bandwidth=4800e9,
    links=450e9,
    axes=0,
    ring=1,
    most=8,
    hop=0.0,
  ),
)


def of_kind(device_kind: str) -> Chip | None:
  """The chip that JAX calls this; None where it is not in the table.

  >>> of_kind("TPU v5 lite").name
  'v5e'
  """
  return next((chip for chip in CHIPS if device_kind.startswith(chip.kinds)), None)


def passes(precision: str) -> int:
  """Products in bfloat16 that a TPU makes of one product, "f32 x f32, highest" and the like.

  float32 is split into one part (default), two (high) or three (highest), bfloat16 is one; products
  of parts that are too small to matter are left out, so that highest takes six.

  >>> passes("f32 x f32, highest"), passes("bf16 x f32, highest"), passes("bf16 x bf16")
  (6, 3, 1)
  """
  types, _, wanted = precision.partition(", ")
  depth = {"high": 2, "highest": 3}.get(wanted, 1)
  a, b = (depth if kind in ("f32", "f64") else 1 for kind in types.split(" x "))
  return sum(i + j < max(a, b) for i in range(a) for j in range(b))
