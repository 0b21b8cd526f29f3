"""The code of the README and of the pages in docs/ runs, block after block."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

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
