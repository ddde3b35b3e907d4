"""PCL: prototypical contrastive learning (arXiv 2005.04966).

A momentum encoder and a queue of its keys (InfoNCE); from `warmup_epochs` on also ProtoNCE: between
epochs, k-means on the teacher's embeddings (evaluation transform) gives every image a cluster in
each of several sets, which its query must find at the cluster's own temperature.

As published: one direction (view 0 asks, view 1 answers), constant teacher momentum, Euclidean
k-means, centroids normalised afterwards. Different: a query is compared with all centroids of a set
instead of those of its batch and 16,384 sampled ones, so that images of a cluster are no negatives
of each other; k-means starts once (published: `kmeans_restarts=5`); batch norm is not shuffled.
Keys whose mean is 0 leave InfoNCE at ln(1 + queue_size exp(-1 / temperature)) or more.
"""

import jax
import jax.numpy as jnp

from protojax import errors, losses, placement
from protojax.methods import base
from protojax.methods.networks import student_teacher
from protojax.prototypes import kmeans, prototype_set, soft, streaming, weight_norm
from protojax.prototypes import scoring as scorings

OPTIONS = {
  "prototypes": "kmeans",  # the only kind
  "num_prototypes": 1000,  # clusters of the finest set, the one that the monitor watches
  "coarse_clusters": (250, 500),  # of further sets
  "temperature": 0.2,  # of InfoNCE, and the mean over the clusters of a set
  "queue_size": 16_384,
  "warmup_epochs": 20,  # InfoNCE alone
  "kmeans_steps": 20,
  "kmeans_restarts": 1,
}


def _check(config, sizes) -> None:
  options, images = config.method, config.data.num_records
  errors.require(
    config,
    {"method.prototypes": "kmeans", "augment.num_local": 0, "head.l2": True},
    "pcl compares the directions of two global views and finds its own prototypes",
  )
  errors.require_positive(options, "temperature", "kmeans_steps", "kmeans_restarts")
  prototype_set.precision(config)
  if options.queue_size < 1 or options.queue_size % config.batch_size:
    raise errors.UserError(
      f"method.queue_size={options.queue_size} must be a multiple of batch_size={config.batch_size}"
    )
  if not 2 <= min(sizes) <= max(sizes) < images or len(set(sizes)) < len(sizes):
    raise errors.UserError(
      f"{sizes} clusters of {images} images: choose different numbers, 2 or more and fewer than "
      "images, for method.num_prototypes and method.coarse_clusters"
    )


def _proto_nce(rows, centroids, phi, clusters, options) -> jax.Array:
  """`losses.proto_nce`, by blocks of clusters where they are many."""
  block = streaming.block_size(options.block, len(rows), len(centroids))
  if not block:
    return losses.proto_nce(rows, centroids, phi, clusters, precision=options.precision)
  scores = soft.Scores(rows, centroids / phi[:, None], block=block, precision=options.precision)
  p = soft.softmax(scores)
  own = jnp.sum(rows * (centroids / phi[:, None])[clusters], axis=-1)
  return jnp.mean(p.log_partition.reshape(-1) - own)


def make(config) -> base.Method:
  """PCL from `config.method`: OPTIONS; `config.teacher.momentum` stays as it is.

  Raises:
    UserError: for other prototypes, local views, a queue of odd length or too many clusters.
  """
  options, dim = config.method, config.head.bottleneck
  _check(config, sorted((*options.coarse_clusters, options.num_prototypes)))
  sizes = {f"clusters{k}": k for k in options.coarse_clusters}
  sizes["prototypes"] = options.num_prototypes
  start = options.warmup_epochs * config.steps_per_epoch
  effort = {"num_steps": options.kmeans_steps, "num_restarts": options.kmeans_restarts}
  networks = student_teacher.build(config, constant_momentum=True)

  def random_rows(key, num):
    return losses.l2_normalize(jax.random.normal(key, (num, dim)))

  def init(key):
    encoder_key, queue_key, prototype_key = jax.random.split(key, 3)
    variables = networks.method.init(encoder_key)
    return variables.replace(
      prototypes={  # stand-ins until the first refresh
        name: {"centroids": random_rows(prototype_key, k), "phi": jnp.full(k, options.temperature)}
        for name, k in sizes.items()
      },
      carry={
        **variables.carry,
        "key_queue": random_rows(queue_key, options.queue_size),
        "clusters": jnp.zeros((len(sizes), config.data.num_records), jnp.int32),
      },
    )

  def loss(trained, frozen, views, key, step):
    frozen, crops = jax.lax.stop_gradient(frozen), views["global"]
    one_each = {"global": crops[:, :1], "target": crops[:, 1:]}
    student, teacher, batch_stats = networks.embed(trained, frozen, one_each, key)
    q, k = student.z[:, 0], teacher.z[:, 0]
    info = losses.info_nce(q, k, frozen.carry["key_queue"], temperature=options.temperature)
    rows, index = placement.beside_prototypes((q, views["index"]))
    clusters = frozen.carry["clusters"][:, index]  # [sets, B]
    sets = zip((frozen.prototypes[name] for name in sizes), clusters, strict=True)
    proto = sum(_proto_nce(rows, **p, clusters=c, options=options) for p, c in sets) / len(sizes)
    proto = jnp.where(step >= start, proto, 0.0)  # until then the clusters are stand-ins
    value = info + proto
    metrics = {"loss": value, "info_nce": info, "proto_nce": proto}
    return value, base.LossOut(metrics, {"batch_stats": batch_stats, "keys": k})

  def update(variables, stats, step):
    oldest = step % (options.queue_size // config.batch_size) * config.batch_size
    queue = variables.carry["key_queue"]
    queue = jax.lax.dynamic_update_slice_in_dim(queue, stats["keys"], oldest, axis=0)
    variables = networks.method.update(variables, stats["batch_stats"], step)
    return variables.replace(carry={**variables.carry, "key_queue": queue})

  def refresh(variables, rows, index, key):
    prototypes, clusters = {}, variables.carry["clusters"]
    for i, (name, k) in enumerate(sizes.items()):
      found = kmeans.fit(rows, jax.random.fold_in(key, i), num_clusters=k, **effort)
      phi = kmeans.concentration(found.distances, found.counts, options.temperature)
      prototypes[name] = {"centroids": losses.l2_normalize(found.centroids), "phi": phi}
      clusters = clusters.at[i, index].set(found.codes)
    return variables.replace(prototypes=prototypes, carry={**variables.carry, "clusters": clusters})

  def embeddings(variables, images):
    return dict.fromkeys(sizes, networks.project(variables, images).z[:, 0])

  def prototype_matrices(variables):
    return {name: variables.prototypes[name]["centroids"] for name in sizes}

  def codes(variables, images):
    z, sets = embeddings(variables, images), prototype_matrices(variables)
    return {name: weight_norm.scores(rows, z[name]) for name, rows in sets.items()}

  def scoring(variables):
    return {name: scorings.Scoring(rows) for name, rows in prototype_matrices(variables).items()}

  return networks.method._replace(
    init=init,
    loss=loss,
    update=update,
    codes=codes,
    embeddings=embeddings,
    prototype_matrices=prototype_matrices,
    scoring=scoring,
    refresh=refresh,
    refresh_from=start,
  )
