"""Programs small enough to count by hand, those of a TPU as libtpu printed them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protojax.planning import chips, counting, hlo


def _counts(fn, *shapes, **options):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return counting.count(jax.jit(fn, **options).lower(*arrays).compile().as_text())


def _module(*lines, computations=""):
  body = "\n".join(f"  {line}" for line in lines)
  return f"HloModule m\n\n{computations}\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}\n"


def test_a_product_counts_two_a_multiply_add_and_its_three_matrices():
  counts = _counts(lambda a, b: a @ b, (64, 32), (32, 16))
  assert counts.flops == {"f32 x f32": 2 * 64 * 32 * 16}
  assert counts.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_precision_that_is_asked_for_is_read():
  counts = _counts(lambda a, b: jnp.dot(a, b, precision="highest"), (64, 32), (32, 16))
  assert counts.flops == {"f32 x f32, highest": 2 * 64 * 32 * 16}


def test_a_fusion_reads_its_operands_and_writes_its_result_once():
  counts = _counts(lambda a, b: jnp.tanh(a * b + a) * 2, (512, 256), (512, 256))
  assert counts.bytes == 4 * 3 * 512 * 256 and not counts.flops


def test_a_loop_counts_as_often_as_it_runs_and_reads_the_slices_it_takes():
  def chain(x, weights):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

  counts = _counts(chain, (64, 64), (7, 64, 64))
  assert counts.flops == {"f32 x f32": 7 * 2 * 64**3} and not counts.unknown_loops
  # A round has at least the product, tanh in place and its weights: never all seven of them.
  assert 7 * 4 * 5 * 64**2 <= counts.bytes <= 7 * 4 * 10 * 64**2


def test_nested_loops_multiply_and_a_while_of_unknown_length_says_so():
  def both(x):
    def outer(c, _):
      return jax.lax.fori_loop(0, 3, lambda i, y: y @ x, c), None

    x = jax.lax.scan(outer, x, None, length=5)[0]
    return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ x, x)

  counts = _counts(both, (64, 64))
  assert counts.flops == {"f32 x f32": (5 * 3 + 1) * 2 * 64**3} and counts.unknown_loops == 1


@pytest.mark.parametrize(("stride", "pairs"), [(1, 8 * 3 - 2), (2, 4 * 3 - 1)])
def test_a_convolution_counts_the_taps_that_meet_the_input(stride, pairs):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  counts = _counts(convolve, (4, 8, 8, 16), (3, 3, 16, 32))
  assert sum(counts.flops.values()) == 2 * 4 * 16 * 32 * pairs**2


def test_collectives_say_kind_size_group_and_origin():
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

  def place(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  def step(x):
    with jax.named_scope("update"):
      total = x.sum(axis=0)
    return total, x

  counts = _counts(
    step, (64, 16), in_shardings=place("data"), out_shardings=(place(), place(None, "model"))
  )
  kinds = {c.kind: c for c in counts.collectives}
  summed = kinds.pop("all-reduce")
  assert (summed.bytes, summed.group, summed.times) == (4 * 16, 4, 1)
  assert summed.origins == {"update": 64} and not summed.asynchronous
  assert kinds and sum(c.times for c in counts.collectives) == len(counts.collectives)


def test_collectives_in_a_loop_count_as_often_as_it_runs():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))

  def chain(x):
    def round_of(c, _):
      return c / (1 + (x * c[None]).sum(axis=0)), None

    return jax.lax.scan(round_of, jnp.ones(16), None, length=6)[0]

  (one,) = _counts(chain, (64, 16), in_shardings=rows).collectives
  assert (one.kind, one.bytes, one.group, one.times) == ("all-reduce", 64, 8, 6)


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("replica_groups={{0,1,2},{3,4,5}}", 3),
    ("replica_groups=[2,4]<=[8]", 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2,'axis_1'}", 4),
    ("source_target_pairs={{0,1},{1,0}}", 2),
  ],
)
def test_groups_are_read_in_each_of_their_notations(groups, size):
  text = _module(
    "%p = f32[8]{0} parameter(0)", f"ROOT %r = f32[8]{{0}} all-reduce(%p), {groups}, to_apply=%add"
  )
  (one,) = counting.count(text).collectives
  assert one.group == size


def test_what_lies_on_the_chip_moves_nothing_and_tiles_are_whole():
  """As libtpu prints it: a prefetch, a fusion of two, a copy out of the chip's own memory."""
  tiled = "f32[6,200,197]{2,1,0:T(8,128)"
  text = _module(
    f"%p = {tiled}}} parameter(0)",
    f"%s = ({tiled}S(1)}}, {tiled}}}, u32[]{{:S(2)}}) copy-start(%p)",
    f"%d = {tiled}S(1)}} copy-done(%s)",
    f"%e = {tiled}S(1)}} exponential(%d)",
    f"ROOT %f = {tiled}}} add(%e, %d)",
  )
  counts = counting.count(text)
  assert counts.bytes == 2 * 4 * 6 * 200 * 256  # 197 columns lie in 256


