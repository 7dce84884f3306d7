"""Conditions are objects, told apart by what they are and shown by name."""

import numpy as np

from hopeprobe.conditions import FROZEN, LIVE, Condition, as_tensors, frozen
from hopeprobe.tokens import EvalWindows


def test_the_conditions_that_come_with_it():
    assert (LIVE.name, FROZEN.name) == ("live", "frozen")
    assert frozen() is frozen(None) is frozen(mechanism=None) is FROZEN, "however it is asked for"
    assert frozen("cms") is frozen("cms")
    assert frozen("cms").name == "cms-frozen"
    assert frozen("cms.fast") is not frozen("cms")
    assert LIVE.hooks is None
    assert Condition("live") != LIVE, "a name alone makes nothing the same"


def test_frozen_asks_the_subject_for_the_mechanism(subject):
    assert FROZEN.hooks(subject, None, None) == subject.freeze_hooks()
    assert frozen("cms.fast").hooks(subject, None, None) == subject.freeze_hooks("cms.fast")


def test_windows_come_in_the_batches_of_the_condition(toy_data):
    windows = EvalWindows(toy_data, "all", context=32, tokens=300, batch=5)
    assert LIVE.windows(windows) is windows
    assert Condition("pairs", batch=2).windows(windows).batch == 2
    (batch, *_) = windows
    tokens, lengths = as_tensors(batch)
    assert np.array_equal(tokens.numpy(), batch.tokens)
    assert np.array_equal(lengths.numpy(), batch.lengths)
