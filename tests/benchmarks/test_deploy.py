"""Networks in the forms they can be stored and run in."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, models, report, train
from benchmarks.methods import METHODS
from benchmarks.settings import Settings
from benchmarks.timing import Timing


def test_networks_are_stored_and_run_in_every_form(digits, monkeypatch):
    def once(steps, *_):
        return {n: Timing(len(s(None)) / 100, 0, 0, 0) for n, s in steps.items()}

    monkeypatch.setattr(measure.deploy_module, "relative_times", once)
    settings = Settings.of("digits")
    fresh, _ = train.initialize(models.make("mlp", 10), 0, jnp.ones((1, 64)))
    kept = {}
    for name in ("volumization_paper", "ternary_paper"):
        method = METHODS[name]
        params = method.finish(method.fixed, fresh["params"])
        kept[name] = method.fixed, [jax.device_get({"params": params})]
    forms = measure.deploy(kept, digits, settings)
    assert [form["form"] for form in forms.values()] == [
        "float32",
        "bfloat16",
        "ternary bits",
        "ternary bits, by layers",
    ]
    for form, bits in zip(forms.values(), (32, 16, 2, 2), strict=True):
        assert 8 * form["kernel_bytes"] == bits * (64 * 256 + 256 * 10)
        others = 266 * (2 if bits == 16 else 4) + (8 if bits == 2 else 0)
        assert form["device_bytes"] == form["kernel_bytes"] + others
        assert 0 < form["file_bytes"] - form["device_bytes"] < 3000
        assert form["peak_bytes_1"] > form["device_bytes"]
        assert (form["relative_time_1"], form["relative_time_100"]) == (0.01, 1.0)
        assert form.get("same_logits") == (True if bits == 2 else None)
        if bits != 16:
            _, (network,) = kept["ternary_paper" if bits == 2 else "volumization_paper"]
            logits = models.logits(models.make("mlp", 10), network, digits.x_test)
            hits = np.mean(logits.argmax(-1) == digits.y_test)
            np.testing.assert_allclose(form["accuracy"], [hits], atol=1e-5)
    result = {"deployed": forms}
    head, rows, sentence = report.deployed(result)
    assert head[4] == "times fewer" and [row[4] for row in rows] == [
        "1",
        "2",
        "16",
        "16",
    ]
    assert "Networks run from bits give the logits of the same" in sentence
    assert report.deployed_table(result).row_count == 4
    next(f for f in forms.values() if "bits" in f["form"])["same_logits"] = False
    assert "Warning: from bits, other logits" in report.deployed(result)[2]
    floats = {"deployed": {k: f for k, f in forms.items() if "bits" not in f["form"]}}
    assert "bits" not in report.deployed(floats)[2]
