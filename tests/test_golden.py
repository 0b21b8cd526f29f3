"""Trajectories stored before the code was rearranged: what it computes has not changed.

`python tests/test_golden.py` writes them anew, for a change that is meant to.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax

FILE = pathlib.Path(__file__).parent / "data" / "golden.npz"
NUM_REPLICAS, NUM_STEPS = 6, 8


def params_like(dtypes):
    keys = jax.random.split(jax.random.key(5), 2)
    return {
        "a": jax.random.normal(keys[0], (NUM_REPLICAS, 4)).astype(dtypes[0]),
        "b": 2 + jax.random.normal(keys[1], (NUM_REPLICAS, 2, 3)).astype(dtypes[1]),
    }


def rugged(params):
    x = [jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    return sum(jnp.sum(leaf**2 - jnp.cos(3 * leaf)) for leaf in x)


def trajectory(tx, dtypes=("float32", "float32"), dead=None, identical=False):
    """The params after each step; from step 3 on, `dead` has NaN in its gradient."""
    params = params_like(dtypes)
    if identical:
        params = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), params)
    tx = optax.chain(tx, optax.sgd(0.05))

    @jax.jit
    def step(params, state, count):
        _, grads = pranam_optax.replica_value_and_grad(rugged)(params)
        if dead is not None:
            spoilt = jnp.where(count >= 3, jnp.nan, grads["a"][dead, 1])
            grads["a"] = grads["a"].at[dead, 1].set(spoilt)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, out = tx.init(params), []
    for count in range(NUM_STEPS):
        params, state = step(params, state, count)
        out.append(params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x).astype(jnp.float32), *out)
    return {name: np.asarray(leaf) for name, leaf in stacked.items()}


def coupled(**kwargs):
    release = optax.linear_schedule(1.0, 0.2, NUM_STEPS)
    return pranam_optax.pranam(**{"coupling": release, "key": 3} | kwargs)


def deep():
    """From stored parameters: their warm start is a chaotic map of rounding."""
    made = pranam_optax.mlp_embedding((3, 5), activation=jnp.tanh)
    shapes = jax.eval_shape(made.init, jax.random.key(3), params_like(["float32"] * 2))
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    phi = jax.tree.unflatten(treedef, drawn)
    return pranam_optax.Embedding(lambda key, params: phi, made.apply)


def reparametrized(**kwargs):
    """Undoes the SGD that follows, since nothing may rescale what it returns."""
    tx = pranam_optax.reparametrize(optax.sgd(0.01), key=3, **kwargs)
    return optax.chain(tx, optax.scale(-20.0))


def minimized():
    def camel(p):
        x, y = p["x"], p["y"]
        return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + 4 * (y**2 - 1) * y**2

    result = pranam_optax.minimize(
        camel,
        None,
        bounds={"x": (-3, 3), "y": (-2, 2)},
        key=1,
        num_replicas=8,
        num_steps=30,
        coupling=optax.linear_schedule(1.0, 0.0, 20),
        optimizer=optax.adam(0.05),
    )
    return {
        "history": np.asarray(result.history)[:20],  # later rounding has grown
        "values": np.asarray(result.replica_values),
        "value": np.asarray(result.value),
    }


def fitted():
    def decay(p, t):
        return p["a"] * jnp.exp(-p["rate"] * t)

    t = jnp.linspace(0.0, 4.0, 30)
    result = pranam_optax.fit(
        decay,
        t,
        3 * jnp.exp(-1.5 * t) + 0.1 * jnp.sin(7 * t),
        bounds={"a": (0, 10), "rate": (0, 10)},
        key=1,
        num_replicas=8,
        num_steps=30,
        coupling=optax.linear_schedule(1.0, 0.0, 20),
        optimizer=optax.adam(0.05),
    )
    return {
        "history": np.asarray(result.history)[:20],  # later rounding has grown
        "errors": np.asarray(jax.tree.leaves(result.standard_errors)),
        "params": np.asarray(jax.tree.leaves(result.params)),
        "chi_square": np.asarray(result.chi_square),
    }


CASES = {
    "finite": lambda: trajectory(coupled()),
    "dead": lambda: trajectory(coupled(), dead=2),
    "mixed": lambda: trajectory(coupled(), dtypes=("bfloat16", "float32")),
    "half": lambda: trajectory(
        coupled(normalize_updates=False), dtypes=("float32", "float16"), dead=1
    ),
    "per_replica": lambda: trajectory(
        coupled(coupling=jnp.linspace(0.0, 1.0, NUM_REPLICAS), step_size=1.0)
    ),
    "scaled": lambda: trajectory(coupled(normalize_updates=False)),
    "identical": lambda: trajectory(coupled(), identical=True),
    "deep": lambda: trajectory(coupled(embedding=deep())),
    "reparametrize": lambda: trajectory(reparametrized()),
    "reparametrize_dead": lambda: trajectory(reparametrized(), dead=2),
    "minimize": minimized,
    "fit": fitted,
}


@pytest.mark.optimized
@pytest.mark.usefixtures("optax_promotion")
@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_that_of_before(case):
    stored = np.load(FILE)
    for name, actual in CASES[case]().items():
        expected = stored[f"{case}/{name}"]
        size = np.nanmax(np.abs(expected))
        # The coupled phase of `minimize` multiplies rounding errors by a hundred, and
        # some CPUs round float16 more often than others.
        tolerance = {"minimize": 1e-4, "half": 1e-3}.get(case, 1e-5)
        np.testing.assert_allclose(
            actual, expected, rtol=tolerance, atol=tolerance * size
        )


if __name__ == "__main__":
    arrays = {
        f"{case}/{name}": array
        for case, run in CASES.items()
        for name, array in run().items()
    }
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)
    print(FILE, FILE.stat().st_size, "bytes")
