"""protojax plan, with the compiler's part played by small programs."""

import importlib.util
import json
import os

import guards
import jax
import jax.numpy as jnp
import pytest
import tiny

from protojax import errors, plan
from protojax.planning import advice, chips, compiled, counting, report, targets

_V5E = chips.of_kind("TPU v5 lite")
_GIB = 2**30


def _target(sides=(4, 4), chip=_V5E, devices=16):
  return targets.Target("v5e:4x4", [object()] * devices, chip, sides, False)


def _step(temporary=4 * _GIB, *, flops=1e12, moved=1e9, messages=(), batch=512, **more):
  counts = counting.Counts(
    [
      counting.Item(
        *("fusion.1", "fusion", {"bf16 x bf16": flops}, moved, 1),
        "jit(train_step)/transpose(jvp(ViT))/blocks_3/mlp/fc1/dot_general",
      )
    ],
    list(messages),
    0,
    {},
  )
  step = compiled.Step(
    config=tiny.config(batch_size=16).copy_and_resolve_references(),
    mesh={"data": 16, "model": 1},
    parts={"encoder": _GIB, "prototypes": 0, "batch": 0},
    places={"encoder/w": "", "prototypes/means": "model"},
    memory=compiled.Memory(_GIB, _GIB, _GIB, temporary),
    counts=counts,
    refused=None,
    seconds=1.0,
  )
  step.config.batch_size = batch
  return step._replace(**more)


def _said(step, target=None, other=None):
  return report.make("name", target or _target(), 1000, 10, step, other)


def test_state_results_and_what_is_temporary_add_up_to_the_peak():
  assert compiled.Memory(5, 4, 3, 10).peak == 16


def test_the_largest_batch_is_in_proportion_or_on_a_line_through_two():
  """1 GiB of state, 4 of 512 images; half of what half of them takes is there in any case."""
  one = advice.largest(_step(), 15 * _GIB)
  assert one.batch_size == 1792 and "--fit" in one.how
  two = advice.largest(_step(), 15 * _GIB, _step(3 * _GIB, batch=256))
  assert two.batch_size == 3072 and "256 and 512" in two.how
  assert advice.largest(_step(memory=None), 15 * _GIB) is None
  odd = advice.largest(_step(mesh={"data": 48, "model": 1}), 15 * _GIB)
  assert odd.batch_size == 1776


def _all_reduce(size, group=16):
  origins = {"backward": size}
  name = "jit(train_step)/transpose(jvp(ViT))/norm/mul"
  return counting.Collective("all-reduce", size, group, 1, origins, name, False)


def test_what_to_change_first_follows_from_the_bound():
  assert "products bound it" in _said(_step()).first
  memory = _said(_step(moved=1e11))
  assert memory.predicted.bound == "memory" and "config.precision=bfloat16" in memory.first
  assert "backward: ViT/blocks/mlp/fc1/dot_general" in memory.first
  network = _said(_step(messages=[_all_reduce(2_000_000_000)]))
  assert network.predicted.bound == "network" and "raise config.batch_size" in network.first
  sums = _all_reduce(10**9)._replace(origins={"update": 10**9})
  split = _said(_step(messages=[_all_reduce(2_000_000_000), sums]))
  assert "--mesh=data:4,model:4" in split.first
  half = {"data": 8, "model": 2}
  split = _said(_step(messages=[_all_reduce(2_000_000_000), sums], mesh=half))
  assert "--mesh=data:4,model:4" in split.first
  over_model = _step(messages=[_all_reduce(10**9, 4)], mesh={"data": 4, "model": 4})
  assert "config.mesh.model: lower it" in _said(over_model).first
  highest = _step()
  highest.counts.items[0].flops["f32 x f32, highest"] = 1e12
  assert "config.method.precision=high (" in _said(highest).first
  highest.config.method.precision = "high"  # what is left is none of the prototypes'
  assert "that is as it should be" in _said(highest).first
  assert "remat=True" in _said(_step(40 * _GIB)).first
  large = {"encoder": 9 * _GIB, "prototypes": 0, "batch": 0}
  assert "the state is most of it" in _said(_step(16 * _GIB, parts=large)).first
  many = {"encoder": _GIB, "prototypes": 9 * _GIB, "batch": 0}
  assert "config.mesh.model" in _said(_step(16 * _GIB, parts=many)).first
  assert "--topology" in _said(_step(), _target(chip=None)).first