def test_an_update_in_place_writes_what_is_new():
  def put(x, row):
    return jax.lax.dynamic_update_slice(x, row, (3, 0))

  counts = _counts(put, (4096, 256), (2, 256), donate_argnums=0)
  assert counts.bytes <= 4 * 256 * 2 * 4


def test_an_update_in_place_that_is_fused_writes_what_is_new():
  fused = """%fused (p0: f32[4096,256], p1: f32[2,256], p2: s32[]) -> f32[4096,256] {
  %p0 = f32[4096,256]{1,0} parameter(0)
  %p1 = f32[2,256]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %e = f32[2,256]{1,0} exponential(%p1)
  ROOT %u = f32[4096,256]{1,0} dynamic-update-slice(%p0, %e, %p2, %p2)
}
"""
  text = _module(
    "%x = f32[4096,256]{1,0} parameter(0)",
    "%row = f32[2,256]{1,0} parameter(1)",
    "%i = s32[] parameter(2)",
    "ROOT %f = f32[4096,256]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%fused",
    computations=fused,
  )
  assert counting.count(text).bytes == 2 * 4 * 2 * 256 + 4  # a row read and written, its place


def test_a_tpu_loop_runs_as_often_as_its_condition_says():
  """Without XLA's note: the bound is carried beside the counter, from the tuple it starts with."""
  body = """%body (t: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %t = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %r = (s32[], f32[8,8]{1,0}, s32[]) tuple(%j, %y, %n)
}

%below (p: s32[], q: s32[]) -> pred[] {
  %q = s32[] parameter(1)
  %p = s32[] parameter(0)
  ROOT %c = pred[] compare(%p, %q), direction=LT
}

%condition (t: (s32[], f32[8,8], s32[])) -> pred[] {
  %t = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %f = pred[] fusion(%i, %n), kind=kLoop, calls=%below
}
"""
  text = _module(
    "%x = f32[8,8]{1,0} parameter(0)",
    "%zero = s32[] constant(2)",
    "%start = s32[] copy(%zero)",
    "%n = s32[] constant(11)",
    "%t = (s32[], f32[8,8]{1,0}, s32[]) tuple(%start, %x, /*index=2*/%n)",
    "ROOT %w = (s32[], f32[8,8]{1,0}, s32[]) while(%t), condition=%condition, body=%body",
    computations=body,
  )
  counts = counting.count(text)
  assert counts.flops == {"f32 x f32": 9 * 2 * 8**3} and not counts.unknown_loops


