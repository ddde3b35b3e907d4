"""GEDI: clusters that are invariant, evenly used and, in full, a model of the images.

Sansone and Manhaeve, arXiv 2212.13425; sampler and density as JEM has them, arXiv 1912.03263.

Logits s_k are scores over the prototypes over `temperature`; p = softmax(s), its mean over the
global batch p-bar, view by view. The loss is the weighted sum of

  uniformity   - mean_k ln p-bar_k: ln K if all clusters are used alike, else more;
  invariance   cross entropy of one view's p against another's, with gradient through both;
  generative   mean f(samples) - mean f(data), f = logsumexp_k s_k the log density up to a constant
               (`method.generative`). Samples are Langevin chains from a replay buffer; f is that
               of the network in evaluation mode, batch norm included.

The default weights are the numbers of the released form, which has no generative term and takes the
*sum* over clusters, of the first view alone and in one direction: `method.legacy` restores that.
The mean, taken here, is 1 / K of it, so that the same numbers weigh uniformity K times less. There
the last layer is plainly linear; here it is prototypes over the head's output, unit rows if learned
without `method.train_prototype_norm`; a mixture, fed by the student's features, or frozen ones too.
The full form's code could not be read: equations from its objective, sampler's constants from JEM.
Chains start in [-1, 1), so it wants augment.mean=augment.std=(.5, .5, .5).

Without the generative term the loss is more than weight_uniformity ln K; with it there is no bound.
"""

import functools
import math

import jax
import jax.numpy as jnp

from protojax import errors, losses, sizes
from protojax.methods import base
from protojax.methods.networks import student
from protojax.models import langevin
from protojax.prototypes import soft

OPTIONS = {
  "temperature": 0.1,
  "weight_uniformity": 0.5,
  "weight_invariance": 0.05,
  "legacy": False,  # the released sum over clusters, of view 1 only and in one direction
  "generative": False,
  # With `generative` only:
  "weight_generative": 1.0,
  "input_noise": 0.03,  # standard deviation added to the data, in units of the network's input
  "buffer_size": 10_000,  # images, cut to a multiple of batch_size
  "sgld_steps": 20,
  "sgld_rate": 1.0,  # of the gradient
  "sgld_noise": 0.01,  # standard deviation a step, in units of the network's input
  "sgld_restart": 0.05,  # probability of a chain to start anew, uniform in [-1, 1)
}


def make(config) -> base.Method:
  """GEDI from `config.method`: OPTIONS, `num_prototypes`, `prototypes`.

  Raises:
    UserError: for a temperature, a buffer or a chain out of range.
  """
  options = config.method
  slots = options.buffer_size // config.batch_size
  errors.require_positive(options, "temperature")
  if options.generative and (slots < 1 or options.sgld_steps < 1):
    raise errors.UserError(
      f"method.buffer_size={options.buffer_size}, method.sgld_steps={options.sgld_steps}: set the "
      f"first to at least the batch of {config.batch_size} images, the second to at least 1"
    )
  net = student.build_with_prototypes(config)
  image = (*sizes.pair(config.augment.global_size), config.data.channels)

  def init(key):
    variables = net.method.init(key)
    if not options.generative:
      return variables
    shape = (config.batch_size, slots, *image)
    # Not fold_in(key, 1): that is the second key of the split by which `net` starts prototypes.
    replay = langevin.init(jax.random.fold_in(key, 2), shape)
    return variables.replace(carry={**variables.carry, "replay": replay})

  def log_density(variables, images):
    scores = net.scores(variables.prototypes, net.project(variables, images))
    return soft.log_partition(scores.over(options.temperature))

  def generative(variables, data, key):
    """The term, and for `update` the slot of the chains and where they ended."""
    noise_key, start_key, chain_key = jax.random.split(key, 3)
    detached = jax.lax.stop_gradient(variables)
    slot, x = langevin.start(detached.carry["replay"], start_key, restart=options.sgld_restart)
    samples = langevin.run(
      functools.partial(log_density, detached),
      x,
      chain_key,
      num_steps=options.sgld_steps,
      rate=options.sgld_rate,
      noise=options.sgld_noise,
    )
    data += options.input_noise * jax.random.normal(noise_key, data.shape)
    f = functools.partial(log_density, variables)
    return langevin.contrast(f, data, samples), (slot, samples)

  def loss(trained, frozen, views, key, step):
    del step
    net_key, sample_key = jax.random.split(key)
    z, state, stats = net.embed(trained, frozen, views, net_key)
    scores = net.scores(state, z).over(options.temperature)
    pairs, log_mean = soft.agreement(soft.softmax(scores))
    even = -log_mean.mean(axis=-1)  # of each view, at least ln K
    if options.legacy:
      even, invariant = options.num_prototypes * even[0], pairs[0, 1]
    else:
      even, invariant = even.mean(), losses.mean_over_other_views(pairs)
    metrics = {
      "loss": options.weight_uniformity * even + options.weight_invariance * invariant,
      "uniformity": even,
      "cross_entropy": invariant,
      "ln_k": jnp.float32(math.log(options.num_prototypes)),  # of assignments that say nothing
      "target_entropy": jnp.trace(pairs) / 2,
      "mean_entropy": losses.entropy(jnp.exp(log_mean).mean(axis=0)),
    }
    if options.generative:
      variables = jax.lax.stop_gradient(frozen).replace(
        encoder=trained["encoder"], prototypes=state
      )
      term, stats["chains"] = generative(variables, views["global"][:, 0], sample_key)
      metrics |= {"loss": metrics["loss"] + options.weight_generative * term, "generative": term}
    return metrics["loss"], base.LossOut(metrics, stats)

  def update(variables, stats, step):
    variables = net.method.update(variables, stats, step)
    if not options.generative:
      return variables
    replay = langevin.put(variables.carry["replay"], *stats["chains"])
    return variables.replace(carry={**variables.carry, "replay": replay})

  return net.method._replace(init=init, loss=loss, update=update)
