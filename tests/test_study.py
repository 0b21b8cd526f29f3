"""The study: statistics, methods, tasks, and a few tiny cells."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import methods
import nist_problems
import numpy as np
import optax
import peers
import pytest
import report
import scipy.stats
import stats
import study
import tasks

import pranam_optax
from conftest import assert_close, assert_equal

TINY = study.Setting(
    rates=(0.1, 0.3, 1.0),
    tuning_seeds=range(2),
    report_seeds=range(10, 13),
    num_points=3,
    num_steps=4,
    optimization_level=0,
)
SGD = {"SGD": methods.OPTIMIZERS["SGD"]}


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


def test_holm_agrees_with_a_hand_computation():
    # Sorted .005 * 4, .01 * 3, .03 * 2, .04 * 1, none below the one before it.
    adjusted = stats.holm([0.01, 0.04, 0.03, 0.005])
    assert_close(adjusted, [0.03, 0.06, 0.06, 0.02], 1e-7)
    assert_close(stats.holm([0.4, 0.9]), [0.8, 0.9], 1e-7)
    assert_close(stats.holm([0.7, 0.9]), [1.0, 1.0], 1e-7)


def test_bootstrap_interval_is_that_of_the_normal_for_many_seeds():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    half = 1.96 * values.std() / 20
    expected = values.mean() - half, values.mean() + half
    assert_close(stats.bootstrap_interval(values), expected, 1e-7, 0.03)
    assert stats.bootstrap_interval(np.full(5, 2.0)) == (2.0, 2.0)
    assert stats.bootstrap_interval(np.array([3.0])) == (3.0, 3.0)


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
    assert_equal(stats.profile(ratios, np.array([1.0, 2.0, 10.0])), [0.5, 0.5, 0.75])


def test_interrupted_study_ends_with_the_same_file(tmp_path, optax_promotion):
    names = "independent", "normalised"
    chosen = {name: methods.METHODS[name] for name in names}
    chosen["L-BFGS"] = peers.PEERS["multi-start L-BFGS"]

    def run(output):
        return study.study({"parabola": tiny_task}, chosen, SGD, TINY, output)

    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    results = run(whole)
    assert json.loads(whole.read_text()) == results
    names = [f"parabola | SGD | {name}" for name in names]
    assert list(results) == [*names, "parabola | - | L-BFGS"]
    study.save(parts, {name: x for name, x in results.items() if name != names[1]})
    run(parts)
    assert json.loads(parts.read_text()) == results

    cell = results[names[0]]
    assert np.shape(cell["scores"]) == (3, 4)
    assert np.shape(cell["means"]) == (3, 3)
    assert cell["rate"] == TINY.rates[int(np.argmin(cell["tuning"]))]
    assert cell["kind"] == "unimodal"
    # Descent on a sphere: the curve falls, and ends above the last score.
    means = np.array(cell["means"])
    assert np.all(np.diff(means) < 0)
    assert np.all(np.mean(cell["scores"], axis=1) < means[:, -1])
    # All methods start from the same replicas.
    other = np.array(results[names[1]]["means"])
    assert_equal(other[:, 0], means[:, 0])
    # The peer has as many evaluations and gets near the minimum.
    peer = results["parabola | - | L-BFGS"]
    assert peer["budget"] == 4 * 4
    assert np.shape(peer["scores"]) == (3, 1)
    assert np.max(peer["scores"]) < 1e-5


def test_gradient_that_counts_twice_halves_the_steps(tmp_path, optax_promotion):
    def run(name, **changes):
        chosen = {"independent": methods.METHODS["independent"]}
        setting, output = TINY._replace(**changes), tmp_path / name
        return study.study({"parabola": tiny_task}, chosen, SGD, setting, output)

    assert run("costly", gradient_cost=2) == run("short", num_steps=2)


def test_cell_is_a_training_run(optax_promotion):
    """The scores of a cell are those of momentum written out."""
    task = tiny_task()
    start = study.pick(study.make_starts(task, [0, 5]), 1)
    method, momentum = methods.METHODS["normalised"], methods.OPTIMIZERS["momentum"]
    run = jax.jit(study.make_run(task, method, momentum, 4))
    outcome = run((), start, 0.1)

    x, place = np.asarray(start.params), np.asarray(start.instance)
    unit, velocity, means = np.sqrt(np.mean((x - x.mean(axis=0)) ** 2)), 0.0, []
    for i in range(4):
        means.append(np.mean(np.sum((x - place) ** 2, axis=1)))
        gradient = 2 * (x - place)
        velocity = 0.9 * velocity + gradient / np.sqrt(np.mean(gradient**2))
        x = x - 0.1 * unit * 0.5 * (1 + np.cos(np.pi * i / 4)) * velocity
    scores = np.sum((x - place) ** 2, axis=1)
    assert_close(outcome.scores, scores, 1e-4)
    assert_close(outcome.means, means, 1e-4)


def test_unit_of_the_rate_is_that_of_what_moves():
    params = jnp.array([[1.0, 3.0], [3.0, 7.0]])
    grads = jnp.full((2, 2), 10.0)
    spread = np.sqrt(2.5)
    for method, optimizer, unit in (
        ("independent", "Adam", spread),
        ("independent", "SGD", spread / 10),
        ("normalised", "SGD", spread),
    ):
        pair = methods.METHODS[method], methods.OPTIMIZERS[optimizer]
        assert_close(methods.rate_unit(*pair, params, grads), unit, 1e-6)
    # Of `reparametrize` it is that of the embedding.
    phi, gradient = jax.jit(methods.METHODS["reparametrize"].acts_on)(params, grads)
    found = jax.jit(pranam_optax.reparametrize(optax.sgd(1.0)).init)(params).phi
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, found)
    assert_close(phi, found, 1e-5)


def test_normalised_and_free_replicas_are_never_coupled(optax_promotion):
    params, grads = jax.random.normal(jax.random.key(0), (2, 4, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def first(tx):
        return tx.update(grads, tx.init(params), params)[0]

    normalised = first(methods.normalize())
    assert_close(normalised, first(pranam_optax.pranam(coupling=0.0)), 1e-5)
    updates = first(methods.METHODS["quarter free"].make(optax.identity(), 10, 4))
    assert_close(updates[0], normalised[0], 1e-5)
    assert np.all(np.abs(updates[1:] - normalised[1:]).max(axis=1) > 1e-3)


def test_resampling_comes_at_its_times(optax_promotion):
    alone = methods.METHODS["independent"]
    tx = methods.resampled(alone, (0.5,), pull=0.5).make(optax.sgd(1.0), 2, 4)
    params = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    values = jnp.array([3.0, 0.0, 1.0, 2.0])  # best first: 1, 2, 3, 0
    grads, state, update = 0.1 * params, tx.init(params), jax.jit(tx.update)
    updates, state = update(grads, state, params, values=values)
    assert_equal(updates, -grads)
    updates, state = update(grads, state, params, values=values)
    # The first goes half of the way to the second, the last to the third.
    after = (params + updates)[:, 0]
    assert_close(after, 0.9 * np.array([1.5, 2, 3, 3.5]), 1e-6)


def test_split_batches_are_drawn_by_each_replica(optax_promotion):
    task = tiny_task()._replace(
        loss=lambda data, place, x, key: jnp.sum((x - jax.random.normal(key, 2)) ** 2),
    )
    # Two pairs of equal replicas.
    params = jnp.array([[1.0], [-1.0], [1.0], [-1.0]]) * jnp.ones((1, 2))
    for batch in ("shared", "split"):
        drawing = task._replace(batch=batch)
        start = study.pick(study.make_starts(drawing, [0, 1]), 0)
        run = study.make_run(
            drawing, methods.METHODS["normalised"], methods.OPTIMIZERS["SGD"], 2
        )
        outcome = jax.jit(run)((), start._replace(params=params), 0.1)
        assert (outcome.scores[0] == outcome.scores[2]) == (batch == "shared")


def test_convolution_is_that_of_xla():
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        found = jax.jit(tasks.convolve, static_argnums=2)(x, w, stride)
        assert_close(found, expected, 1e-4, 1e-4)


def test_networks_have_logits():
    for network, size in (
        (tasks.dense(10, 10), 784 * 10 + 10 + 110 + 110),
        (tasks.convolutional((4, 4, 8), (3, 2, 16)), 17 * 8 + 73 * 16 + 145 * 10),
    ):
        params = jax.eval_shape(network.init, jax.random.key(0))
        assert sum(np.prod(x.shape) for x in jax.tree.leaves(params)) == size
        images = jax.ShapeDtypeStruct((2, 784), jnp.float32)
        assert jax.eval_shape(network.logits, params, images).shape == (2, 10)


def test_certified_parameters_have_the_certified_loss(optax_promotion):
    data = Path(__file__).parent / "data" / "nist_strd"
    task = tasks.nist_regression("Gauss1", data)
    # The box is 20 |b| wide, its middle 0.
    certified = nist_problems.load(data, ["Gauss1"])["Gauss1"].certified
    z = jnp.arcsin(0.1 * jnp.sign(certified))
    assert 0 < task.minimum < 0.01
    assert task.score(task.data, (), z) == pytest.approx(0, abs=1e-5)
    loss = task.loss(task.data, (), z, None)
    assert loss == pytest.approx(task.minimum, abs=1e-5)


def test_peers_stop_when_the_evaluations_are_spent():
    for gradient_cost in (1, 2):
        counter = peers.Counter(lambda u: jnp.sum((u - 0.3) ** 2), 20, gradient_cost)
        with pytest.raises(peers.BudgetSpentError):
            for _ in range(21):
                counter.value_and_grad(np.array([0.4, 0.5]))
        assert counter.left == 0
        assert counter.best == pytest.approx(0.05)
        assert_equal(counter.where, [0.4, 0.5])
    counter = peers.Counter(lambda u: jnp.sum(u**2), 3)
    counter.value(np.array([0.5]))
    counter.grad(np.array([0.5]))  # the value there is known: nothing more to pay
    assert counter.left == 2
    with pytest.raises(peers.BudgetSpentError):  # two of three are paid for
        counter.values(np.array([[0.4], [0.3], [0.1]]))
    assert counter.best == pytest.approx(0.09)


def test_values_that_are_not_finite_do_not_win():
    counter = peers.Counter(lambda u: jnp.log(jnp.sum(u) - 0.5), 9)
    assert counter.value(np.array([0.1])) == np.finfo("f").max
    value, grad = counter.value_and_grad(np.array([0.1]))
    assert value == np.finfo("f").max
    assert np.isfinite(grad).all()
    counter.value(np.array([0.6]))
    assert counter.best == pytest.approx(np.log(0.1), rel=1e-5)


def test_pivot_puts_records_in_rows_and_columns():
    places = ("a", "x"), ("b", "y"), ("b", "x"), ("b", "x")
    records = [{"row": row, "column": column, "value": 1} for row, column in places]
    assert report.pivot(records, ["row"], "column", report.count) == (
        "| row | x | y |\n| --- | --- | --- |\n| a | 1 |  |\n| b | 2 | 1 |"
    )


def test_report_tells_better_from_worse():
    rng = np.random.default_rng(0)
    results = {
        f"{problem} | Adam | {method}": {
            "scores": (level * rng.uniform(0.9, 1.1, (5, 4))).tolist(),
            "means": np.full((5, 6), level).tolist(),
            "kind": kind,
            "solved": 0.2,
        }
        for problem, kind in (("Ackley", "multimodal"), ("tanh", "model"))
        for method, level in (("independent", 1), ("normalised", 1), ("pranam", 0.1))
    }
    peer = {"scores": [[0.5]] * 5, "kind": "multimodal", "solved": 0.2}
    results["Ackley | - | CMA-ES"] = peer
    cells = report.read(results)
    for ours, theirs, verdict in (
        ("pranam", "independent", "better"),
        ("pranam", report.CONTROLS, "better"),
        ("independent", "pranam", "worse"),
        ("independent", "normalised", "equal"),
    ):
        found = report.compare(cells, ours, theirs, "mean")
        assert [record["verdict"] for record in found] == [verdict] * 2
    gain = report.compare(cells, "pranam", "independent", "mean")[0]["gain"]
    assert gain == pytest.approx(10, rel=0.1)
    assert cells["Ackley", "Adam", "pranam"].solved == 1
    # A replica that diverged counts as its start.
    results["tanh | Adam | pranam"]["scores"][0][0] = float("nan")
    cell = report.read(results)["tanh", "Adam", "pranam"]
    assert cell.mean[0] == pytest.approx(0.1, rel=0.1)
    table = report.tables(cells)["Median of the best, with other optimizers"]
    assert "CMA-ES" in table
