"""Comparisons that take little time, for tests of what is around training."""

import jax
import numpy as np

from benchmarks import measure, part, train

Epochs = list[tuple[float, float, float]]


class Population:
    """Runs whose progress and accuracies are simple functions of seed and rate."""

    trained: Epochs

    def __init__(self, training, arrays, mapping):
        del training, arrays, mapping

    def start(self, seeds, hyper, labels):
        del labels
        self._rates = [h["learning_rate"] for h in hyper]
        self._seeds = np.array(seeds, float)
        return {"state": self._seeds % 997 + np.array(self._rates)}

    def epoch(self, progress):
        state = (progress["state"] * 1.7 + 0.3) % 1
        self.trained += zip(self._seeds, self._rates, np.round(state, 6), strict=True)
        rows = dict.fromkeys(train.Measured._fields, state)
        rows["gbr"] = np.stack([state] * 3, -1)
        return {"state": state}, train.Measured(**rows)

    def test(self, progress):
        return progress["state"] / 2

    def networks(self, progress):
        return [{"params": {"kernel": np.full((2, 2), s)}} for s in progress["state"]]

    def fetch(self, tree):
        return tree

    def place(self, fresh, leaves):
        return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def fake(monkeypatch) -> Epochs:
    """Puts them in place of real ones, and gives what will have been trained."""
    trained: Epochs = []
    monkeypatch.setattr(Population, "trained", trained, raising=False)
    monkeypatch.setattr(part, "Population", Population)
    monkeypatch.setattr(measure, "of_network", lambda *_: ({}, {}))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    return trained


def on_one_device(monkeypatch) -> None:
    """Trains one run after another, where a group would fill up all devices."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
