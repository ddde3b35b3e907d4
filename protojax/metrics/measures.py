"""The table of measures: what each is called, computed from and shown as; nobody else names them.

A new measure is a function in `collapse` and one row of `MEASURES`; an import only if the function
lies elsewhere. `summary` then computes it, training writes it to metrics.jsonl, and the log line,
the report and the doctor show it as its row says. What the values mean together: `verdicts`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax import errors
from protojax.metrics import chance, collapse, pairwise


class Measure(NamedTuple):
  """A row of `MEASURES`.

  Attributes:
    name: in metrics.jsonl, after "collapse/" and the `tag` of its set of prototypes.
    inputs: the arguments of `summary` that it needs; it is left out where one is not given.
    function: (*inputs) -> number, or {name: number} of several measures at once; None for one that
      an earlier row's function gives.
    form: how the number is written in the log line, such as ".2f"; ".0%" also says that it is a
      share.
    short: its name in the log line; "" leaves it out there.
    title: its name in the report, where it has a row and a curve, and in the doctor; "" leaves it
      out of the report, while the doctor shows it by `label`, or by `name` without one.
    meaning: what the report says about it, half a sentence.
    has_random: whether its function also gives "NAME_random", the same of random prototypes.
    label: see `title`.
  """

  name: str
  inputs: tuple[str, ...]
  function: Callable[..., Any] | None = None
  form: str = ".2f"
  short: str = ""
  title: str = ""
  meaning: str = ""
  has_random: bool = False
  label: str = ""

  @property
  def of_sets(self) -> bool:
    """Whether every set of prototypes has one of its own."""
    of_sets = {"prototypes", "partners", "num_prototypes", "codes", "embeddings"}
    return bool(of_sets & set(self.inputs))

  @property
  def is_share(self) -> bool:
    """Whether it is one, written in percent."""
    return self.form.endswith("%")

  def value(self, values: Mapping[str, float | None], tag: str = "") -> float | None:
    """Its value by the names of metrics.jsonl: of all images if known, else of the sample."""
    name = f"collapse/{tag}{self.name}"
    return values.get(f"{name}_sample") if values.get(name) is None else values[name]


def uniqueness(unique: Sequence[int], random: Sequence[int], num: int) -> dict[str, float]:
  """Names the shares of unique prototypes at `pairwise.THRESHOLDS`, and those of random ones.

  Args:
    unique: [T], as `pairwise.unique_counts` gives them.
    random: [T], of random prototypes with the same K and D.
    num: K.
  """
  unique, random = np.asarray(unique) / num, np.asarray(random) / num
  out = {f"unique_{t}": c for t, c in zip(pairwise.THRESHOLDS, unique, strict=True)}
  return out | {f"unique_{t}_random": c for t, c in zip(pairwise.THRESHOLDS, random, strict=True)}


def _uniqueness(partners) -> dict[str, float]:
  found = partners()
  some = {"unique_of": found.looked} if found.looked < found.num else {}
  if found.no_direction:
    some["no_direction"] = found.no_direction
  return uniqueness(found.unique, found.random, found.num) | some


def _not_finite(prototypes) -> dict[str, float]:
  rows = np.asarray(prototypes)
  share = np.mean(~np.isfinite(rows.max(axis=1)) | ~np.isfinite(rows.min(axis=1)))
  return {"not_finite": share} if share else {}


def _relative_uniqueness(prototypes, embeddings, partners) -> jax.Array:
  return collapse.relative_uniqueness(prototypes, embeddings, partners().nearest)


def _usage(codes, num_prototypes) -> dict[str, float]:
  used = collapse.used_fraction(codes, num_prototypes)
  return {"used": used, "used_most": min(len(codes), num_prototypes) / num_prototypes}


def _usage_of_random(codes, num_prototypes, embeddings) -> dict[str, float]:
  """What would be used if the prototypes were random: the codes only say how many there are."""
  del codes
  rows = chance.random_prototypes(num_prototypes, embeddings.shape[1])
  nearest = pairwise.nearest_prototypes(rows, embeddings)
  return {"used_random": collapse.used_fraction(nearest, num_prototypes)}


_PARTNERS, _CODES = ("partners",), ("codes", "num_prototypes")
_GREEDY = "share of K, greedy cover in index order, cosine distance below"

MEASURES = (
  Measure("num_prototypes", ("num_prototypes",), int, ".0f"),
  Measure(
    "unique_0.025",
    _PARTNERS,
    _uniqueness,
    form=".0%",
    title="Unique at .025",
    meaning=f"{_GREEDY} .025",
    has_random=True,
  ),
  *(
    Measure(
      f"unique_0.{digits}",
      _PARTNERS,
      form=".0%",
      short="unique.25" if digits == 25 else "",
      title=f"Unique at .{digits}",
      meaning=f"{_GREEDY} .{digits}",
      has_random=True,
    )
    for digits in (25, 5)
  ),
  # Only where not all are looked at.
  Measure(
    "unique_of",
    _PARTNERS,
    form=",.0f",
    title="Looked at",
    meaning="prototypes that stand for all K in the shares of unique ones and in relative spacing: "
    "compared with all, the share is the mean of 1 / (how many are nearer, itself among them)",
  ),
  # Only where there are some: zero, or not finite; not among the unique ones, and no copies.
  Measure("no_direction", _PARTNERS, form=".1%", label="without direction"),
  # Those of them that are not finite, where there are some.
  Measure("not_finite", ("prototypes",), _not_finite, form=".1%", label="not finite"),
  Measure(
    "used",
    _CODES,
    _usage,
    form=".0%",
    short="used",
    title="Used",
    meaning="share of K that is nearest to some image",
  ),
  # What so many images could use at most.
  Measure("used_most", _CODES, form=".0%", label="could be used"),
  Measure("used_random", (*_CODES, "embeddings"), _usage_of_random, form=".0%"),
  Measure(
    "perplexity",
    _CODES,
    collapse.usage_perplexity,
    title="Perplexity of use",
    meaning="exp of the entropy of the histogram of nearest prototypes; 1: all images have the "
    "same",
  ),
  Measure(
    "drift",
    ("prototypes", "initial_prototypes"),
    collapse.drift,
    title="Drift",
    meaning="mean cosine of each prototype to where it started; 1: never moved",
  ),
  Measure(
    "relative_uniqueness",
    ("prototypes", "embeddings", "partners"),
    _relative_uniqueness,
    title="Relative spacing",
    meaning="median distance between nearest prototypes over that between features and theirs; "
    "0: copies",
  ),
  Measure("embedding_cosine", ("embeddings",), collapse.mean_pairwise_cosine),
  Measure(
    "rankme",
    ("features",),
    collapse.rankme,
    form=".0f",
    short="rank",
    title="RankMe",
    meaning="effective rank of the features",
  ),
  Measure(
    "feature_std",
    ("features",),
    collapse.feature_std,
    title="Feature spread",
    meaning="standard deviation of unit features times √D: 1 on the whole sphere, 0 collapsed",
  ),
  Measure("mean_cosine", ("features",), collapse.mean_pairwise_cosine),
  Measure("teacher_distance", ("encoder", "teacher"), collapse.teacher_distance),
)
BY_NAME = {row.name: row for row in MEASURES}


def tag(name: str) -> str:
  """Gives what stands before a measure's name for a set of prototypes: "" for the main one."""
  return "" if name == "prototypes" else f"{name}_"


