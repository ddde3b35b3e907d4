"""What `method.precision` costs in errors: python -m benchmarks.precision

A processor computes in float32 whatever is asked for, so what accelerators do is imitated: operands
are rounded as theirs are, products are summed in float32. `high` is three products of operands that
are split into two bfloat16 on a TPU, TensorFloat-32 on a GPU; `default` is one product of bfloat16
on a TPU, TensorFloat-32 on a GPU. Embeddings are of length one, with cosine .3 to a prototype each
and random otherwise, so that targets are shared by several. Everything is compared with float64.
Writes docs/results/precision.json and prints the table; half a minute.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import numpy as np
import scipy.special

NUM, DIM, ROWS = 16_384, 256, 256
TEACHER, STUDENT, KAPPA = 0.04, 0.1, 100.0
BALANCED = 0.05  # temperature of the targets of gmm_vit_s
SINKHORN_STEPS = 3  # there, and in its mixture
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "precision.json"


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
  """float32 with a mantissa of so many bits, to the nearest, halves to even."""
  whole = x.astype(np.float32).view(np.uint32)
  drop = 23 - bits
  odd = (whole >> drop) & 1
  near = whole + np.uint32((1 << (drop - 1)) - 1) + odd
  return (near >> drop << drop).view(np.float32)


def once(bits: int) -> Callable:
  return lambda a, b: rounded(a, bits) @ rounded(b, bits).T


def three_bfloat16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a b' of a = high + low: all but the product of both low parts."""
  (a_high, a_low), (b_high, b_low) = ((h := rounded(x, 7), rounded(x - h, 7)) for x in (a, b))
  return a_low @ b_high.T + a_high @ b_low.T + a_high @ b_high.T


PRODUCTS = {
  "highest: float32": lambda a, b: a @ b.T,
  "high on a TPU: three bfloat16": three_bfloat16,
  "high and default on a GPU: TF32": once(10),
  "default on a TPU: bfloat16": once(7),
}
COLUMNS = {
  "scores / .04, rms": "score_rms",
  "largest": "score_max",
  "targets": "targets",
  "targets, balanced": "balanced_targets",
  "loss": "loss",
  "gradient": "gradient",
  "responsibilities, kappa 100": "responsibilities",
  "the same, balanced": "balanced_responsibilities",
  "step of the means": "means",
}


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Embeddings of a student and a teacher [N, D], prototypes [K, D]; float32, of length one."""
  rng = np.random.default_rng(seed)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  prototypes = unit(rng.normal(size=(NUM, DIM)))
  own = prototypes[rng.integers(0, NUM, ROWS)]

  def near():
    noise = rng.normal(size=(ROWS, DIM))
    aside = unit(noise - (noise * own).sum(axis=1, keepdims=True) * own)
    return (0.3 * own + np.sqrt(1 - 0.3**2) * aside).astype(np.float32)

  return near(), near(), prototypes.astype(np.float32)


def balanced(logits: np.ndarray) -> np.ndarray:
  """Sinkhorn-Knopp over the rows: prototypes get equal totals, then rows sum to one, in turn."""
  for _ in range(SINKHORN_STEPS):
    logits = logits - scipy.special.logsumexp(logits, axis=0, keepdims=True)
    logits = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
  return np.exp(logits)


def step(product: Callable, student, teacher, prototypes) -> dict[str, np.ndarray]:
  """A teacher's targets, the student's loss and its gradient, and a mixture's E-step and M-step.

  Targets by softmax, as the loss has them, and balanced; responsibilities by softmax and balanced,
  as the M-step has them.
  """
  scores = product(teacher, prototypes).astype(np.float64)
  targets = scipy.special.softmax(scores / TEACHER, axis=1)
  log_p = scipy.special.log_softmax(product(student, prototypes) / STUDENT, axis=1)
  pull = ((np.exp(log_p) - targets) / STUDENT).astype(student.dtype)
  q = balanced(KAPPA * scores)
  return {
    "scores": scores,
    "targets": targets,
    "balanced_targets": balanced(scores / BALANCED),
    "loss": -(targets * log_p).sum(axis=1),
    "gradient": product(pull, prototypes.T),
    "responsibilities": scipy.special.softmax(KAPPA * scores, axis=1),
    "balanced_responsibilities": q,
    "means": product(q.T.astype(student.dtype), teacher.T),  # sums of what each is given
  }


def compared(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
  """Errors: of scores absolute; of distributions the mass that is elsewhere, of the rest
  relative to their length."""
  apart = {key: found[key].astype(np.float64) - exact[key] for key in exact}
  relative = {
    key: float(np.linalg.norm(apart[key]) / np.linalg.norm(exact[key]))
    for key in ("loss", "gradient", "means")
  }
  moved = {
    key: float(np.abs(apart[key]).sum(axis=1).mean() / 2)
    for which in ("targets", "responsibilities")
    for key in (which, f"balanced_{which}")
  }
  scores = apart["scores"] / TEACHER
  return {
    "score_rms": float(np.sqrt((scores**2).mean())),
    "score_max": float(np.abs(scores).max()),
    **moved,
    **relative,
  }


def table(rows: dict[str, dict[str, float]]) -> str:
  lines = ["| precision | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
  for name, found in rows.items():
    lines.append(f"| {name} | " + " | ".join(f"{found[k]:.0e}" for k in COLUMNS.values()) + " |")
  return "\n".join(lines)


def main() -> None:
  argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  ).parse_args()
  drawn = draw(0)
  exact = step(lambda a, b: a @ b.T, *(x.astype(np.float64) for x in drawn))
  rows = {name: compared(step(product, *drawn), exact) for name, product in PRODUCTS.items()}
  sizes = {"prototypes": NUM, "dim": DIM, "rows": ROWS, "seed": 0}
  RESULTS.write_text(json.dumps({"sizes": sizes, "errors": rows}, indent=1) + "\n")
  print(table(rows))


if __name__ == "__main__":
  main()
