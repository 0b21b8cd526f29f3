"""Parity with the original TensorFlow 1 program: see reference/README.md."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from pranam_optax import original

pytestmark = pytest.mark.optimized


FOLDER = pathlib.Path(__file__).parent / "reference"
R = 8


# The optimizers of TensorFlow 1, with its constants (docs/original.md)


def adam(learning_rate):
    """Epsilon is added to sqrt(v), before and not after the bias correction of v."""
    return optax.inject_hyperparams(optax.adam)(
        learning_rate, eps=lambda count: 1e-8 / jnp.sqrt(1 - 0.999 ** (count + 1.0))
    )


def adagrad(learning_rate):
    return optax.adagrad(learning_rate, initial_accumulator_value=0.1, eps=0.0)


def rmsprop(learning_rate):
    return optax.rmsprop(
        learning_rate, decay=0.9, eps=1e-10, initial_scale=1.0, eps_in_sqrt=True
    )


# The functions


def schwefel(params):
    x = -500.0 + (1000 / 2) * (params["schnet_guess"] + 1.0)
    return 418.9829 * 10 - jnp.sum(jnp.sin(jnp.sqrt(jnp.abs(x))) * x)


def tiny(params, x, y):
    prediction = jnp.sum(jnp.tanh(x @ params["w"] + params["b"][None]), axis=1)
    return jnp.mean((prediction - y) ** 2)


# The embedding: no biases, parameters as stored


def stored_params(arrays, row):
    return {k.removeprefix("clone_"): a[row] for k, a in arrays["clones"].items()}


def stored_phi(arrays, row, params, embedding):
    """The embedding's parameters at a stored row, for the leaves in `params`."""
    first, *trunk, last = (jnp.asarray(layer[row]) for layer in arrays["layers"])
    # The original concatenates the variables in the order of their creation.
    heads, start = {}, 0
    for name in ("schnet_guess", "w", "b"):
        if isinstance(params.get(name), jax.Array):
            shape = params[name].shape[1:]
            stop = start + int(np.prod(shape))
            heads[name] = last[:, start:stop].reshape(len(last), *shape)
            start = stop
    assert start == last.shape[1]
    like = jax.eval_shape(embedding.init, jax.random.key(0), params)
    return like._replace(
        table=first,
        trunk=tuple(
            layer._replace(kernel=kernel)
            for layer, kernel in zip(like.trunk, trunk, strict=True)
        ),
        heads={name: heads.get(name, x) for name, x in params.items()},
        scale=arrays["scale"],
    )


def make_embedding(arrays, output_activation):
    widths = [layer.shape[2] for layer in arrays["layers"][:-1]]
    embedding = original.mlp_embedding(
        widths, output_activation=output_activation, use_bias=False, warmup="none"
    )
    return embedding._replace(
        init=lambda key, params: stored_phi(arrays, 0, params, embedding)
    )


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        stored = {k: jnp.asarray(a) for k, a in file.items()}
    names = sorted(k for k in stored if k.startswith("FCEmbed_"))
    return {
        "clones": {k: a for k, a in stored.items() if k.startswith("clone_")},
        "layers": [stored[k] for k in names],
        "rows": [int(row) for row in stored["rows"]],
        "loss": stored["loss"],
        "scale": stored.get("scale"),
        "data": tuple(stored[k] for k in ("x", "y") if k in stored),
    }


def make_step(tx, function, minibatches=False):
    value_and_grad = pranam_optax.replica_value_and_grad(function)

    @jax.jit
    def step(params, state, k, data):
        batch = tuple(x[k] for x in data) if minibatches else data
        values, grads = value_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, values

    return step


