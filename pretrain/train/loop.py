"""The loop: batch, step, what is due."""

from pretrain.cluster import agreement, signals
from pretrain.config import Config
from pretrain.data.loader import Batch
from pretrain.engine.step import Engine
from pretrain.log import RunLog
from pretrain.optim import learning_rate
from pretrain.train.datasets import DataSets
from pretrain.train.evaluate import evaluate
from pretrain.train.first_batch import show_first_batch
from pretrain.train.folder import Claim
from pretrain.train.incoming import Incoming
from pretrain.train.journal import Journal
from pretrain.train.meter import Meter
from pretrain.train.profile import Profile
from pretrain.train.save import Saver
from pretrain.train.state import TrainState


def loop(
    config: Config,
    data: DataSets,
    engine: Engine,
    state: TrainState,
    log: RunLog,
    profile: Profile,
    batches: Incoming,
    stop: signals.StopRequest,
    claimed: Claim,
    *,
    branched: bool,
) -> None:
    """Trains from state.step to config.total_steps or until asked to stop, and saves; `state` holds the progress.

    batches: one for each of these steps. branched: it starts from another run's checkpoint, and first saves its own.
    """
    meter = Meter(config, data.num_classes, state, engine)
    journal, saver = Journal(config.output / config.name, config), Saver(config, data, engine, log, claimed)
    with meter.paused():
        if branched:  # the other run may delete its checkpoint, or have a newer one at the next start
            saver.save(state, meter, must_succeed=True)
        if _still_due(data, state):  # a stop cut the evaluation short
            if evaluate(config, data, engine, state, log, stop):
                return
            saver.save(state, meter, must_succeed=False)  # with its score, for keep_best
    batch, following = _first_two(batches, data, state, meter, saver, log)
    while batch is not None:
        answer = journal.ask(batch, following, stop, saver)
        lr = learning_rate(config.optim, config.total_steps, state.step)
        with profile.step(state.step + 1), engine.layers.watched(due(state.step + 1, config.log.layers_every_steps)):
            result = engine.train_step(engine.ahead.take(batch, following), lr)
        state.step, state.metrics = state.step + 1, {}
        meter.add(result)
        with saver.finished_before_errors():
            stopping, saver_done = journal.note(state, batch, result, answer)
            if saver_done:
                saver.advance()
        last = state.step == config.total_steps
        if due(state.step, config.log.every_steps) or last:
            journal.write_down()
            log.scalars(state.step, meter.read(state, data, lr, result, engine))
        _set_due(config, data, state)
        with meter.paused():
            if due(state.step, config.log.layers_every_steps):
                log.scalars(state.step, engine.layer_numbers(batch, result), on_console=False)
            if (state.validation_due or state.features_due) and not stopping:
                profile.end()  # a trace covers steps only
                saver.finish()  # no step will advance it for a while
                journal.write_down()
                with saver.saved_before_errors(state, meter):
                    stopping = evaluate(config, data, engine, state, log, stop)
            if due(state.step, config.checkpoint.every_steps) or last or stopping:
                journal.write_down()
                saver.save(state, meter, must_succeed=last or stopping)
        if stopping:
            agreement.raise_together(following.error if following else None)
            break
        batch, following = following, meter.wait_for(batches, state.step)
    saver.end(stop)


def _first_two(
    batches: Incoming, data: DataSets, state: TrainState, meter: Meter, saver: Saver, log: RunLog
) -> tuple[Batch | None, Batch | None]:
    """Returns the first two batches; (None, None) if a stop is requested before the first one arrives.

    The first batch of a new run is drawn.
    """
    batch = meter.wait_for(batches, state.step)
    if agreement.any_rank(batches.late):
        return None, None
    with saver.finished_before_errors():
        agreement.raise_together(batch.error if batch else None)
    if batch is not None and state.step == 0:
        show_first_batch(batch, data.train.class_names, log)
    return batch, meter.wait_for(batches, state.step)


def _still_due(data: DataSets, state: TrainState) -> bool:
    """Whether an evaluation of an earlier start is still due; it may have been switched off since."""
    state.validation_due &= data.val is not None
    state.features_due &= data.fewshot is not None
    return state.validation_due or state.features_due


def _set_due(config: Config, data: DataSets, state: TrainState) -> None:
    """Notes in `state` what is to be evaluated after its step."""
    settings, last = config.evaluation, state.step == config.total_steps
    state.validation_due = data.val is not None and (due(state.step, settings.every_steps) or last)
    state.features_due = data.fewshot is not None and (due(state.step, settings.features_every_steps) or last)


def due(step: int, every_steps: int) -> bool:
    """Returns whether something done every so many steps is done after `step`; 0 means never."""
    return bool(every_steps) and step % every_steps == 0
