"""The training loop: one readable function for whatever is trained; `task` says what that is and how a step goes.

Plain torch.distributed: started by torchrun it runs on every rank, else on one process. What a run sees and draws is a
function of (seed, step, position), never of the moment it was cut and resumed. Nothing here waits for the GPU between
two rows of the log: losses are summed there, and whether a step was skipped is read during the next.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from vqpipe import distributed
from vqpipe.training.config import TrainConfig
from vqpipe.training.history import Row
from vqpipe.training.listener import Listener, Silence
from vqpipe.training.networks import compiled_graphs
from vqpipe.training.nonfinite import NonfiniteSteps, RunningStatistics
from vqpipe.training.optimizers import WeightEma, learning_rate, set_learning_rate
from vqpipe.training.running_metrics import MadeT
from vqpipe.training.state import TrainState, seed_step
from vqpipe.training.task import BatchT, Stream, Task

STOP_EVERY = 5
"""Steps after which ranks tell each other of a signal: each time all wait for their GPUs."""


def train(
    task: Task[BatchT, MadeT],
    config: TrainConfig,
    stream: Stream[BatchT],
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    listener: Listener | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train to `config.steps` steps, resuming from the newest checkpoint in `run_dir`. Every rank calls it.

    Returns the state; `state.weight_ema.network` is what to publish (`state.published()` its weights). Where
    `stop_asked()` is true on any rank after a step, a checkpoint is saved and the state returned early.

    Raises:
        NumericError: too many steps in a row without a finite gradient; no weight moved in them.
        ConfigError: the batch does not divide, or what is asked for is not offered, by the task or by this machine.
        ArtifactError: the checkpoints are damaged or another run's, or the disk takes no more of them.
    """
    listener = listener or Silence()
    state = begin(task, config, device)
    state.resume(run_dir)
    listener.start(state)
    task.connect()
    window, nonfinite_steps = state.window, NonfiniteSteps(state, config.max_nonfinite_steps, listener.bad)
    statistics, batches = RunningStatistics(*task.networks.values()), stream.from_sample(state.images_seen)
    window.start_clock()
    while state.step < config.steps:
        with window.waiting():
            batch = next(batches)
        seed_step(seed, state.step)
        statistics.remember()
        rate = learning_rate(state.step, config)
        for optimizer in task.optimizers.values():
            set_learning_rate(optimizer, rate)
        stepped = task.step(batch, state.step)
        statistics.restore(stepped.bad)
        task.after_step(stepped)
        state.weight_ema.update(state.step)
        window.add(stepped)
        nonfinite_steps.note(state.step, stepped.bad, batch.keys)
        state.step += 1
        state.images_seen += config.global_batch_size
        if due(state, config, config.log_every):
            nonfinite_steps.settle()
            listener.log(row_of(state, config, rate))
            window.clear()
        looks, validates = (due(state, config, every) for every in (config.sample_every, config.validate_every))
        with window.apart(looks or validates):
            if looks:
                listener.look(state.step, state.weight_ema.network)
            if validates:
                listener.validate(state.step, state.weight_ema.network)
            listener.advance(state)
        stop = asked_to_stop(state.step, stop_asked, device)
        if stop or (state.step % config.save_every == 0 and state.step < config.steps):
            nonfinite_steps.settle()
            with window.apart():
                state.save(run_dir, keep_every=config.keep_every)
        if stop:
            break
    return state


def begin(task: Task[BatchT, MadeT], config: TrainConfig, device: torch.device) -> TrainState:
    """The state of a run at step 0, its networks ready to train."""
    config.share(distributed.world_size())
    average = WeightEma(task.networks["model"], config.weight_ema)  # of the network before anything is done to it
    task.prepare(config, device, average.network)
    return TrainState(task.networks, task.optimizers, average, task.remembered, task.window())


def due(state: TrainState, config: TrainConfig, every: int) -> bool:
    """Whether it is time for what happens every so many steps (0: never) and after the last."""
    return every > 0 and (state.step % every == 0 or state.step == config.steps)


def row_of(state: TrainState, config: TrainConfig, rate: float) -> Row:
    """A row of the log: where the run is, then what the window has collected."""
    row: Row = {"step": state.step, "images_seen": state.images_seen, "learning_rate": rate}
    row |= state.window.row(config.global_batch_size) | {"nonfinite_steps": state.nonfinite_steps}
    return row | ({"compiled_graphs": compiled_graphs()} if config.compile else {})


def asked_to_stop(step: int, stop_asked: Callable[[], bool], device: torch.device) -> bool:
    """Whether any rank was asked to stop: among several, looked at in every STOP_EVERY-th step."""
    if distributed.world_size() == 1:
        return stop_asked()
    return step % STOP_EVERY == 0 and distributed.any_rank(stop_asked(), device)