def distance(ours, theirs):
    """max|a - b| / max|b|."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


def layers_of(phi, names):
    heads = [phi.heads[k].reshape(len(phi.heads[k]), -1) for k in names]
    return [
        phi.table,
        *(layer.kernel for layer in phi.trunk),
        jnp.concatenate(heads, axis=1),
    ]


def check_trajectory(name, tx, function, embedded, minibatches=False):
    """Runs from the stored start and compares everything that is stored."""
    arrays = load(name)
    params = stored_params(arrays, 0)
    tx = tx(arrays)
    step, state = make_step(tx, function, minibatches), tx.init(params)
    clones, losses, phis = [params], [], []
    for k in range(len(arrays["loss"])):
        phis.append(find_phi(state))
        params, state, values = step(params, state, k, arrays["data"])
        clones.append(params)
        losses.append(values)
    phis.append(find_phi(state))

    distances = {"loss": distance(losses, arrays["loss"])}
    for key, theirs in arrays["clones"].items():
        ours = [c[key.removeprefix("clone_")] for c in clones]
        distances[key] = distance(ours, theirs)
    layers = [layers_of(phis[row], embedded) for row in arrays["rows"]]
    moves = {}
    for i, theirs in enumerate(arrays["layers"]):
        ours = np.stack([layer[i] for layer in layers])
        distances[f"FCEmbed_{i}"] = distance(ours, theirs)
        moves[i] = distance(ours - ours[:1], theirs - theirs[:1])
    assert max(distances.values()) < 1e-4, distances
    # What was learned, which may be small beside where it started from.
    assert max(moves.values()) < 1e-3, moves


def find_phi(state):
    def is_state(node):
        return isinstance(node, pranam_optax.ReparametrizeState)

    (found,) = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
    return found.phi


def embedded_by(optimizer, output_activation=jnp.tanh):
    return lambda arrays: pranam_optax.reparametrize(
        optimizer, make_embedding(arrays, output_activation)
    )


@pytest.mark.parametrize(
    ("name", "optimizer", "output_activation"),
    [
        ("schwefel_sgd_small", optax.sgd(5e-8), jnp.tanh),
        ("schwefel_momentum_small", optax.sgd(1e-8, momentum=0.9), jnp.tanh),
        ("schwefel_adagrad_small", adagrad(1e-3), jnp.tanh),
        ("schwefel_rmsprop", rmsprop(1e-3), jnp.tanh),
        ("schwefel_adam", adam(1e-3), jnp.tanh),
        ("softsign_sgd_small", optax.sgd(2e-7), jax.nn.soft_sign),
        ("deep_adam_mild", adam(1e-3), jnp.tanh),
        ("rescale_sgd", optax.sgd(2e-6), jnp.tanh),
        ("rescale_sgd_reinit", optax.sgd(2e-6), jnp.tanh),
    ],
)
def test_stable_trajectories(name, optimizer, output_activation, optax_promotion):
    tx = embedded_by(optimizer, output_activation)
    check_trajectory(name, tx, schwefel, ["schnet_guess"])


@pytest.mark.parametrize(
    ("name", "learning_rate", "function", "embedded"),
    [
        ("accum4_adam", 1e-3, schwefel, ["schnet_guess"]),
        ("accum4_minibatch_adam", 1e-2, tiny, ["w", "b"]),
    ],
)
def test_accumulated_gradients(
    name, learning_rate, function, embedded, optax_promotion
):
    """The original updates first after b - 1 sub-steps, and divides by b even then."""
    b = 4

    def tx(arrays):
        return optax.MultiSteps(
            optax.chain(
                optax.scale_by_schedule(
                    lambda count: jnp.where(count == 0, (b - 1) / b, 1.0)
                ),
                embedded_by(adam(learning_rate))(arrays),
            ),
            every_k_schedule=lambda count: jnp.where(count == 0, b - 1, b),
        )

    check_trajectory(name, tx, function, embedded, minibatches=function is tiny)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("embed_vars_momentum", optax.sgd(0.05, momentum=0.9)),
        ("embed_vars_adam", adam(1e-2)),
    ],
)
def test_a_subset_of_the_variables_embedded(name, optimizer, optax_promotion):
    """Others get the gradient of the mean over the replicas: 1/R of their own."""

    def tx(arrays):
        return optax.partition(
            {
                "embedded": embedded_by(optimizer)(arrays),
                "direct": optax.chain(optax.scale(1 / R), optimizer),
            },
            {"w": "embedded", "b": "direct"},
        )

    check_trajectory(name, tx, tiny, ["w"])


@pytest.mark.parametrize(
    ("name", "optimizer", "output_activation", "move_tolerance"),
    [
        ("schwefel_sgd", optax.sgd(2e-6), jnp.tanh, 1e-3),
        ("schwefel_momentum", optax.sgd(1e-6, momentum=0.9), jnp.tanh, 1e-3),
        ("schwefel_adagrad", adagrad(1e-2), jnp.tanh, 1e-3),
        ("softsign_sgd", optax.sgd(1e-5), jax.nn.soft_sign, 1e-3),
        # Most outputs are saturated: there a gradient is zero or not by rounding, and
        # Adam makes steps of whatever is not zero.
        ("deep_adam", adam(1e-3), jnp.tanh, 0.1),
    ],
)
def test_chaotic_trajectories_one_step_at_a_time(
    name, optimizer, output_activation, move_tolerance, optax_promotion
):
    """Every step restarts from the stored weights and embedding.

    Only the optimizer's own state, which is not stored, comes from the steps before.
    """
    arrays = load(name)
    embedding = make_embedding(arrays, output_activation)
    tx = pranam_optax.reparametrize(optimizer, embedding)
    step, state = make_step(tx, schwefel), tx.init(stored_params(arrays, 0))
    for k, loss in enumerate(arrays["loss"]):
        params = stored_params(arrays, k)
        phi = stored_phi(arrays, k, params, embedding)
        params, state, values = step(params, state._replace(phi=phi), k, ())
        distances = {"loss": distance(values, loss)}
        for key, theirs in stored_params(arrays, k + 1).items():
            distances[key] = distance(params[key], theirs)
        before, after = (layers_of(p, ["schnet_guess"]) for p in (phi, find_phi(state)))
        moves = {}
        for i, theirs in enumerate(arrays["layers"]):
            distances[f"FCEmbed_{i}"] = distance(after[i], theirs[k + 1])
            moves[i] = distance(after[i] - before[i], theirs[k + 1] - theirs[k])
        assert max(distances.values()) < 1e-4, (k, distances)
        assert max(moves.values()) < move_tolerance, (k, moves)
