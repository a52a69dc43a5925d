"""The wraps that LearnedOptimizer puts on a strategy: they go when the fit ends, and take nobody else's along."""

import lightning as L
import pytest
import torch
from lightning_cases import KNOWN_WARNINGS, Module, data, fit, learned, trainer, weights
from optimizer_cases import LossRule, assert_equal

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer

pytestmark = KNOWN_WARNINGS
WRAPPED = {"setup_optimizers", "backward"}


class Wraps(L.Callback):
    """Puts wraps of its own on the strategy, above those that are there, and leaves them there."""

    def __init__(self):
        self.calls = []

    def on_fit_start(self, trainer, pl_module):
        self.own = {name: self.wrap(name, getattr(trainer.strategy, name)) for name in WRAPPED}
        vars(trainer.strategy).update(self.own)

    def wrap(self, name, below):
        def wrapped(*args, **kwargs):
            self.calls.append(name)
            return below(*args, **kwargs)

        return wrapped


def test_a_wrap_above_ours_stays_and_ours_passes_calls_through(tmp_path):
    wraps = Wraps()
    callback = lopt.LearnedOptimizer(LossRule())
    runner = fit(tmp_path, callback, wraps)
    assert {name: vars(runner.strategy)[name] for name in WRAPPED} == wraps.own
    seen = len(callback.rule.losses)
    wraps.calls.clear()
    runner.callbacks = [c for c in runner.callbacks if c not in (callback, wraps)]
    runner.fit_loop.max_epochs += 2
    runner.fit(runner.lightning_module, data())
    assert set(wraps.calls) == WRAPPED
    assert [type(o) for o in runner.optimizers] == [torch.optim.AdamW]
    assert len(callback.rule.losses) == seen


def test_the_next_fit_is_learned_under_a_wrap_that_stayed(tmp_path):
    wraps = Wraps()
    runner = fit(tmp_path, learned(), wraps)
    runner.callbacks.remove(wraps)
    runner.fit(Module(), data())
    assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
    assert {name: vars(runner.strategy)[name] for name in WRAPPED} == wraps.own


@pytest.mark.parametrize("hook", ["setup", "on_train_start", "on_train_batch_end"])
def test_an_exception_in_another_callbacks_on_exception_leaves_no_wrap(tmp_path, hook):
    class Fails(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise LookupError("while handling")

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    breaks = L.Callback()
    setattr(breaks, hook, fail)
    runner = trainer(tmp_path, Fails(), learned(), breaks)
    with pytest.raises(LookupError, match="while handling"):
        runner.fit(Module(), data())
    assert not WRAPPED & set(vars(runner.strategy))


def test_one_callback_in_two_trainers_at_once(tmp_path):
    """The inner fit, on a strategy of its own, leaves the outer one's wraps alone."""
    callback = lopt.LearnedOptimizer(LossRule())

    class FitsInside(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.inner = fit(tmp_path, callback)
                assert set(vars(trainer.strategy)) >= WRAPPED
                trainer.strategy.setup_optimizers(trainer)

    inside = FitsInside()
    outer = fit(tmp_path, callback, inside)
    for runner in (outer, inside.inner):
        assert [type(o) for o in runner.optimizers] == [RuleOptimizer]
        assert not WRAPPED & set(vars(runner.strategy))
    assert_equal(weights(inside.inner), weights(fit(tmp_path, lopt.LearnedOptimizer(LossRule()))))
    assert callback._fits == {}
