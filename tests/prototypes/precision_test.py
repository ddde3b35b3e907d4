"""`method.precision` reaches every product with prototypes: of scores, and of the mixture's EM."""

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from method_table import METHODS

from protojax import errors, methods
from protojax.prototypes import mixture
from protojax.training import programs

_HIGHEST = jax.lax.Precision.HIGHEST
_DIM = 23  # of embeddings, and of nothing else
# Of each method the last row, some by blocks of prototypes and some with all at once.
_ROWS = {row.name: row for row in METHODS if row.prototypes not in ("none", "frozen")}
# Products that are no scores: of PCL's queries with the queue of keys, both ways.
_OTHERS = {"pcl": 2}


def _products(jaxpr):
  """(shapes of both operands, precision) of every matrix product, those of inner programs too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      asked = equation.params["precision"]
      yield tuple(v.aval.shape for v in equation.invars), asked[0] if asked else None
    for inner in jax.tree.leaves(list(equation.params.values())):
      if isinstance(inner, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
        yield from _products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("row", _ROWS.values(), ids=lambda row: f"{row.name}-{row.prototypes}")
def test_every_product_with_prototypes_has_the_precision_that_was_asked_for(row):
  config = row.config(head__bottleneck=_DIM, method__precision="high")
  program = programs.Program(config, devices=jax.devices()[:1])
  of_embeddings = [
    asked
    for shapes, asked in _products(program.trace().jaxpr)
    if any(_DIM in shape for shape in shapes)
  ]
  assert of_embeddings.count(jax.lax.Precision.HIGH) >= 2  # forward and backward
  assert of_embeddings.count(_HIGHEST) == _OTHERS.get(row.name, 0)


@pytest.mark.parametrize(("covariance", "kept"), [("isotropic", 0), ("diagonal", 4)])
def test_products_that_variances_are_made_of_stay_exact(covariance, kept):
  """Two of the E-step, two of the M-step; the cosines that are logged may be rougher."""
  options = mixture.Options(covariance=covariance, precision="default")
  em = mixture.online_em(8, _DIM, horizon_steps=10.0, options=options)
  state = em.init(jax.random.key(0))
  traced = jax.make_jaxpr(em.update)(state, jnp.ones((4, _DIM)))
  every = [asked for _, asked in _products(traced.jaxpr)]
  assert every.count(_HIGHEST) == kept and len(every) > kept


@pytest.mark.parametrize("name", ["dino", "swav", "falcon", "pcl"])
def test_an_unknown_precision_is_one_line(name):
  row = next(row for row in METHODS if row.name == name)
  config = row.config(method__precision="bfloat16")
  with pytest.raises(errors.UserError, match="'bfloat16' is unknown: choose highest, high or def"):
    methods.load(name).make(config)


def test_a_mixture_by_itself_refuses_an_unknown_precision():
  options = mixture.Options(precision="tf32")
  with pytest.raises(ValueError, match="precision='tf32': choose highest, high, default"):
    mixture.online_em(4, 2, horizon_steps=1.0, options=options)