def as_array(x) -> jax.Array | np.ndarray:
  """Reads anything with `__dlpack__` or `__array__`; an array of NumPy or JAX stays as it is.

  Raises:
    UserError: if it is no array, or lies where it cannot be read (a GPU, a graph of gradients).
  """
  if isinstance(x, jax.Array | np.ndarray):
    return x
  try:
    if not hasattr(x, "__dlpack__"):
      return np.asarray(x)
    try:
      return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError):  # NumPy has no bfloat16
      return np.asarray(jnp.from_dlpack(x))
  except Exception as error:  # of another library, so of any type
    raise errors.UserError(
      f"{type(x).__name__} cannot be read as an array ({str(error).splitlines()[0]}): give one in "
      "the host's memory, without gradient"
    ) from None


def _sets(given) -> dict[str, Any]:
  """{set: array}; an array alone is that of the main set."""
  if given is None:
    return {}
  given = given if isinstance(given, Mapping) else {"prototypes": given}
  return {name: as_array(x) for name, x in given.items()}


def not_compared(shape: Sequence[int], dim: int) -> str:
  """What to give instead of embeddings [N, other than `dim`], in words."""
  if shape[0] == dim:
    return f"they seem to be columns, {shape[0]} x {shape[1]}: transpose them, a row is an image's"
  return "give what comes out of the head just before the prototypes, not features of the backbone"


