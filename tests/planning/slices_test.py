"""Steps of published recipes, cut to one block, compiled for slices of TPUs that nobody has here.

With PROTOJAX_TEST_ALL alone, where libtpu is installed: each takes a minute or more.
"""

import importlib.util
import json
import os

import guards
import pytest

from protojax import plan
from protojax.planning import report, targets

pytestmark = [
  pytest.mark.skipif("PROTOJAX_TEST_ALL" not in os.environ, reason="not without --all"),
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu"),
  pytest.mark.xdist_group("slices"),
]
_ONE_BLOCK = ("--config.model.depth=1", "--config.batch_size=512")


@pytest.mark.parametrize(
  ("recipe", "slice_", "mesh"),
  [
    ("gmm_vit_s", "v5e:4x4", "data:16"),
    ("gmm_vit_s", "v5e:4x4", "data:4,model:4"),
    ("dino_vit_s", "v6e:4x4", "data:16"),
    ("ibot_vit_s", "v5e:4x4", "data:16"),
    ("falcon_vit_s", "v5e:4x4", "data:8,model:2"),
  ],
)
def test_work_memory_messages_and_placement_on_a_slice_are_as_stored(recipe, slice_, mesh):
  asked = [f"--config={recipe}", f"--topology={slice_}", f"--mesh={mesh}", *_ONE_BLOCK]
  planned = plan.plan(asked)
  step = planned.step
  json.dumps(report.as_json(planned), allow_nan=False)
  assert planned.predicted.step > 0 and not step.counts.unknown_loops
  found = guards.numbers(step.memory, step.counts) | {"split": guards.split(step.places)}
  key = f"{recipe} {slice_} {mesh}"
  if not guards.is_stored(key) and "PROTOJAX_WRITE_GUARDS" not in os.environ:
    pytest.skip("it compiles and is predicted; numbers to compare with were never stored")
  guards.check(key, found, "jax", "libtpu")


@pytest.mark.parametrize(("slice_", "chips"), [("v5e:1x1", 1), ("v5e:2x2", 4), ("v5p:2x2x1", 4)])
def test_the_narrowest_slices_are_found(slice_, chips):
  assert len(targets.of_topology(slice_).devices) == chips
