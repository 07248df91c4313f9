"""The training loop: one function for every task.

Plain torch.distributed: under torchrun it runs on every rank, else on one process. Batches and random numbers are a
function of (seed, step, position), independent of interruptions. Losses are accumulated on the GPU, and the skipped
flag of a step is read while the next one runs, so there is no synchronization between two rows of the log. Only before
the first row, the numbers so far are read after `PARTIAL_ROWS` steps.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from vqpipe import distributed
from vqpipe.errors import ConfigError
from vqpipe.progress import Throttle
from vqpipe.training.callbacks import Callback, CallbackList
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TrainConfig
from vqpipe.training.networks import compiled_graphs
from vqpipe.training.nonfinite import BatchNormStatistics, NonfiniteSteps
from vqpipe.training.optim import WeightEma, learning_rate, set_learning_rate
from vqpipe.training.running_metrics import ResultT, Row
from vqpipe.training.task import BatchT, Stream, Task

STOP_EVERY = 5
"""Steps between two checks of `stop_requested` on several ranks: each check waits for the GPUs."""
PARTIAL_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Steps of this process after which its numbers are displayed, until the first row of the log."""


def train(
    task: Task[BatchT, ResultT],
    config: TrainConfig,
    stream: Stream[BatchT],
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    interruptible: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> TrainState:
    """Train to `config.steps` steps, resuming from the newest checkpoint in `run_dir`. Every rank calls it.

    Returns the state: `state.weight_ema.network` is to be published (`state.published()` are its weights). If
    `stop_requested()` is true on any rank after a step, a checkpoint is saved and the state returned early; on several
    ranks this is checked every STOP_EVERY steps. A callback ends the run likewise by setting `state.stop`.
    The loop waits for a batch inside `interruptible()`, which a request to stop may leave early.

    Raises:
        NumericError: too many steps in a row without a finite gradient; the network without one did not move in them.
        ConfigError: the batch does not divide, the seed is not in [0, 2**32), or the task or this machine does not
            offer a setting.
        ArtifactError: the checkpoints are damaged or another run's, or cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"the seed {seed} is not in [0, 2**32)", "Choose another seed")
    state = initial_state(task, config, device)
    state.resume(run_dir)
    hooks = CallbackList(callbacks)
    try:
        hooks.on_start(state)
        task.connect()
        metrics, nonfinite = state.metrics, NonfiniteSteps(state, config.max_nonfinite_steps, hooks.on_skipped_step)
        statistics, batches = BatchNormStatistics(*task.networks.values()), stream.from_sample(state.images_seen)
        metrics.start_clock()
        started, logged, previews = state.step, False, Throttle(first=15.0, every=60.0, growth=1.5, longest=1800.0)
        while state.step < config.steps:
            batch = None
            with metrics.waiting(), interruptible():
                batch = next(batches)
            if batch is None:
                nonfinite.flush()
                state.save(run_dir, keep_every=config.keep_every)
                break
            state.add_skipped(batch.skipped)
            seed_step(seed, state.step)
            statistics.remember()
            rate = learning_rate(state.step, config)
            for optimizer in task.optimizers.values():
                set_learning_rate(optimizer, rate)
            output = task.step(batch, state.step)
            statistics.restore(output.nonfinite)
            task.after_step(output)
            state.weight_ema.update(state.step)
            metrics.update(output)
            nonfinite.add(state.step, output.nonfinite, batch.keys)
            state.step += 1
            state.images_seen += config.global_batch_size
            row, sample = due(state, config, config.log_every), due(state, config, config.sample_every)
            validate = due(state, config, config.validate_every or config.sample_every)
            partial = not (row or logged) and state.step - started in PARTIAL_ROWS
            if row:
                nonfinite.flush()
                hooks.on_log(log_row(state, config, rate))
                metrics.reset()
                logged = True
            elif partial:
                hooks.on_partial_row(log_row(state, config, rate))
            with metrics.untimed(row or partial or sample or validate):
                if sample:
                    with previews.timed():
                        hooks.on_sample(state.step, state.weight_ema.network)
                elif (row or partial) and distributed.any_rank(distributed.is_main() and previews.due(), task.device):
                    with previews.timed():
                        hooks.on_preview(state.step, state.weight_ema.network)
                if validate:
                    hooks.on_validate(state.step, state.weight_ema.network)
                hooks.on_step_end(state)
            stop = state.stop or stop_on_any_rank(state.step, stop_requested, task.device)
            if stop or (state.step % config.save_every == 0 and state.step < config.steps):
                nonfinite.flush()
                with metrics.untimed():
                    state.save(run_dir, keep_every=config.keep_every)
            if stop:
                break
    finally:
        hooks.on_end()
    return state


def initial_state(task: Task[BatchT, ResultT], config: TrainConfig, device: torch.device) -> TrainState:
    """The state of a run at step 0, its networks prepared for training."""
    config.share(distributed.world_size())
    average = WeightEma(task.networks["model"], config.weight_ema)  # copied before the network is prepared
    task.prepare(config, device, average.network)
    return TrainState(task.networks, task.optimizers, average, task.auxiliary, task.running_metrics())


def due(state: TrainState, config: TrainConfig, every: int) -> bool:
    """Whether the step is a multiple of `every` or the last step."""
    return state.step % every == 0 or state.step == config.steps


def log_row(state: TrainState, config: TrainConfig, rate: float) -> Row:
    """A row of the log: counters, then the running metrics."""
    row: Row = {"step": state.step, "images_seen": state.images_seen, "learning_rate": rate}
    row |= state.metrics.row(config.global_batch_size) | {"nonfinite_steps": state.nonfinite_steps}
    return row | ({"compiled_graphs": compiled_graphs()} if config.compile else {})


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global generators: random numbers of a step are a function of (seed, step, rank).

    They are hashed, because the generator of the CPU depends on the lower 32 bits alone.
    """
    mixed = np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def stop_on_any_rank(step: int, stop_requested: Callable[[], bool], device: torch.device) -> bool:
    """Whether a stop was requested on any rank; with several ranks, checked every STOP_EVERY steps."""
    if distributed.world_size() == 1:
        return stop_requested()
    return step % STOP_EVERY == 0 and distributed.any_rank(stop_requested(), device)