def _check(name: str, arrays: Mapping[str, Any]) -> None:
  """Refuses shapes that do not fit together, of one set of prototypes."""
  shapes = {key: np.shape(x) for key, x in arrays.items()}
  for key, axes in (
    ("prototypes", "K, D"),
    ("initial_prototypes", "K, D"),
    ("embeddings", "N, D"),
    ("codes", "N"),
  ):
    if key in shapes and len(shapes[key]) != axes.count(",") + 1:
      raise errors.UserError(f"{key} of {name!r} has shape {list(shapes[key])}: give [{axes}]")
  matrix = shapes.get("prototypes")
  if matrix and shapes.get("initial_prototypes", matrix) != matrix:
    raise errors.UserError(
      f"initial_prototypes of {name!r} has shape {list(shapes['initial_prototypes'])}, prototypes "
      f"{list(matrix)}: give those of step 0 of the same set"
    )
  if matrix and shapes.get("embeddings", matrix)[1] != matrix[1]:
    raise errors.UserError(
      f"embeddings of {name!r} have {shapes['embeddings'][1]} dimensions and prototypes "
      f"{matrix[1]}: {not_compared(shapes['embeddings'], matrix[1])}"
    )
  if {"codes", "embeddings"} <= shapes.keys() and shapes["codes"] != shapes["embeddings"][:1]:
    raise errors.UserError(
      f"{shapes['codes'][0]:,} codes of {name!r} and {shapes['embeddings'][0]:,} embeddings: give "
      "both of the same images, for random prototypes are counted on these embeddings"
    )
  if "codes" in shapes and "num_prototypes" not in arrays:
    raise errors.UserError(f"codes of {name!r} without prototypes: give num_prototypes, too")
  if shapes.get("codes", (0,))[0]:
    _check_codes(name, np.asarray(arrays["codes"]), arrays["num_prototypes"])


def _check_codes(name: str, codes: np.ndarray, num: int) -> None:
  if codes.dtype.kind not in "iu":
    raise errors.UserError(
      f"codes of {name!r} are {codes.dtype}: give integers, the row of each image's prototype"
    )
  if codes.min() < 0 or codes.max() >= num:
    raise errors.UserError(
      f"codes of {name!r} go from {codes.min()} to {codes.max()} and there are {num:,} prototypes: "
      f"rows count from 0 to {num - 1}; leave images without one out, and their embeddings"
    )


def _codes(prototypes: Any, embeddings: Any) -> dict[str, Any]:
  """{"codes": int [N], the nearest prototype of each embedding}; {} where none is finite.

  Rows that are not finite are nobody's.
  """
  rows = np.asarray(prototypes)
  finite = np.flatnonzero(np.isfinite(rows).all(axis=1))
  if not finite.size:
    return {}
  return {"codes": finite[np.asarray(pairwise.nearest_prototypes(rows[finite], embeddings))]}


def _computed(row: Measure, arrays: Mapping[str, Any], sample: bool) -> dict[str, Any]:
  """{name: number} of what a row's function gives, {} where one of its inputs is missing."""
  if row.function is None or not all(key in arrays for key in row.inputs):
    return {}
  found = row.function(*(arrays[key] for key in row.inputs))
  several = found if isinstance(found, dict) else {row.name: found}
  if sample and "codes" in row.inputs:
    return {_of_sample(name): value for name, value in several.items()}
  return several


def _of_sample(name: str) -> str:
  """ "used_sample" of "used", "used_sample_random" of "used_random"."""
  for ending in ("_random", "_most"):
    if name.endswith(ending):
      return f"{name.removesuffix(ending)}_sample{ending}"
  return f"{name}_sample"


