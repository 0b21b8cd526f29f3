"""The ideas of the lab notebook: each does what its name says."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]

import flax_mnist  # noqa: E402
import ideas  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402
from methods import METHODS  # noqa: E402
from test_study import tiny_task  # noqa: E402

R = 8


def make_layers(num_layers=2):
    return pranam_optax.replicate(
        lambda key: [
            {"w": jax.random.normal(k, (3, 2)), "b": jnp.ones(2)}
            for k in jax.random.split(key, num_layers)
        ],
        0,
        R,
    )


def distance(embedding, params):
    output = embedding.apply(embedding.init(jax.random.key(0), params))
    return sum(
        np.sum((x - y) ** 2)
        for x, y in zip(jax.tree.leaves(output), jax.tree.leaves(params), strict=True)
    )


def test_replicas_of_a_pair_share_codes():
    params = make_layers()
    shared = ideas.in_groups(pranam_optax.mlp_embedding((2,)), 2)
    own = pranam_optax.mlp_embedding((1,), use_bias=False)
    output = shared.apply(shared.init(jax.random.key(0), params))
    for x in jax.tree.leaves(output):
        np.testing.assert_array_equal(x[::2], x[1::2])
        assert not np.array_equal(x[0], x[2]) or np.ptp(x) == 0
    assert distance(ideas.add(shared, own), params) < 0.9 * distance(shared, params)


def test_layer_codes_are_fitted():
    params, mean = make_layers(), ideas.mean_embedding()
    assert distance(ideas.layer_codes(2, 4), params) < 0.7 * distance(mean, params)


def test_scaled_output_leaves_the_range_of_its_activation():
    params = jax.random.normal(jax.random.key(0), (R, 5)) * 100
    plain = ideas.bounded(jnp.tanh)
    assert distance(ideas.scaled(plain), params) < 0.5 * distance(plain, params)


def test_cross_fade_goes_from_one_link_to_the_other():
    link = ideas.cross_fade(optax.scale(1.0), optax.scale(3.0), 2)
    state, seen = link.init(jnp.ones(2)), []
    for _ in range(4):
        updates, state = link.update(jnp.ones(2), state)
        seen.append(float(updates[0]))
    assert seen == [1.0, 2.0, 3.0, 3.0]


def test_layers_are_released_in_turn(optax_promotion):
    params = make_layers()
    grads = jax.tree.map(lambda x: x + 1, params)
    idea = ideas.IDEAS["first layer released first"](4.0, 1.0)
    tx = idea(optax.identity(), 4, R)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):  # the first layer is coupled for two steps of four
        updates, state = update(grads, state, params)
    first, last = (
        optax.tree.norm(
            jax.tree.map(
                jnp.subtract,
                updates[i],
                optax.tree.scale(
                    (optax.tree.size(grads[i]) ** 0.5) / optax.tree.norm(grads[i]),
                    grads[i],
                ),
            )
        )
        for i in (0, 1)
    )
    assert first < 1e-4 < 0.1 < last


def test_weights_follow_squares_and_the_best():
    grads = jnp.array([[1.0], [2.0], [3.0]])
    updates, _ = ideas.squared().update(grads, optax.EmptyState())
    np.testing.assert_allclose(updates[:, 0], np.array([1, 8, 27]) * 3 / 14, rtol=1e-5)

    link = ideas.to_the_best(2)
    state, shares = link.init(grads), []
    for _ in range(3):
        updates, state = link.update(grads, state, values=jnp.array([0.0, 1.0, 2.0]))
        shares.append(float(updates[0, 0]))
    assert 1 < shares[0] < 1.2 < 2 < shares[1] <= 3
    assert shares[2] == 1


def test_noise_in_the_codes_is_relative_to_their_spread(optax_promotion):
    params = jax.random.normal(jax.random.key(0), (512, 6))
    grads = jax.random.normal(jax.random.key(1), (512, 6))
    state = pranam_optax.pranam().init(params)
    table = state.embedding.args[0].table
    for noise in (0.5, 2.0):
        moved = ideas.shake(noise, state).embedding.args[0].table - table
        ratio = moved.std(axis=0) / table.std(axis=0)
        np.testing.assert_allclose(ratio, noise, rtol=0.1)
    again = ideas.shake(0.5, state._replace(count=state.count + 1))
    assert not np.array_equal(again.embedding.args[0].table, table)

    plain = METHODS["pranam"](optax.identity(), 10, 512)
    still = ideas.shaken(0.0)(4.0, 0.6)(optax.identity(), 10, 512)
    expected, found = (
        tx.update(grads, tx.init(params), params)[0] for tx in (plain, still)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_split_batches_are_drawn_by_each_replica(optax_promotion):
    task = tiny_task()._replace(
        init=lambda key: jnp.zeros(2),
        loss=lambda data, place, x, key: jnp.sum((x - jax.random.normal(key, 2)) ** 2),
    )
    spread = {}
    for batch in ("shared", "split"):
        start = study.pick(study.make_starts(task._replace(batch=batch), [0, 1]), 0)
        # Where all replicas are the same, the unit of the rate would be zero.
        params = start.params + jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
        run = study.make_run(task._replace(batch=batch), "normalised", "SGD", 2)
        scores = np.asarray(jax.jit(run)((), start._replace(params=params), 0.1).scores)
        spread[batch] = scores[0] != scores[2]
    assert spread == {"shared": False, "split": True}


def test_batches_have_their_sizes(monkeypatch, optax_promotion):
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (64, 784)), jnp.arange(64) % 10
    monkeypatch.setattr(tasks, "load_mnist", lambda _: flax_mnist.Mnist(x, y, x, y))
    made = ideas.batch_tasks(tasks.make_tasks()["MNIST 10-10"])
    assert len(made) == 13
    for name, size, num in (("R = 4, 32 each, split", 32, 4), ("R = 64, 2", 2, 64)):
        (key,) = [key for key in made if key.startswith(name) and "split" in key]
        task = made[key]()
        params = task.init(keys[1])
        losses = []
        for i in jax.random.randint(keys[2], (size,), 0, 64):
            (layer, middle, last), hidden = params, x[i]
            for part in (layer, middle):
                hidden = jax.nn.relu(hidden @ part["w"] + part["b"])
            logits = hidden @ last["w"] + last["b"]
            losses.append(-jax.nn.log_softmax(logits)[y[i]])
        found = task.loss(task.data, (), params, keys[2])
        np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)
        assert (task.num_replicas, task.batch) == (num, "split")


def test_ratios_are_paired_by_seed():
    results = report.invented()
    cells = report.read(results)
    ours, theirs = (
        cells["Ackley 30 rotated", "Adam", name] for name in ("pranam", "normalised")
    )
    assert ideas.ratio(ours, ours, "mean") == "1 (1 to 1)"
    gain = 10 ** np.mean(np.log10(ours.mean / theirs.mean))
    assert ideas.ratio(ours, theirs, "mean").startswith(f"**{gain:.2g} (")
    problems = ["Ackley 30 rotated", "tanh 4-5-1", "none"]
    table = ideas.table(results, ["pranam", "pairs"], problems, "independent")
    header, _, row = table.splitlines()  # none of what was not run
    assert header == "| idea | Ackley 30 rotated | tanh 4-5-1 | none |"
    assert row.startswith("| pranam | **0.")


@pytest.mark.parametrize(
    "name",
    [
        "pairs",
        "layer codes",
        "K 0 to 4",
        "attention",
        "code noise 0.3",
        "tanh trunk, 4 steps of L-BFGS",
    ],
)
def test_ideas_keep_the_types_of_a_training_step(name, optax_promotion):
    params = make_layers(3)
    tx = ideas.IDEAS[name](4.0, 0.6)(optax.adam(0.1), 10, R)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_saturation_is_that_of_the_fitted_output(optax_promotion):
    """With weights far beyond 1 all outputs are flat, with small ones none is."""
    for size, flat in ((50.0, 1.0), (0.1, 0.0)):
        task = tiny_task()
        draw = task.init
        task = task._replace(init=lambda key, size=size: size * jnp.sign(draw(key)))
        rows = ideas.saturation(task, 1e-6, range(2))
        assert [row[1][:4] for row in rows] == [f"{flat:.2f}"] * 4
