"""The code of the README and of the pages in docs/ runs, block after block."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pranam_optax

ROOT = Path(__file__).parents[1]


def run_blocks(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    namespaces, namespace = [], {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
        namespaces.append(dict(namespace))
    return namespaces


def test_readme(optax_promotion):
    (example,) = run_blocks("README.md")
    assert example["values"].mean() < 0.01
    assert example["problem"].fun(example["best"]) < 0.01


def test_original(optax_promotion):
    program, partition, shared_row, adam = run_blocks("docs/original.md")
    assert jnp.all(jnp.abs(program["params"]) <= 500)

    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    state = partition["tx"].init(params)
    assert pranam_optax.embedding_output(state)["w"].shape == (3, 2)
    updates, _ = partition["tx"].update(params, state, params)
    np.testing.assert_allclose(updates["b"], -1e-3, rtol=1e-5)

    tx = shared_row["tx"]
    updates, state = tx.update(params, tx.init(params), params)
    output = pranam_optax.embedding_output(state)
    np.testing.assert_allclose(params["w"] + updates["w"], output["w"], rtol=1e-5)

    tx = adam["tf1_adam"](0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.1, rtol=1e-5), updates)


def test_study(optax_promotion):
    (example,) = run_blocks("docs/study.md")
    params, grads = jax.random.normal(jax.random.key(0), (2, 32, 5))
    tx = example["tx"]
    updates, _ = tx.update(grads, tx.init(params), params)
    # Adam's first step goes by the sign: of the gradient, where replicas are free.
    free, coupled = jnp.split(jnp.sign(updates) == -jnp.sign(grads), [8])
    assert jnp.all(free)
    assert not jnp.all(coupled)


def test_composition(optax_promotion):
    example = run_blocks("docs/composition.md")[-1]
    assert example["grad_fn"](example["params"])[0].mean() > 20
    for run in ("values", "weighted_values"):
        assert example[run].mean() < 0.01
    # Polyak's steps may throw a replica out of the minimum, alone.
    assert jnp.median(example["polyak_values"]) < 0.01
    assert example["polished_values"].mean() <= example["values"].mean()
    assert jnp.all(jnp.isfinite(example["sam_params"]))
    assert example["released"][0].count == 400
    assert example["released"][1][0].count == 0


def test_recipes(optax_promotion):
    (
        setup,
        _,
        _,
        averaged,
        schedules,
        ranged,
        _,
        resampled,
        stopped,
        curriculum,
        _,
        _,
        recipes,
    ) = run_blocks("docs/recipes.md")
    num_replicas, params = setup["R"], setup["initial"]
    _, grads = setup["grad_fn"](params)

    # The variance of the noise falls as eta / t^gamma, and no two replicas share it.
    zeros = jnp.zeros((2, 10_000))
    state = recipes["noise"].init(zeros)
    for t in range(1, 5):
        noise, state = recipes["noise"].update(zeros, state)
        np.testing.assert_allclose(noise.var(axis=1), 0.1 / t**0.55, rtol=0.05)
        assert abs(np.corrcoef(noise)[0, 1]) < 0.05

    # Each replica is clipped to norm 1, or left as it is.
    scales = jnp.geomspace(1e-3, 1e3, num_replicas)[:, None]
    clip = recipes["clip"]
    clipped, _ = clip.update(grads * scales, clip.init(params), params)
    np.testing.assert_allclose(
        np.linalg.norm(clipped, axis=1),
        np.minimum(np.linalg.norm(grads * scales, axis=1), 1),
        rtol=1e-5,
    )

    path = np.stack(averaged["path"])
    weights = 0.9 ** np.arange(len(path))[::-1]
    np.testing.assert_allclose(
        averaged["average"],
        np.tensordot(weights / weights.sum(), path, 1),
        rtol=1e-4,
        atol=1e-5,
    )
    assert averaged["average_values"].mean() < averaged["values"].mean()

    values = {
        "warmup": {0: 0, 10: 1.5, 20: 3, 110: 1.5, 200: 0},
        # Cycles of 40, 60 and 100 steps.
        "restarts": {
            0: 0,
            4: 3,
            22: 1.5,
            40: 0,
            44: 3,
            72: 1.5,
            100: 0,
            104: 3,
            200: 0,
        },
        "coupling": {0: 1, 12: 0.5, 24: 0, 40: 1, 58: 0.5, 76: 0, 100: 1, 160: 0},
        "one_cycle": {0: 3 / 25, 60: 3, 200: 3 / 25e4},
        "growing": {0: 0.01, 50: 0.1, 100: 1, 200: 100},
        "share": {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1},
    }
    for name, points in values.items():
        for step, value in points.items():
            np.testing.assert_allclose(
                recipes[name](step), value, rtol=1e-4, atol=1e-6, err_msg=name
            )

    rates, curve = ranged["rates"], ranged["curve"]
    assert curve.shape == (setup["NUM_STEPS"], num_replicas)
    # The lowest loss is inside the range.
    assert min(curve[0].mean(), curve[-1].mean()) > 1.5 * curve.mean(axis=1).min()
    assert ranged["guess"] == rates[np.argmin(curve.mean(axis=1))] / 3

    # Below the same run without resampling.
    plain = setup["initial"]
    state = setup["tx"].init(plain)
    for _ in range(setup["NUM_STEPS"]):
        plain, state, plain_values = setup["step"](plain, state)
    assert resampled["values"].mean() < plain_values.mean()
    assert resampled["num_steps"] == 199

    assert 120 < stopped["num_steps"] < 1000
    assert stopped["waited"] == stopped["patience"]
    np.testing.assert_allclose(
        setup["problem"].fun(stopped["best"]), stopped["lowest"], rtol=1e-3, atol=1e-5
    )
    assert stopped["lowest"] <= stopped["values"].min() + 1e-3

    hardness, batches = jnp.abs(curriculum["data"].y), curriculum["batches"]
    for epoch in range(4):
        drawn = np.ravel(batches(epoch))
        assert len(drawn) == len(set(drawn)) == 16 * (epoch + 1)
        assert hardness[drawn].max() <= jnp.sort(hardness)[len(drawn) - 1]
    assert not np.array_equal(batches(3), batches(4))
    assert set(np.ravel(batches(3))) == set(np.ravel(batches(4)))

    check_adabound(recipes["adabound"])

    # Momentum, then decay.
    sgdw, link = recipes["sgdw"], recipes["link"]
    state, link_state, momentum = sgdw.init(params), link.init(params), 0.0
    for _ in range(3):
        updates, state = sgdw.update(grads, state, params)
        pulled, link_state = link.update(grads, link_state, params)
        momentum = 0.9 * momentum + pulled
        np.testing.assert_allclose(
            updates, -0.1 * (momentum + 1e-3 * params), rtol=1e-4, atol=1e-6
        )

    # What each replica's own decay adds.
    searched, decays = recipes["searched"], recipes["decays"]
    with_decay, _ = searched.update(grads, recipes["searched_state"], params)
    without, _ = searched.update(grads, searched.init(params), params)
    np.testing.assert_allclose(
        with_decay - without, -decays[:, None] * params, rtol=1e-2, atol=1e-5
    )

    for tx in (
        recipes["noisy"],
        recipes["clipped"],
        *schedules["scheduled"],
        recipes["bounded"],
    ):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            assert np.all(np.isfinite(updates))


def check_adabound(adabound):
    """Against the equations, and at the limits of its bounds."""
    grads = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)

    def steps(tx):
        state, updates = tx.init(grads[0]), []
        for g in grads:
            update, state = tx.update(jnp.asarray(g), state)
            updates.append(update)
        return np.stack(updates)

    mean = square = 0.0
    expected = []
    for t, g in enumerate(grads.astype(float), 1):
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g**2
        rate = 0.5 / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        rate = np.clip(rate, 0.4 * (1 - 1 / (0.5 * t + 1)), 0.4 * (1 + 1 / (0.5 * t)))
        expected.append(-rate * mean / (1 - 0.9**t))
    np.testing.assert_allclose(
        steps(adabound(0.5, 0.4, gamma=0.5)), expected, rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(
        steps(adabound(0.5, 0.4, gamma=1e-6)), steps(optax.adam(0.5)), rtol=1e-4
    )
    sgd = optax.chain(optax.ema(0.9), optax.scale(-0.4))
    np.testing.assert_allclose(
        steps(adabound(0.5, 0.4, gamma=1e9)), steps(sgd), rtol=1e-4, atol=1e-6
    )


def test_frameworks(optax_promotion):
    (
        _,
        plain,
        linen,
        nnx,
        functional,
        equinox,
        embedding,
        checkpoint,
        revived,
        watched,
    ) = run_blocks("docs/frameworks.md")
    for recipe in (plain, linen, nnx, equinox):
        losses = np.stack(recipe["losses"])
        assert losses.shape == (30, 8)
        assert losses[-1].mean() < 0.5 * losses[0].mean()
    # The two forms of NNX are one algorithm.
    np.testing.assert_allclose(
        functional["functional_losses"], nnx["losses"], rtol=1e-2, atol=1e-4
    )
    for recipe in (linen, functional, equinox):  # the best after one more step
        best = np.mean((recipe["prediction"][:, 0] - recipe["data"].y) ** 2)
        assert best < 1.5 * recipe["values"].min()

    assert embedding["phi"].table.shape == (8, 4)
    assert embedding["phi"].heads["out"].shape == (4, 5, 1)
    run, restored = checkpoint["run"], checkpoint["restored"]
    assert jax.tree.structure(run) == jax.tree.structure(restored)
    for tree in (run, restored):
        tree["key"] = jax.random.key_data(tree["key"])
    jax.tree.map(np.testing.assert_array_equal, run, restored)
    np.testing.assert_array_equal(revived["restarts"], [0, 0, 0, 1, 0, 0, 0, 0])
    assert np.all(np.isfinite(revived["params"]["hidden"]))
    assert watched["metrics"]["dead"] == 0
    assert watched["metrics"]["revived"] == 1


def test_devices(optax_promotion):
    one_axis, two_axes, shards = run_blocks("docs/devices.md")
    assert one_axis["params"].sharding.shard_shape((64, 30)) == (8, 30)
    assert two_axes["heads"].sharding.shard_shape((4, 16)) == (4, 2)
    assert shards["params"].sharding.shard_shape((64, 30)) == (8, 30)
    assert shards["values"].mean() < one_axis["values"].mean()


def test_fitting(optax_promotion):
    try:
        with jax.numpy_rank_promotion("allow"):  # the model is a user's
            fitted, _, batch = run_blocks("docs/fitting.md")
        result, truth = fitted["result"], fitted["truth"]
        assert result.confirmed
        order = np.argsort(result.params["center"])
        deviation = result.params["center"][order] - truth["center"]
        errors = result.standard_errors["center"][order]
        assert np.all(np.abs(deviation) < 4 * errors)
        results = batch["results"]
        np.testing.assert_allclose(results.params["slope"], batch["slopes"], rtol=1e-6)
        assert batch["first"].covariance.shape == (2, 2)
    finally:
        jax.config.update("jax_enable_x64", False)  # the page sets it, as users do
