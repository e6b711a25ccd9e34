"""Kernels that lie in memory as cuDNN reads them: in every step of a run, with no effect on its numbers."""

import jax
import pytest
from tiny_run import make_config, read_reproducible

from dspo_jax.kernels import layouts
from dspo_jax.training import run
from dspo_jax.training.start import make_state, prepare

ORDER = (3, 0, 1, 2)


def orders(tree):
    return {leaf.format.layout.major_to_minor for leaf in jax.tree.leaves(tree) if leaf.ndim == 4}


@pytest.mark.ci
def test_a_run_keeps_the_order_through_checkpoints_and_its_numbers_do_not_change(
    shallow_model, tiny_pairs, tmp_path, monkeypatch
):
    def config(steps):
        return make_config(
            shallow_model, tiny_pairs, {"steps": steps, "checkpoint.every": 2, "ema_decay": 0.9}
        )

    run.train(config(4), tmp_path / "plain")
    monkeypatch.setattr(layouts, "is_for_cudnn", lambda device: True)
    experiment = prepare(config(4))
    state, reference = make_state(experiment.task, experiment.mesh)
    assert orders((state.arrays(), reference)) == {ORDER}
    ended = []
    monkeypatch.setattr(
        run, "fit", lambda *given, fit=run.fit, **more: ended.append(fit(*given, **more)) or ended[-1]
    )
    run.train(config(2), tmp_path / "ordered")
    run.train(config(4), tmp_path / "ordered")  # from the checkpoint of step 2
    assert [orders(state.arrays()) for state in ended] == [{ORDER}] * 2
    expected, found = (read_reproducible(tmp_path / name) for name in ("plain", "ordered"))
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