def test_a_tpu_product_of_a_batch_is_a_dilated_convolution():
  """The scores of attention, [4, 5, 2, 16] x [4, 5, 2, 16] -> [4, 2, 5, 5]."""
  text = _module(
    "%q = f32[4,5,2,16]{3,1,2,0:T(8,128)} parameter(0)",
    "%k = f32[4,5,2,16]{3,1,2,0:T(8,128)} parameter(1)",
    "ROOT %s = f32[4,2,5,5]{2,3,1,0:T(8,128)} convolution(%q, %k), "
    "window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=0b1f_0o1i->01bf, "
    "operand_precision={highest,default}",
  )
  assert counting.count(text).flops == {"f32 x f32, highest": 2 * 4 * 2 * 5 * 5 * 16}


_KERNELS = {
  "a Pallas kernel with an estimate": (
    "f32[256,256]{1,0}",
    ("bf16[256,64]{1,0}", "bf16[64,256]{1,0}"),
    'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"xyz",'
    '"cost_estimate":{"flops":"1234","transcendentals":"0","bytes_accessed":"1000"}}}',
    {"bf16 x bf16": 1234},
    4 * 256**2 + 2 * 2 * 256 * 64,
  ),
  "cuBLAS": (
    "(f32[3,8,4]{2,1,0}, s8[33554432]{0})",
    ("f32[3,8,16]{2,1,0}", "f32[3,16,4]{2,1,0}"),
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"beta":0,'
    '"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":'
    '["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"precision_config":'
    '{"operand_precision":["HIGHEST","HIGHEST"]}}}',
    {"f32 x f32, highest": 2 * 3 * 8 * 4 * 16},
    4 * 3 * (8 * 4 + 8 * 16 + 16 * 4),
  ),
  "cuDNN, of the input": (
    "(f32[4,8,8,16]{3,2,1,0}, u8[1000000]{0})",
    ("f32[4,8,8,32]{3,2,1,0}", "f32[32,3,3,16]{3,2,1,0}"),
    "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, "
    'custom_call_target="__cudnn$convBackwardInput"',
    {"f32 x f32": 2 * 4 * 16 * 32 * 22**2},
    4 * (4 * 64 * 48 + 32 * 9 * 16),
  ),
}


@pytest.mark.parametrize("name", _KERNELS)
def test_kernels_that_say_what_they_compute_are_counted(name):
  """As XLA prints them; those of GPUs have not been compiled here."""
  result, operands, attributes, flops, moved = _KERNELS[name]
  lines = [f"%p{i} = {operand} parameter({i})" for i, operand in enumerate(operands)]
  text = _module(*lines, f"ROOT %c = {result} custom-call(%p0, %p1), {attributes}")
  counts = counting.count(text)
  assert counts.flops == flops and counts.bytes == moved and not counts.custom_calls
  assert counting.count(text.replace("custom_call_target", "x").replace("flops", "y")).flops == {}


def test_messages_ahead_of_time_run_beside_and_count_once():
  text = _module(
    "%p = f32[8]{0} parameter(0)",
    "%s = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}",
    "ROOT %d = f32[32]{0} all-gather-done(%s)",
  )
  counts = counting.count(text)
  (one,) = counts.collectives
  assert (one.kind, one.bytes, one.asynchronous) == ("all-gather", 128, True)
  assert counts.bytes == 4 * (8 + 32)


def test_a_message_that_is_chained_through_fusions_counts_once():
  """As on a v5e: each fusion works and moves a part of it on, and names the whole."""
  channels = (3, 3, 3, 4, 4)
  fused = "".join(
    f"%fused.{i} (q: f32[8]) -> f32[32] {{\n"
    "  %q = f32[8]{0} parameter(0)\n"
    f"  ROOT %g = f32[32]{{0}} all-gather(%q), channel_id={channel}, "
    f'replica_groups=[1,4]<=[4], frontend_attributes={{chain_id="{channel}"}}\n}}\n\n'
    for i, channel in enumerate(channels)
  )
  lines = ["%p = f32[8]{0} parameter(0)"]
  lines += [f"%f{i} = f32[32]{{0}} fusion(%p), kind=kCustom, calls=%fused.{i}" for i in range(5)]
  text = _module(*lines[:-1], f"ROOT {lines[-1]}", computations=fused)
  found = [(one.kind, one.bytes, one.asynchronous) for one in counting.count(text).collectives]
  assert found == 2 * [("all-gather", 128, True)]
  assert len(counting.count(text.replace("chain_id", "other")).collectives) == 5


