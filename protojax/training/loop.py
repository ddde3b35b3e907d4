"""The training loop: build, restore, then save / next / step / log / evaluate."""

import contextlib
import time
from collections.abc import Callable

import jax
from absl import logging

from protojax import errors, program_log, progress, resolving
from protojax.data import cache
from protojax.training import (
  agreement,
  checkpoint,
  console,
  continuation,
  data_settings,
  datasets,
  evaluation,
  export,
  lock,
  opening,
  origin,
  programs,
  sharding,
  stopping,
)
from protojax.training import workdir as workdirs


def _no_batches():
  """What `Program.batches` gives where no probe has batches of its own."""
  while True:
    yield None, (), 0.0


def _timed(step_fn, state, batch, probe_batch):
  """(state, metrics, seconds) of a step that nothing else is waited for with."""
  jax.block_until_ready((state, batch, probe_batch))
  begun = time.perf_counter()
  state, metrics = jax.block_until_ready(step_fn(state, batch, probe_batch))
  return state, metrics, time.perf_counter() - begun


def run(config, workdir: str, *, report: Callable | None = None) -> dict[str, float]:
  """Trains to `config.num_steps`, resuming what the workdir holds.

  Args:
    config: unresolved config, as from `config.default()` and flags.
    workdir: folder of this run.
    report: called by every process when the result is written, see
      `reports.of_run.after_training`; None writes no page.

  Returns:
    The measures of the final state, as written to eval/final/result.json.

  Raises:
    UserError: for a mistake of the user; nothing is written before the step has been traced.
    errors.Interrupted: on SIGTERM, SIGHUP or Ctrl-C, after a checkpoint was written.
    KeyboardInterrupt: on a Ctrl-C before or after the steps; it says so where all are saved.
  """
  with program_log.Heard() as heard:
    return _run(config, workdir, report, heard)