def test_a_tiny_step_is_told_in_mebibytes():
  small = compiled.Memory(3 * 2**18, 0, 0, 2**18)
  parts = {"encoder": 2**18, "prototypes": 2**17, "batch": 0}
  text = "\n".join(report.lines(_said(_step(memory=small, parts=parts))))
  for line in (
    "memory, MiB a device of 16128.00",
    "  encoder                    0.250",
    "  prototypes                 0.125",
    "  padding to tiles           0.375",
    "  peak                       1.000  0 %",
  ):
    assert line in text, text
  assert "0.000" not in text


def test_a_plan_says_its_numbers_and_all_of_it_is_json():
  planned = _said(_step(messages=[_all_reduce(88_000_000)]))
  text = "\n".join(report.lines(planned))
  for part in (
    "name on v5e:4x4: 16 devices, mesh data 16 x model 1, batch 512, 32 images a device",
    "memory, GiB a device of 15.75",
    "peak                       5.000  32 %",
    "products bf16 x bf16                       1 TFLOP                  5.08 ms",
    "all-reduce                           1       88 MB      16  backward: ViT/norm/mul",
    "bound         matrix: most of the step in operations whose products take longer than",
    f"{512 / planned.predicted.step:,.0f} of all at most",
    "assumed       1,000 images of 10 classes",
    "v5e: 197 TFLOP/s in bfloat16",
  ):
    assert part in text, text
  read = json.loads(json.dumps(report.as_json(planned), allow_nan=False))
  assert read["fits"] and read["memory"]["peak"] == 5 * _GIB
  assert read["predicted"]["bound"] == "matrix" and read["placement"] == {
    "prototypes/means": "model"
  }
  assert read["messages"][0]["bytes"] == 88_000_000


_REFUSED = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
  "required for HLO temporaries (16.25G) exceeds available HBM (15.75G). HLO module: jit_f.",
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
  "Used 16.25G of 15.75G hbm. Exceeded hbm capacity by 512.0M.",
)


def test_what_the_compiler_says_of_too_little_memory_is_read():
  for message in _REFUSED:
    assert compiled._too_much(message) == (16.25 * _GIB, 15.75 * _GIB)
  assert compiled._too_much("INTERNAL: 16G of 15G") is None


def test_a_compiler_that_is_newer_than_jax_is_a_line():
  class Newer:
    def memory_analysis(self):
      return jax.jit(lambda x: x + 1).lower(1.0).compile().memory_analysis()

    def as_text(self):
      raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Unknown opcode: mulhi")

  with pytest.raises(errors.UserError, match="libtpu is newer than it, .* pip install"):
    compiled.measure(Newer())


