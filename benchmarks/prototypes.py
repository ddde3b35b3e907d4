"""What prototypes cost, all at once and by blocks: python -m benchmarks.prototypes --num 4096 65536

  python -m benchmarks.prototypes --kind mixture learned --num 4096 16384 65536 262144 1048576 \
    --runs=0 --blocks 128 4096 --json=docs/results/prototypes.json
  python -m benchmarks.prototypes --draw=docs/results/prototypes.json --figure=docs/prototypes.png

For each number of prototypes, the part of a training step that meets them, without an encoder: the
targets of a teacher's two views by Sinkhorn, the cross entropy of V views with its gradient and,
for a mixture, the EM update, in place. Prints one JSON line a row: the memory that the compiled
program asks for beside its arguments, which are prototypes, statistics and embeddings
("temporary_bytes", counted by XLA, no run), and the median milliseconds of runs taken in turn,
block after block, so that a drifting machine drifts for all of them. --runs=0 counts memory alone,
at sizes that the machine could not hold. A row says under "compared" whether its block is "all at
once", "asked for" or "chosen", as a run without `method.block` would.
"""

import argparse
import functools
import itertools
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.figure

from protojax import files, losses
from protojax.prototypes import mixture, soft, streaming, weight_norm

_KINDS = ("mixture", "learned")


def program(kind: str, num: int, block: int, rows: int, views: int, dim: int):
  """(step of (state, student [B, V, D], teacher [B, 2, D]), state of random prototypes)."""
  options = mixture.Options(block=block)
  em = mixture.online_em(num, dim, horizon_steps=1000.0, balanced=True, options=options)

  def loss(student, state, teacher):
    matrix = state.means if kind == "mixture" else weight_norm.rows(state)
    seen = jax.lax.stop_gradient(soft.Scores(teacher, matrix, block=block)).over(0.04)
    q = soft.balanced(seen)
    p = soft.softmax(soft.Scores(student, matrix, block=block).over(0.1))
    beside = soft.compare_views(p, q)
    metrics = beside.entropy.mean(), losses.entropy(beside.mean)
    return losses.mean_over_other_views(beside.cross_entropy), metrics

  def step(state, student, teacher):
    if kind == "mixture":
      value, gradient = jax.value_and_grad(loss, has_aux=True)(student, state, teacher)
      # As in a training step: the loss is done with the prototypes before they move in place.
      done = (jnp.linalg.norm(gradient) < 0).astype(jnp.float32)
      return em.update(state, teacher + done)[0], value, gradient
    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    value, (gradient, of_state) = both(student, state, teacher)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, state, of_state)
    return moved, value, gradient

  def init(key):
    return em.init(key) if kind == "mixture" else weight_norm.init(key, num, dim)

  return jax.jit(step, donate_argnums=0), init


def measure(kind: str, num: int, blocks, rows: int, views: int, dim: int, runs: int) -> list[dict]:
  """A row for each of `blocks`; one that is None is chosen as a training run would."""

  def draw(key, views):
    return losses.l2_normalize(jax.random.normal(key, (rows, views, dim)))

  found, ready = [], []
  for asked in blocks:
    block = streaming.block_size(asked, rows * views, num)
    step, init = program(kind, num, block, rows, views, dim)
    shapes = (
      jax.eval_shape(functools.partial(draw, views=v), jax.random.key(0)) for v in (views, 2)
    )
    start = time.perf_counter()
    compiled = step.lower(jax.eval_shape(init, jax.random.key(0)), *shapes).compile()
    memory = compiled.memory_analysis()
    found.append(
      {
        "kind": kind,
        "compared": "chosen" if asked is None else "asked for" if asked else "all at once",
        "prototypes": num,
        "dim": dim,
        "images": rows,
        "views": views,
        "block": block,
        "device": jax.devices()[0].device_kind,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 2),
      }
    )
    ready.append((compiled, init))
  if not runs:
    return found
  student, teacher = draw(jax.random.key(1), views), draw(jax.random.key(2), 2)
  states = [jax.jit(init)(jax.random.key(0)) for _, init in ready]
  times = [[] for _ in ready]
  for run in range(runs + 1):  # the first is not counted
    for i, (compiled, _) in enumerate(ready):
      start = time.perf_counter()
      states[i], value, _ = compiled(states[i], student, teacher)
      jax.block_until_ready((states[i], value))
      if run:
        times[i].append(1e3 * (time.perf_counter() - start))
  for row, of_row in zip(found, times, strict=True):
    row["milliseconds"] = round(statistics.median(of_row), 2)
  return found


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """A picture of what `measure` counted: memory beside the arguments over K, a panel a kind."""
  kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in rows)]
  figure = matplotlib.figure.Figure(figsize=(4.5 * len(kinds), 3.6), layout="constrained")
  for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
    own = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["prototypes"])
    first = [r for r in own if r["compared"] == "all at once"]
    state = [r["argument_bytes"] for r in first]
    axes.plot([r["prototypes"] for r in first], state, ":", color="gray", label="arguments")
    for compared, label in (("all at once", "all at once"), ("asked for", "in blocks")):
      for block in sorted({r["block"] for r in own if r["compared"] == compared}):
        line = [r for r in own if (r["compared"], r["block"]) == (compared, block)]
        x, y = ([r[key] for r in line] for key in ("prototypes", "temporary_bytes"))
        axes.plot(x, y, "o-", label=label + f" of {block:,}" * (block > 0))
    axes.set(xscale="log", yscale="log", title=kind, xlabel="prototypes", ylabel="bytes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  figure.savefig(path, dpi=110, format="png")


def _commit() -> str:
  """Of the code that runs, or ""."""
  here = pathlib.Path(__file__).parent
  ask = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=7"]
  return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--num", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
  parser.add_argument("--kind", choices=_KINDS, nargs="+", default=["mixture"])
  parser.add_argument(
    "--blocks", type=int, nargs="*", default=[], help="further sizes of blocks, divisors of --num"
  )
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--views", type=int, default=10)
  parser.add_argument("--dim", type=int, default=256)
  parser.add_argument("--runs", type=int, default=7)
  parser.add_argument("--json", type=pathlib.Path, help="file to write all rows to, for --draw")
  parser.add_argument("--draw", type=pathlib.Path, help="draw memory from such a file, run nothing")
  parser.add_argument("--figure", type=pathlib.Path, help="png that --draw makes")
  args = parser.parse_args(argv)
  if bool(args.draw) != bool(args.figure):
    parser.error("--draw and --figure go together")
  if args.draw and not args.draw.is_file():
    parser.error(f"--draw={args.draw}: there is no such file")
  if args.draw:
    draw(json.loads(args.draw.read_text())["rows"], args.figure)
    return
  for num, block in itertools.product(args.num, args.blocks):
    if block < 1 or num % block:
      parser.error(f"--blocks {block} does not cut --num {num} into equal blocks: take a divisor")
  rows = []
  for kind, num in itertools.product(args.kind, args.num):
    sizes = args.images, args.views, args.dim, args.runs
    for row in measure(kind, num, [0, None, *args.blocks], *sizes):
      print(json.dumps(row), flush=True)
      rows.append(row)
  if args.json:
    command = ["python", "-m", "benchmarks.prototypes", *(sys.argv[1:] if argv is None else argv)]
    about = {"command": shlex.join(command), "jax": jax.__version__, "commit": _commit()}
    files.write_json(args.json, about | {"rows": rows})


if __name__ == "__main__":
  main()
