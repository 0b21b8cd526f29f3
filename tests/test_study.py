"""The study's statistics, its bookkeeping, and one tiny cell of it."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import pranam_optax
from pranam_optax import problems

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]

import blackbox  # noqa: E402
import methods  # noqa: E402
import nist_problems  # noqa: E402
import report  # noqa: E402
import stats  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402
import variants  # noqa: E402

TINY = study.Setting(
    rates=(0.1, 0.3, 1.0),
    tuning_seeds=range(2),
    report_seeds=range(10, 13),
    num_points=3,
    num_steps=4,
    optimization_level=0,
)


def test_holm_agrees_with_a_hand_computation():
    # Sorted .005 * 4, .01 * 3, .03 * 2, .04 * 1, none below the one before it.
    adjusted = stats.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.holm([0.4, 0.9]), [0.8, 0.9])
    np.testing.assert_allclose(stats.holm([0.7, 0.9]), [1.0, 1.0])


def test_bootstrap_interval_is_that_of_the_normal_for_many_seeds():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = stats.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    mean = values.mean()
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.02)
    assert stats.bootstrap_interval(np.full(5, 2.0)) == (2.0, 2.0)


def test_paired_test_compares_logarithms():
    ours, theirs = np.array([1e-9, 0.2, 3.0, 40.0]), np.array([1e-7, 0.7, 5.0, 50.0])
    floored = np.log10(np.maximum([ours, theirs], 1e-3))
    expected = scipy.stats.ttest_rel(*floored).pvalue
    assert stats.paired_p(ours, theirs, 1e-3) == pytest.approx(expected)
    assert stats.paired_p(ours, ours, 1e-3) == 1.0
    assert stats.paired_p(ours[1:], 10 * ours[1:], 1e-3) == 0.0
    assert 0 < stats.paired_p(ours, np.array([1.0, 2.0, 3.0, np.nan]), 1e-3) < 1
    assert stats.geometric_mean(np.array([1e-9, 1e-1]), 1e-3) == pytest.approx(1e-2)


def test_profile_counts_the_runs_within_a_factor_of_the_best():
    ratios = np.array([1.0, 1.0, 3.0, 1e9])
    np.testing.assert_array_equal(
        stats.profile(ratios, np.array([1.0, 2.0, 10.0])), [0.5, 0.5, 0.75]
    )


def tiny_task():
    """A parabola somewhere: quick to compile."""
    return tasks.Task(
        "unimodal",
        lambda key: jax.random.uniform(key, (2,)),
        lambda key: jax.random.normal(key, (2,)),
        lambda data, place, x, key: jnp.sum((x - place) ** 2),
        lambda data, place, x: jnp.sum((x - place) ** 2),
        num_replicas=4,
        num_steps=4,
        solved=1e-3,
        floor=1e-3,
        box=(np.full(2, -5.0), np.full(2, 5.0)),
    )


def test_interrupted_study_ends_with_the_same_file(tmp_path, optax_promotion):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    names = ["independent", "normalised"]
    results = study.study({"parabola": tiny_task}, ["SGD"], names, TINY, whole)
    study.study({"parabola": tiny_task}, ["SGD"], names[:1], TINY, parts)
    study.study({"parabola": tiny_task}, ["SGD"], names, TINY, parts)
    assert whole.read_text() == parts.read_text()
    assert json.loads(whole.read_text()) == results
    assert list(results) == [f"parabola | SGD | {name}" for name in names]

    cell = results["parabola | SGD | independent"]
    assert np.shape(cell["scores"]) == (3, 4)
    assert np.shape(cell["means"]) == (3, 3)
    assert cell["rate"] == TINY.rates[int(np.argmin(cell["tuning"]))]
    assert cell["kind"] == "unimodal"
    # Descent on a sphere: the curve falls, and ends above the last score.
    means = np.array(cell["means"])
    assert np.all(np.diff(means) < 0)
    assert np.all(np.mean(cell["scores"], axis=1) < means[:, -1])
    # All methods start from the same replicas.
    other = np.array(results["parabola | SGD | normalised"]["means"])
    np.testing.assert_array_equal(other[:, 0], means[:, 0])


def test_gradient_that_counts_twice_halves_the_steps(tmp_path, optax_promotion):
    double = TINY._replace(gradient_cost=2)
    names = ["independent", "multi-start L-BFGS"]
    output = tmp_path / "double.json"
    results = study.study({"parabola": tiny_task}, ["SGD"], names, double, output)
    half = TINY._replace(num_steps=2)
    other = study.study(
        {"parabola": tiny_task}, ["SGD"], names[:1], half, tmp_path / "half.json"
    )
    cell = "parabola | SGD | independent"
    assert results[cell] == other[cell]
    assert results["parabola | - | multi-start L-BFGS"]["budget"] == 4 * 4


def test_cell_is_a_training_run(optax_promotion):
    """The scores of a cell are those of momentum written out."""
    task = tiny_task()
    start = study.pick(study.make_starts(task, [0, 5]), 1)
    run = jax.jit(study.make_run(task, "normalised", "momentum", 4))
    outcome = run((), start, 0.1)

    x, place = np.asarray(start.params), np.asarray(start.problem)
    unit, velocity, means = np.sqrt(np.mean((x - x.mean(axis=0)) ** 2)), 0.0, []
    for i in range(4):
        means.append(np.mean(np.sum((x - place) ** 2, axis=1)))
        gradient = 2 * (x - place)
        velocity = 0.9 * velocity + gradient / np.sqrt(np.mean(gradient**2))
        x = x - 0.1 * unit * 0.5 * (1 + np.cos(np.pi * i / 4)) * velocity
    scores = np.sum((x - place) ** 2, axis=1)
    np.testing.assert_allclose(outcome.scores, scores, rtol=1e-4)
    np.testing.assert_allclose(outcome.means, means, rtol=1e-4)


def test_normalised_control_is_pranam_without_coupling():
    params, grads = jax.random.normal(jax.random.key(0), (2, 4, 3))
    link = pranam_optax.pranam(coupling=0.0)
    expected, _ = jax.jit(link.update)(grads, link.init(params), params)
    updates, _ = methods.normalize().update(grads, optax.EmptyState(), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_resampling_comes_at_its_times(optax_promotion):
    method = methods.resampled(lambda inner, *_: inner, (0.5,), pull=0.5)
    tx = method(optax.sgd(1.0), 2, 4)
    params = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    values = jnp.array([3.0, 0.0, 1.0, 2.0])  # best first: 1, 2, 3, 0
    grads, state = 0.1 * params, tx.init(params)
    updates, state = tx.update(grads, state, params, values=values)
    np.testing.assert_array_equal(updates, -grads)
    updates, state = tx.update(grads, state, params, values=values)
    # The first goes half of the way to the second, the last to the third.
    after = (params + updates)[:, 0]
    np.testing.assert_allclose(after, 0.9 * np.array([1.5, 2, 3, 3.5]), rtol=1e-6)


def test_lookahead_is_that_of_optax(optax_promotion):
    ours, theirs = (
        methods.lookahead(optax.adam(0.1), 3),
        optax.lookahead(optax.adam(0.1), sync_period=3, slow_step_size=0.5),
    )
    params = jnp.array([1.0, -2.0])
    both = optax.LookaheadParams.init_synced(params)
    state, their_state = ours.init(params), theirs.init(both)
    for _ in range(7):
        updates, state = ours.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
        updates, their_state = theirs.update(2 * both.fast, their_state, both)
        both = optax.apply_updates(both, updates)
    np.testing.assert_allclose(params, both.fast, rtol=1e-5)


def test_tasks_have_the_losses_of_the_problems():
    key = jax.random.key(3)
    for fit, predict in (
        (problems.polynomial_fit(key), tasks.polynomial),
        (problems.teacher_network(key), lambda p, x: tasks.network(jnp.tanh, p, x)),
    ):
        params = fit.init(jax.random.key(4))
        expected = fit.predict(params, fit.x)
        np.testing.assert_allclose(predict(params, fit.x.T), expected, rtol=1e-4)


def test_convolution_is_that_of_xla():
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(
            tasks.convolve(x, w, stride), expected, rtol=1e-4, atol=1e-4
        )


def test_networks_have_logits():
    for network, size in (
        (tasks.dense(10, 10), 784 * 10 + 10 + 110 + 110),
        (tasks.convolutional((4, 4, 8), (3, 2, 16)), 17 * 8 + 73 * 16 + 145 * 10),
    ):
        params = network.init(jax.random.key(0))
        assert optax.tree.size(params) == size
        assert network.logits(params, jnp.ones((2, 784))).shape == (2, 10)


def test_certified_parameters_have_the_certified_loss(optax_promotion):
    data = ROOT / "tests" / "data" / "nist_strd"
    task = tasks.nist_regression("Gauss1", data)
    # The box is 20 |b| wide, its middle 0.
    z = jnp.arcsin(
        0.1 * jnp.sign(nist_problems.load(data, ["Gauss1"])["Gauss1"].certified)
    )
    assert 0 < task.minimum < 0.01
    assert task.score(task.data, (), z) == pytest.approx(0, abs=1e-5)
    loss = task.loss(task.data, (), z, None)
    assert loss == pytest.approx(task.minimum, abs=1e-5)


def test_free_replicas_are_never_coupled(optax_promotion):
    params, grads = jax.random.normal(jax.random.key(0), (2, 4, 3))
    tx = methods.PRESETS["quarter free"](optax.identity(), 10, 4)
    updates, _ = tx.update(grads, tx.init(params), params)
    normalised, _ = methods.normalize().update(grads, optax.EmptyState(), params)
    np.testing.assert_allclose(updates[0], normalised[0], rtol=1e-5)
    assert np.all(np.abs(updates[1:] - normalised[1:]).max(axis=1) > 1e-3)


def test_prototype_of_the_notebook_makes_the_step_of_pranam(optax_promotion):
    params = jax.random.normal(jax.random.key(0), (8, 6))
    grads = jax.random.normal(jax.random.key(1), (8, 6))
    link = pranam_optax.pranam(coupling=0.7, step_size=variants.Knobs().step)
    expected, _ = link.update(grads, link.init(params), params)
    knobs = jax.tree.map(jnp.asarray, variants.Knobs(start=0.7))

    @jax.jit
    def update(knobs):
        phi, values = variants.fit(params, knobs.width), jnp.arange(8.0)
        leaves, time = np.zeros(6, int), jnp.zeros([])
        return variants.update(knobs, leaves, time, phi, params, grads, values)[1]

    updates = update(knobs)
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


def test_peers_stop_when_the_evaluations_are_spent():
    for gradient_cost in (1, 2):
        counter = blackbox.Counter(lambda u: jnp.sum((u - 0.3) ** 2), 20, gradient_cost)
        with pytest.raises(blackbox.BudgetSpentError):
            for _ in range(21):
                counter.value_and_grad(np.array([0.4, 0.5]))
        assert counter._left == 0
        assert counter.best == pytest.approx(0.05)
    counter = blackbox.Counter(lambda u: jnp.sum(u**2), 3, 1)
    counter.value(np.array([0.5]))
    counter.grad(np.array([0.5]))  # the value there is known: nothing more to pay
    assert counter._left == 2
    with pytest.raises(blackbox.BudgetSpentError):  # two of three are paid for
        counter.values(np.array([[0.4], [0.3], [0.1]]))
    assert counter.best == pytest.approx(0.09)


def test_peer_gets_near_the_minimum():
    task = tiny_task()
    instances = study.make_starts(task, [0, 1]).problem
    cell = blackbox.run_peer(task, "multi-start L-BFGS", instances)
    assert cell["budget"] == 4 * 4
    assert np.shape(cell["scores"]) == (2, 1)
    assert np.max(cell["scores"]) < 1e-5


def test_race_ends_at_the_final_gap_of_the_other():
    curves = np.array([[8.0, 4.0, 2.0, 1.0], [8.0, 8.0, 8.0, 8.0]])
    np.testing.assert_allclose(
        report.part_of_run(curves, np.array([4.0, 1.0])), [1 / 3, np.inf]
    )
    np.testing.assert_allclose(report.part_of_run(curves[:1], np.array([1.0])), 1.0)
    np.testing.assert_allclose(report.part_of_run(curves[:1], np.array([9.0])), 1 / 3)


def test_peers_without_gradients_keep_their_evaluations():
    cells = report.read(report.invented())
    cell = cells["Ackley 30 rotated", "-", "CMA-ES"]
    cells["Ackley 30 rotated", "-", "basin hopping"] = cell
    assert [key[2] for key in report.count_twice(cells, {})] == ["CMA-ES"]


def test_step_cost_is_that_of_the_table():
    cost = float(report.step_cost(ROOT / "docs" / "devices.md"))
    assert 1 < cost < 10
    assert report.step_cost(ROOT / "docs" / "none.md") == "unknown"


def test_report_tells_won_from_lost_cells():
    cells = report.read(report.invented())
    won = report.compare(cells, "pranam", "independent", "mean")
    lost = report.compare(cells, "independent", "pranam", "mean")
    assert [c.verdict for c in won] == ["better"] * 3
    assert [c.verdict for c in lost] == ["worse"] * 3
    assert won[0].gain == pytest.approx(10, rel=0.1)
    equal = report.compare(cells, "independent", "normalised", "mean")
    assert [c.verdict for c in equal] == ["equal"] * 3
    assert "| 30-D multimodal | Adam |" in report.gain_table(cells, "pranam")
    assert "| **0.09" in report.peer_table(cells)
    targets = report.target_table(cells, cells)
    assert "mean better | at least 85 % | 1 of 1 (100%) |" in targets
    assert "no peer has a lower median gap | at least half | 1 of 1 |" in targets
    assert "gradients count twice | at least half | 1 of 1 |" in targets

    presets = report.preset_table(
        cells, "quarter free", {"independent": "independent", "ours": "pranam"}
    )
    assert "| tanh 4-5-1 | Adam | 1 | " in presets
    assert "best, against ours |" in presets
    assert "| sphere 30 rotated | Adam | 0.1 | " in report.race_table(
        cells, "pranam", ["independent"]
    )

    once = report.fill("# Title\n", {"a": "table"})
    assert report.fill(once, {"a": "table"}) == once
    assert report.fill(once + "rest", {"a": "new"}).endswith("<!-- end of a -->\nrest")
