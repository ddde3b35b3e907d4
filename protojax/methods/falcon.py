"""FALCON / CPLearn: images choose among frozen random codes (arXiv 2410.04959).

A Linear and a batch norm lead from the backbone to D dimensions, where a dictionary of K codes in
{-1, 1}^D never moves. Two views of an image must choose alike, and the mean choice must be
spread. No teacher, no learned prototypes, no stopped gradient: it flows through both views. The
head is the published one with head.layers=1, norm_output=True and init="uniform"; any other is
taken, but the guarantees against collapse rest on that batch norm. `method.assign` normalises, so
head.l2 is False. K may exceed the batch.

Where paper and code differ, there is an option:
  assign  "l2" compares cosines, as the first version of the paper; "tanh" is the published code.
  scale   The inverse temperature L = ln((1 - eps (K - 1)) / eps), 18.4, leaves eps to each code
    but the chosen one. With tanh, the code multiplies it by the square root of the batch of one
    device; here `method.tau_batch` stands for that batch, whatever the batch is.
  prior   "reverse" is KL(mean || uniform), as the code; "forward" is the paper's cross entropy of
    the mean under the uniform. With more codes than images in a batch, forward is nearly the same
    for collapsed and for spread assignments: use it for K <= batch_size only.
As in the code, both terms are symmetric in the views. Unlike there, the mean is over the batch of
all devices; local views, which it does not have, must agree with the global ones and are left out
of the prior.

With the reverse prior and beta >= 1 the loss is at least ln(K / batch_size), or 0 for a batch of K
or more. With beta = 1 it is ln K if every code is as likely, and if all images have the same code.
"""

import math

import jax
import jax.numpy as jnp

from protojax import errors, losses, placement
from protojax.methods import base
from protojax.methods.networks import student
from protojax.prototypes import dictionary, prototype_set
from protojax.prototypes import scoring as scorings

OPTIONS = {
  "prototypes": "dictionary",  # nothing else
  "assign": "l2",  # or "tanh"
  "tau_batch": 64,  # with tanh only
  "prior": "reverse",  # or "forward"
  "beta": 1.0,  # weight of the agreement between views; the prior's is 1
  "eps": 1e-8,  # probability of a code that is not chosen, below 1 / num_prototypes
}


def make(config) -> base.Method:
  """FALCON from `config.method` (OPTIONS and num_prototypes, K) and `head.bottleneck` (D).

  Raises:
    UserError: for unknown or impossible options.
  """
  options, dim = config.method, config.head.bottleneck
  num = options.num_prototypes
  errors.require(
    config, {"method.prototypes": "dictionary"}, "the codes of falcon are never learned"
  )
  errors.require(config, {"head.l2": False}, "method.assign normalises")
  for name, choices in (("assign", ("l2", "tanh")), ("prior", ("reverse", "forward"))):
    if options[name] not in choices:
      raise errors.UserError(
        f"method.{name}={options[name]!r} is unknown: choose {' or '.join(choices)}"
      )
  if not 2 <= num <= 2**dim:
    raise errors.UserError(
      f"method.num_prototypes={num}: take 2 codes or more, and no more than the corners of a cube "
      f"of head.bottleneck={dim} dimensions"
    )
  if not 0.0 < options.eps * num < 1.0 or options.tau_batch < 1:
    raise errors.UserError(
      f"method.eps={options.eps} must be above 0 and below 1 / method.num_prototypes={num}, and "
      f"method.tau_batch={options.tau_batch} at least 1"
    )
  scale = dictionary.inverse_temperature(num, options.eps)
  if options.assign == "tanh":
    scale *= math.sqrt(options.tau_batch)
  net, precision = student.build(config), prototype_set.precision(config)

  def place(z):
    return jnp.tanh(z) if options.assign == "tanh" else math.sqrt(dim) * losses.l2_normalize(z)

  def init(key):
    encoder_key, codes_key = jax.random.split(key)
    variables = net.method.init(encoder_key)
    return variables.replace(prototypes=dictionary.init(codes_key, dim, num))

  def loss(trained, frozen, views, key, step):
    del step
    z, batch_stats = net.embed(trained, frozen, views, key)
    codes = frozen.prototypes["dictionary"]
    x = placement.beside_prototypes(place(z))
    block = prototype_set.block_size(config, x.size // dim)
    out = dictionary.compare(codes, x, scale=scale, block=block, precision=precision)
    consistency = losses.mean_over_other_views(out.cross_entropy)
    mean_entropy = out.mean_entropy.mean()
    reverse = options.prior == "reverse"
    prior = math.log(num) - mean_entropy if reverse else out.uniform.mean()
    value = prior + options.beta * consistency
    metrics = {
      "loss": value,
      "prior": prior,
      "consistency": consistency,
      "target_entropy": jnp.trace(out.cross_entropy) / 2,
      "mean_entropy": mean_entropy,
    }
    if reverse and options.beta == 1.0:
      metrics["ln_k"] = jnp.float32(math.log(num))  # uniform; all on one code costs as much
    return value, base.LossOut(metrics, batch_stats)

  def embeddings(variables, images):
    return {"prototypes": place(net.project(variables, images))}

  def codes(variables, images):
    x = embeddings(variables, images)["prototypes"]
    return {"prototypes": scale * dictionary.scores(variables.prototypes["dictionary"], x)}

  def prototype_matrices(variables):
    return {"prototypes": dictionary.rows(variables.prototypes["dictionary"])}

  def scoring(variables):
    tanh = options.assign == "tanh"
    found = scorings.Scoring(
      variables.prototypes["dictionary"].T,  # a byte a number
      place="tanh" if tanh else "unit",
      scale=scale / (dim if tanh else math.sqrt(dim)),
    )
    return {"prototypes": found}

  return net.method._replace(
    init=init,
    loss=loss,
    codes=codes,
    embeddings=embeddings,
    prototype_matrices=prototype_matrices,
    scoring=scoring,
  )
