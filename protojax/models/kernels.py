"""Kernels that are stored split over the devices, put together where a product needs them."""

import jax
from jax.sharding import PartitionSpec

from protojax import placement


def whole(kernel: jax.Array) -> jax.Array:
  """A kernel that `placement.largest` has split over "data", whole on every device.

  For inside of jit and `jax.set_mesh`; elsewhere, and where no axis is split, it returns what it
  was given. Cast to the dtype of the product first: that is what travels. A gradient is split as
  the kernel is.
  """
  split = placement.largest(kernel.shape, placement.extent()[0])
  if split == PartitionSpec():
    return kernel

  def constrained(x, spec):
    return jax.lax.with_sharding_constraint(x, spec)

  # The transpose of a constraint would have every device hold the whole gradient.
  gathered = jax.custom_vjp(lambda x: constrained(constrained(x, split), PartitionSpec()))
  gathered.defvjp(lambda x: (gathered(x), None), lambda _, grad: (constrained(grad, split),))
  return gathered(kernel)


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, preferred_element_type=None
) -> jax.Array:
  """`jax.lax.dot_general` by the `whole` kernel: for `nn.Dense`, which casts before."""
  return jax.lax.dot_general(x, whole(kernel), dimension_numbers, precision, preferred_element_type)