def summary(
  *,
  prototypes: Any = None,
  features: Any = None,
  embeddings: Any = None,
  codes: Any = None,
  initial_prototypes: Any = None,
  num_prototypes: int | Mapping[str, int] | None = None,
  encoder: Any = None,
  teacher: Any = None,
  sample: bool = False,
  partners: collapse.Partners | Mapping[str, collapse.Partners] | None = None,
  known: Mapping[str, float] | None = None,
) -> dict[str, float]:
  """The measures of collapse that these arrays allow, by their names in metrics.jsonl.

  Arrays are of NumPy, JAX or anything with `__dlpack__` or `__array__`, such as a tensor of PyTorch
  in the host's memory. Of several sets of prototypes give {set: array}; the names of all but the
  set "prototypes" carry that of the set ("collapse/patch_used").

  >>> import numpy as np
  >>> from protojax import metrics
  >>> prototypes = np.eye(4)[[0, 1, 2, 2]]
  >>> measures = metrics.summary(prototypes=prototypes, codes=np.array([0, 1, 1, 0]))
  >>> measures["collapse/unique_0.025"], measures["collapse/used"]
  (0.75, 0.5)

  Args:
    prototypes: [K, D], any norm and float dtype.
    features: [N, F], N > 1, of the backbone.
    embeddings: [N, D], N > 1, what is compared with the prototypes.
    codes: int [N], the prototype of each image, 0 to K - 1; without them, of each embedding the
      prototype with the largest cosine.
    initial_prototypes: [K, D], those of step 0.
    num_prototypes: K, where there are codes without prototypes.
    encoder, teacher: pytrees of one structure, the student's weights and the teacher's.
    sample: whether the codes are those of a sample of the images; their measures' names then end
      in "_sample".
    partners: of the prototypes, where `collapse.partners` was called before, or with some of them.
    known: measures that were computed before, by these names: they are not computed again and are
      part of the result.

  Raises:
    UserError: for shapes that do not fit together, codes that are no rows of the prototypes, or
      something that is no array.
  """
  given = {
    "prototypes": _sets(prototypes),
    "initial_prototypes": _sets(initial_prototypes),
    "embeddings": _sets(embeddings),
    "codes": _sets(codes),
  }
  sizes = {name: matrix.shape[0] for name, matrix in given["prototypes"].items()}
  if num_prototypes is not None:
    several = isinstance(num_prototypes, Mapping)
    sizes |= num_prototypes if several else {"prototypes": num_prototypes}
  shared = {}
  if features is not None:
    shared["features"] = as_array(features)
    if shared["features"].ndim != 2:
      raise errors.UserError(f"features has shape {list(shared['features'].shape)}: give [N, F]")
  if encoder is not None and teacher is not None:
    shared |= {"encoder": encoder, "teacher": teacher}
  if partners is not None and not isinstance(partners, Mapping):
    partners = {"prototypes": partners}
  out = dict(known or {})

  def add(rows, arrays, prefix):
    for row in rows:
      if f"{prefix}{row.name}" not in out:
        found = _computed(row, arrays, sample)
        out.update({f"{prefix}{name}": value for name, value in found.items()})

  add((row for row in MEASURES if not row.of_sets), shared, "collapse/")
  for name in dict.fromkeys(name for sets in (sizes, *given.values()) for name in sets):
    arrays = {key: sets[name] for key, sets in given.items() if name in sets}
    if name in sizes:
      arrays["num_prototypes"] = sizes[name]
    _check(name, arrays)
    if "prototypes" in arrays:  # as a function: all pairs are compared only if somebody asks
      there = (partners or {}).get(name)
      arrays["partners"] = functools.cache(
        functools.partial(collapse.partners, arrays["prototypes"])
        if there is None
        else functools.partial(lambda known: known, there)
      )
    if "codes" not in arrays and {"prototypes", "embeddings"} <= arrays.keys():
      arrays |= _codes(arrays["prototypes"], arrays["embeddings"])
    add((row for row in MEASURES if row.of_sets), shared | arrays, f"collapse/{tag(name)}")
  return {name: float(value) for name, value in jax.device_get(out).items()}