def test_the_step_of_what_was_typed_is_compiled_and_one_that_does_not_fit_is_a_plan(
  monkeypatch, tmp_path, capsys
):
  """The compiler is played by a refusal and a product, so that the lowering alone takes time."""
  shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  product, lowered = jax.jit(lambda x: x @ x).lower(shape).compile(), []

  def compiles(self):
    lowered.append(self.as_text())
    if len(lowered) == 1:
      raise jax.errors.JaxRuntimeError(_REFUSED[0])
    return product

  monkeypatch.setattr(jax.stages.Lowered, "compile", compiles)
  here = targets.Target("v5e:2x4", jax.devices(), _V5E, (2, 4), True)
  monkeypatch.setattr(targets, "of_topology", lambda name: here)
  flags = ["--config.model.depth=1", "--mesh=data:2,model:4", f"--json={tmp_path}/plan.json"]
  plan.main(["--config=quickstart:debug", "--topology=v5e:2x4", "--fit", *flags])

  said = capsys.readouterr().out
  assert "memory, GiB a device of 15.75" in said and "images/s" not in said
  assert "needed                    16.250  more than there is" in said
  assert "it does not fit: set config.model.remat=True" in said
  read = json.loads((tmp_path / "plan.json").read_text())
  assert not read["fits"] and read["mesh"] == {"data": 2, "model": 4} and read["devices"] == 8
  assert (read["images"], read["classes"]) == (1442, 10)
  assert read["placement"]["prototypes/means"] == "model"
  assert read["parts"]["prototypes"] < read["parts"]["encoder"]
  size = read["batch_size"]
  assert f"tensor<{size}x32x32x3xui8>" in lowered[0] and "blocks_1" not in lowered[0]
  assert f"tensor<{size // 2}x32x32x3xui8>" in lowered[1]
  assert read["largest_batch"]["batch_size"] > size


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["--topology=v9:4x4"], "topology=v9:4x4: no such slice of TPUs: give v5e:4x4"),
    (["--topology=v5e:4"], "no such slice of TPUs: one of v5e has 2 sides: v5e:1x1, v5e:2x2"),
    (["--topology=v5e:3x5"], "no such slice of TPUs: sides are even, or 1: v5e:1x1, v5e:2x2"),
    (["--topology=v5e:32x32"], "up to 256 chips"),
    (["--topology=v5p:4x4"], "one of v5p has 3 sides: v5p:2x2x1, v5p:2x2x2, v5p:2x2x4"),
    (["--mesh=4x4"], "--mesh=4x4: give the sizes of its axes"),
    (["--mesh=data:3,model:2"], "mesh.data=3 x mesh.model=2 does not cover 8"),
    (["--config.batch_size=12"], "batch_size=12 cannot be split over 8 devices (mesh.data=8)"),
    (["--topology=v5e:4x4", "--devices=8"], "--topology and --devices are two targets"),
    (["--devices=0"], "devices=0 must be 1 or more"),
    (["--config.batchsize=12"], "batch_size"),
    (["--images=10"], "more than the 10 images"),
  ],
)
def test_mistakes_are_one_line(flags, says):
  devices = [] if any(f.startswith(("--topology", "--devices")) for f in flags) else ["--devices=8"]
  with pytest.raises(errors.UserError) as caught:
    plan.plan(["--config=quickstart:debug", *devices, *flags])
  assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_settings_are_told_of_is_told_once(monkeypatch, caplog):
  monkeypatch.setattr(compiled, "compile_step", lambda *_: exit(3))
  with pytest.raises(SystemExit):
    plan.main(["--config=quickstart", "--devices=8", "--config.optim.warmup_steps=2000"])
  assert caplog.text.count("warmup_steps=2000 of 2500 steps") == 1


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=r"protojax\[plan\]"):
    targets.of_topology("v5e:4x4")


def test_libtpu_sees_neither_the_machine_nor_flags_of_other_backends(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_x=1 --xla_dump_to=d --xla_gpu_y=2")
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
  with targets.environment(here=False):
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=d"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
  assert os.environ["XLA_FLAGS"].count("--") == 3
  assert "TPU_SKIP_MDS_QUERY" not in os.environ


def test_a_guard_names_what_changed_by_more_than_a_tenth(monkeypatch, tmp_path):
  monkeypatch.setattr(guards, "_FILE", tmp_path / "guards.json")
  found = {"bytes": 1000, "messages": {"all-reduce": [4, 800]}, "split": {"prototypes/v": "model"}}
  with pytest.raises(AssertionError, match="PROTOJAX_WRITE_GUARDS|is not in guards.json"):
    guards.check("step", found, "jax")
  monkeypatch.setenv("PROTOJAX_WRITE_GUARDS", "1")
  guards.check("step", found, "jax")
  monkeypatch.delenv("PROTOJAX_WRITE_GUARDS")
  guards.check("step", found | {"bytes": 1099}, "jax")
  for other, says in (
    ({"bytes": 1101}, "step / bytes: 1,101, stored 1,000"),
    ({"messages": {"all-reduce": [5, 800]}}, r"step / messages / all-reduce \[0\]: 5, stored 4"),
    ({"messages": {"all-reduce": [4, 800], "all-gather": [1, 8]}}, "all-gather: .* stored None"),
    ({"split": {}}, "step / split / prototypes/v: None, stored model"),
  ):
    with pytest.raises(AssertionError, match=says):
      guards.check("step", found | other, "jax")
  monkeypatch.setattr(guards.importlib.metadata, "version", lambda name: "0")
  with pytest.raises(pytest.skip.Exception, match="was written with"):
    guards.check("step", found, "jax")