def _run(config, workdir, report, heard) -> dict[str, float]:
  started = time.time()
  resolving.check(config)
  config = data_settings.recalled(config, workdir)
  train_source, bank, test = datasets.of_run(config)
  config = resolving.resolve(config, len(train_source))
  config = data_settings.completed(config, train_source)
  agreement.require_same(config)
  if config.init_from:
    origin.require_same(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  sharding.rows_of_process(config.batch_size, mesh)
  if test is not None:
    if config.probe.batch_size:
      sharding.rows_of_process(config.probe.batch_size, mesh, "probe.batch_size")
    if config.probe.k > (rows := min(config.probe.limit or len(bank), len(bank))):
      raise errors.UserError(
        f"probe.k={config.probe.k} neighbours of a bank of {rows} images: lower config.probe.k"
      )
  program = programs.Program(config, bank.num_classes if test is not None else 0)
  lowered = program.lower()
  to_cache = cache.choose(
    config.data.cache,
    [data for data in (train_source, bank, test) if data is not None],
    image_size=config.data.image_size,
    images_drawn=config.num_steps * config.batch_size,
    mesh=mesh,
  )
  start_from = None
  if config.init_from:
    stats = program.abstract.carry.get("batch_stats", {}).get("student", {})
    path = origin.path_of(config)
    start_from = export.load(path, program.abstract.encoder), export.load_stats(path, stats)

  def seconds():
    return before + time.time() - started

  def save(step, state, *, unseen=False):
    log.sync()
    checkpoints.save(step, state, workdirs.metadata(config, seconds(), unseen=unseen))
    workdirs.export_encoder(folder, step, state, program)

  def unless_stopped(step, state, work, *, unseen=False):
    """What `work` gives; asked to stop meanwhile, state `step` is saved instead."""
    try:
      with progress.watched(stop.look):
        return work()
    except stopping.Asked:
      save(step, state, unseen=unseen)
      raise errors.Interrupted(step, stop.number) from None

  def taken(step, stream):
    """The next batch; an error that keeps it from coming, with what there is to go on from."""
    try:
      return next(stream)
    except errors.UserError as error:
      raise errors.UserError(f"step {step}: {error}; {checkpoint.intact(folder)}") from None

  def look(done, state):
    """Measures a state, if it is one that is looked at."""
    watch, evaluate = done % config.monitor.every == 0, done % config.eval_every == 0
    if done == config.num_steps or not (watch or evaluate):
      return
    log.flush()
    measures = unless_stopped(
      done,
      state,
      lambda: view.monitor(state) | (view.evaluate(state) if evaluate else {}),
      unseen=True,
    )
    log.measures(done, measures)
    if config.monitor.stop_on_collapse and checkpoint.of_first(
      lambda: "collapsed" if log.verdict(done).collapsed else None
    ):  # of all processes alike, though their last digits may differ
      save(done, state)
      raise errors.UserError(
        f"stopped at step {done}, {log.verdict(done).label}: {log.verdict(done).sentence} "
        "(config.monitor.stop_on_collapse=False goes on)"
      )

  # The order inside the loop is the meaning of a checkpoint: state n is saved before batch n is
  # taken, so that n alone says where to go on. A refresh belongs to the step after it: it comes
  # between the two and is done again by a run that goes on from n.
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock.held(workdirs.place(workdir, config)))
    folder = workdirs.claim(workdir, config)
    checkpoints = checkpoint.Checkpoints(folder, keep=config.keep_checkpoints)
    restored = checkpoints.restore_latest(program.restore_target)
    if restored is None:
      start, state, before = 0, program.init(config.seed), 0.0
      if start_from is not None:
        state = workdirs.warm_start(state, *start_from)
    else:
      start, state, metadata = restored
      before = metadata.get("seconds", 0.0)
      state, changed = program.with_own_probe(state, metadata["config"]["probe"])
      if changed:
        logging.info("%s at step %d; measured on %s from here on", changed, start, bank.name)
    stack.enter_context(workdirs.reporting(folder))
    stack.enter_context(contextlib.closing(checkpoints))
    room = None
    if start < config.num_steps:  # refused before the log is cut back to the checkpoint
      room = checkpoints.room(program.abstract)
    extended = continuation.extend(folder, config, start)
    log = console.RunLog(folder, config, start=start, describe=train_source.describe)
    log = stack.enter_context(log)
    stack.enter_context(heard.to(log.copy))
    if restored is not None:
      log.resumed(start, metadata.get("devices"))
    log.lines(extended)
    if start == config.num_steps and (result := workdirs.read_result(folder)):
      if report is not None and workdirs.page_is_due(folder):  # it was ended in between
        arrays = workdirs.read_arrays(folder)
        report(folder, program, state, arrays, bank=bank, train=train_source)
      log.summary(result, bank=bank)
      return result
    log.lines(opening.lines(program, train=train_source, bank=bank, test=test, folder=folder))
    if room is not None:
      log.lines(opening.disk(*room, keep=config.keep_checkpoints))
    cached = {data: program.load(data) for data in to_cache}
    view = evaluation.Snapshot(program, bank=bank, test=test, cached=cached)
    if start == 0:
      log.floors(view.floors(state))
    batches = program.batches(
      train_source,
      seed=config.seed,
      step=start,
      batch_size=config.batch_size,
      keys=program.keys,
      cached=cached.get(train_source),
    )
    probe_batches = _no_batches()
    if program.probe_apart:
      probe_batches = program.batches(
        bank,
        seed=config.seed + 1,
        step=start,
        batch_size=config.probe.batch_size,
        keys=("image", "size", "label"),
        cached=cached.get(bank),
      )
    for stream in (batches, probe_batches):
      stack.callback(stream.close)
    with progress.during("compiling the step"):
      step_fn = lowered.compile()
    log.lines(opening.memory(step_fn, mesh))
    plan = None
    if train_source not in cached and not train_source.in_memory:
      plan = program.decoders(train_source, batch_size=config.batch_size)
    stop = stack.enter_context(stopping.Stop())
    if restored is not None and workdirs.unseen(folder, metadata, start):
      look(start, state)
    for step in range(start, config.num_steps):
      if step > start and step % config.save_every == 0:
        save(step, state)
      if stop.asked(step):
        save(step, state)
        raise errors.Interrupted(step, stop.number)
      if program.refresh and step >= program.method.refresh_from:
        if step % config.steps_per_epoch == 0:
          embeddings = unless_stopped(
            step, state, lambda state=state: view.embeddings(state, train_source)
          )
          if step > start:  # the clusters take the state's place, and nothing stops them
            save(step, state)
          with progress.during("clustering the embeddings"):
            state = jax.block_until_ready(program.refresh(state, *embeddings))
      with jax.transfer_guard("disallow"):
        batch, skipped, waited = taken(step, batches)
        probe_batch, _, waited_too = taken(step, probe_batches)
        if plan and step == start + 2:  # the first ones may still be preparing something
          state, metrics, alone = _timed(step_fn, state, batch, probe_batch)
          log.lines([plan.beside(config.batch_size / alone)])
        else:
          state, metrics = step_fn(state, batch, probe_batch)
        log.step(step, metrics, skipped=skipped, waited=waited + waited_too)
      checkpoints.check_errors()
      look(step + 1, state)
    # Saved before it is measured: a stop from here on costs no step.
    save(config.num_steps, state)
    checkpoints.wait()
    if stop.ended(config.num_steps):
      raise errors.Interrupted(config.num_steps, stop.number, trained=True)
    try:
      measures, arrays = view.final(state)
      log.measures(config.num_steps, measures)
      result = log.result | {"step": config.num_steps, "seed": config.seed, "seconds": seconds()}
      if jax.process_index() == 0:
        workdirs.write_result(folder, result, arrays, config, bank=bank, test=test)
      if report is not None:
        report(folder, program, state, arrays, bank=bank, train=train_source)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(
        f"interrupted after step {config.num_steps}{errors.TRAINED}"
      ) from None
    log.summary(result, bank=bank)
  return result
