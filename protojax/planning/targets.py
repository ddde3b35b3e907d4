"""The devices that a plan is for: a slice of TPUs that is not here, virtual or real ones."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from protojax import errors
from protojax.planning import chips

_TOPOLOGIES = "v5e:4x4, v5e:16x16, v6e:8x8 or v5p:4x4x4"
# Of slices with so many sides, what there is.
_FORMS = {
  2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x8", "8x16x16", "16x16x16"),
}


class Target(NamedTuple):
  """Devices to compile for.

  Attributes:
    name: as it is printed.
    devices: JAX's.
    chip: None where nothing is known of the kind of device.
    sides: of the torus that the devices are arranged in; () where they are not.
    here: whether they are this machine's.
  """

  name: str
  devices: list[Any]
  chip: chips.Chip | None
  sides: tuple[int, ...]
  here: bool


def of_topology(topology: str) -> Target:
  """A slice of TPUs, "v5e:16x16"; the compiler for it comes with libtpu, and no TPU is needed.

  Raises:
    UserError: if there is no such slice, or no libtpu.
  """
  kind, _, shape = topology.partition(":")
  chip = next((c for c in chips.CHIPS if c.axes and c.name == kind), None)
  sides = tuple(int(side) for side in shape.split("x")) if _is_shape(shape) else ()
  if chip is None or not 0 < math.prod(sides) <= chip.most:
    raise errors.UserError(
      f"topology={topology}: no such slice of TPUs: give {_TOPOLOGIES}, up to 256 chips of v5e and "
      "v6e and 6,144 of v5p"
    )
  forms = ", ".join(f"{kind}:{form}" for form in _FORMS[chip.axes])
  if len(sides) != chip.axes:
    raise errors.UserError(
      f"topology={topology}: no such slice of TPUs: one of {kind} has {chip.axes} sides: {forms}, "
      "and others of even sides"
    )
  if any(side > 1 and side % 2 for side in sides):  # a host has 2 x 2 of its chips
    raise errors.UserError(
      f"topology={topology}: no such slice of TPUs: sides are even, or 1: {forms}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
      f"topology={topology} needs the compiler for TPUs: pip install 'protojax[plan]'"
    )
  from jax.experimental import topologies

  # A host has 2 x 2 chips, of a narrower slice fewer, which not every libtpu finds by itself.
  width, height = (min(side, 2) for side in sides[:2])
  hosts = {"chips_per_host_bounds": [width, height, 1]} if 1 in (width, height) else {}
  try:
    with environment(here=False):
      found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **hosts)
  except jax.errors.JaxRuntimeError as error:
    said = str(error).partition("\n")[0].partition(": ")[2]
    raise errors.UserError(f"topology={topology}: {said}: give {_TOPOLOGIES}") from None
  return Target(
    topology, list(found.devices), chip, tuple(side for side in sides if side > 1), False
  )


@contextlib.contextmanager
def environment(here: bool) -> Iterator[None]:
  """What a compiler sees when it is loaded, and first used; libtpu, that no chip is touched.

  Args:
    here: whether it compiles for devices of this machine; then nothing changes.
  """
  if here:
    yield
    return
  # Neither the lock that keeps a second process off the chips nor the machine's own description of
  # its TPU, which it would wait for, say anything here; a flag of another backend would end it.
  flags = os.environ.get("XLA_FLAGS", "").split()
  kept = [flag for flag in flags if not flag.startswith(("--xla_cpu_", "--xla_gpu_"))]
  seen = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "XLA_FLAGS": " ".join(kept),
  }
  before = {name: os.environ.get(name) for name in seen}
  os.environ.update(seen)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _is_shape(text: str) -> bool:
  return all(side.isdecimal() for side in text.split("x"))


def virtual(count: int) -> Target:
  """So many devices that share this machine's CPU; before JAX has started any.

  Raises:
    UserError: if `count` is not positive, or other devices have been started.
  """
  if count < 1:
    raise errors.UserError(f"devices={count} must be 1 or more")
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    if len(jax.devices("cpu")) < count:
      raise errors.UserError(
        f"devices={count}: JAX has started {jax.device_count()} already; ask for them first"
      ) from None
  return Target(f"{count} virtual CPU devices", jax.devices("cpu")[:count], None, (), True)


def at_hand() -> Target:
  """All devices that JAX finds, those of other processes too."""
  devices = jax.devices()
  kind = devices[0].device_kind
  places = [device.coords for device in devices if hasattr(device, "coords")]
  sides = tuple(max(place) + 1 for place in zip(*places, strict=True))
  return Target(
    f"{len(devices)} x {kind}", devices, chips.of_kind(kind), tuple(s for s in sides if s > 1), True
  )