def test_products_of_split_numbers_are_as_many_as_the_tpu_makes():
  taken = {
    "bf16 x bf16": 1,
    "f32 x f32": 1,
    "f32 x f32, high": 3,
    "f32 x f32, highest": 6,
    "f32 x u8, highest": 3,
    "bf16 x f32, highest": 3,
  }
  assert {precision: chips.passes(precision) for precision in taken} == taken


def test_work_of_a_training_step_is_told_apart():
  names = {
    "jit(train_step)/augment/while/body/mul": "augment",
    "jit(train_step)/jvp(ViT)/blocks_0/mlp/erfc": "forward",
    "jit(train_step)/transpose(jvp(ViT))/norm/mul": "backward",
    "jit(train_step)/probe/transpose(jvp())/dot_general": "probe",
    "jit(train_step)/(update/reduce_sum:probe/reduce_sum)": "update",
    "state.encoder['head']['fc1']['bias']": "state",
    "broadcast.3": "other",
  }
  assert {name: counting.origin(name) for name in names} == names


_FUSED = """\
%fused (x: f32[1024], g: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %g = f32[1024]{0} parameter(1)
  %a = f32[1024]{0} multiply(%x, %g), metadata={op_name="jit(train_step)/optimizer/mul"}
  %b = f32[1024]{0} add(%a, %x), metadata={op_name="jit(train_step)/optimizer/add"}
  ROOT %c = f32[1024]{0} add(%b, %x), metadata={op_name="jit(train_step)/update/add"}
}
"""


def test_what_the_optimizer_moves_is_booked_to_it_though_xla_fuses_and_fetches():
  """The root of the fusion is the teacher's average; the slice that is fetched has no name."""
  lines = (
    '%x = f32[1024]{0} parameter(0), metadata={op_name="state.encoder"}',
    '%g = f32[1024]{0} parameter(1), metadata={op_name="state.opt_state"}',
    "%slice-start = ((f32[1024]{0}), f32[1024]{0:S(1)}, s32[]{:S(2)}) slice-start(%x)",
    "%slice-done = f32[1024]{0:S(1)} slice-done(%slice-start)",
    "%copy-start = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%g)",
    "%copy-done = f32[1024]{0:S(1)} copy-done(%copy-start)",
    "%stacked = f32[1024]{0:S(1)} negate(%slice-done)",
    "ROOT %f = f32[1024]{0} fusion(%stacked, %copy-done), kind=kLoop, calls=%fused, "
    'metadata={op_name="jit(train_step)/update/add"}',
  )
  counts = counting.count(_module(*lines, computations=_FUSED))
  assert counts.by_origin() == {"optimizer": (0.0, 3 * 4096)}
  root = _FUSED.replace(
    'op_name="jit(train_step)/optimizer/add"', 'op_name="jit(train_step)/update/sub"'
  )
  counts = counting.count(_module(*lines, computations=root))
  assert counts.by_origin() == {"update": (0.0, 3 * 4096)}


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("module @jit_f attributes {} {\n}")


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("f32[8,16]{1,0}", [512]),
    ("(s32[4]{0}, bf16[2,3]{1,0})", [16, 12]),
    ("f32[]", [4]),
    ("pred[3]{0}", [3]),
    ("s4[16]{0}", [8]),
    ("f32[32]{0:T(128)}", [512]),
    ("bf16[8,200]{0,1:T(8,128)(2,1)}", [2 * 128 * 200]),
  ],
)
def test_sizes_of_arrays(text, size):
  assert [shape.bytes for shape in hlo.shapes(text)] == size
