"""`pranam` before every optimizer of Optax, and inside and outside its wrappers."""

import inspect
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import pranam_optax

R, NUM_STEPS = 8, 60

pytestmark = pytest.mark.usefixtures("optax_promotion")

# Of what matters here, the speed of the programs does not: they are many and small.
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}


def loss(params):
    """Ripples on a bowl: 3 local minima per weight near the start, the deepest is 0."""
    terms = [jnp.sum(x**2 + 1 - jnp.cos(4 * x)) for x in jax.tree.leaves(params)]
    return sum(terms) / 9


def total_loss(params):
    return jnp.sum(jax.vmap(loss)(params))


grad_fn = pranam_optax.replica_value_and_grad(loss)


@pytest.fixture(scope="module")
def params():
    def init(key):
        w_key, b_key = jax.random.split(key)
        return {
            "w": 2 * jax.random.normal(w_key, (2, 3)),
            "b": 2 * jax.random.normal(b_key, (3,)),
        }

    return jax.jit(lambda: pranam_optax.replicate(init, 0, R))()


@pytest.fixture(scope="module")
def fitted(params):
    """The default embedding, fitted once."""
    embedding = pranam_optax.mlp_embedding()
    phi = embedding.init(jax.random.key(0), params)
    return embedding._replace(init=lambda key, params: phi)


@pytest.fixture(scope="module")
def link(fitted):
    """Makes the link: `pranam`, released over the run."""
    release = optax.linear_schedule(1.0, 0.0, NUM_STEPS)
    return lambda **kwargs: pranam_optax.pranam(fitted, coupling=release, **kwargs)


def train(tx, params, num_steps=NUM_STEPS, **extra_args):
    """Losses of all replicas before each step, and the last params and state."""

    def step(carry, _):
        params, state = carry
        values, grads = grad_fn(params)
        keywords = {k: f(params, values, grads) for k, f in extra_args.items()}
        updates, state = tx.update(grads, state, params, **keywords)
        return (optax.apply_updates(params, updates), state), values

    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), None, num_steps)

    # The types of the state do not change, so that a jitted step compiles once.
    old = jax.eval_shape(lambda: (params, tx.init(params)))
    new = jax.eval_shape(lambda: step((params, tx.init(params)), None)[0])
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)

    run = jax.jit(run, compiler_options=QUICK_COMPILATION)
    (params, state), values = run(params)
    chex.assert_tree_all_finite((params, values))
    return values, params, state


# Every optimizer


def optimizers():
    """All that Optax exports and that has a learning rate or wraps an optimizer."""
    found = {}
    for module in (optax, contrib):
        for name, factory in inspect.getmembers(module, inspect.isfunction):
            arguments = inspect.signature(factory).parameters
            links = name.startswith(("_", "scale_by_"))
            if not links and {
                "learning_rate",
                "max_learning_rate",
                "base_optimizer",
                "adv_optimizer",
            } & set(arguments):
                found[name] = factory
    return found


OPTIMIZERS = optimizers()

EXEMPTED = {
    "dpsgd": "takes one gradient for each example, where pranam has one per replica",
}

# Arguments other than learning_rate=0.1 where there is no default.
ARGUMENTS = {
    "adadelta": {"learning_rate": 30.0},
    "adafactor": {"learning_rate": 0.1},
    "adagrad": {"learning_rate": 0.5},
    "dog": {"learning_rate": 1.0, "reps_rel": 0.05},
    "dowg": {"learning_rate": 1.0},
    "galore": {"learning_rate": 0.1, "rank": 1},
    "lars": {"learning_rate": 20.0},
    "noisy_sgd": {"learning_rate": 0.1, "key": 0},
    "radam": {"learning_rate": 0.3},
    "schedule_free_adamw": {"learning_rate": 0.1},
    "schedule_free_sgd": {"learning_rate": 0.1},
    "simplified_ademamix": {"learning_rate": 0.003},
    "sm3": {"learning_rate": 0.3},
}


# What needs more than `chain(pranam(), optimizer)`: (link, transformation, keywords).


def losses(params, values, grads):
    return values


def replica_gradients(params, values, grads):
    return grads


def loss_of_one(params, values, grads):
    return loss


def loss_of_all(params, values, grads):
    return total_loss


def gradient_of_all(params, values, grads):
    return lambda params, step: grad_fn(params)[1]


def lbfgs(link):
    tx = optax.chain(link(), pranam_optax.per_replica(optax.lbfgs()))
    return tx, {"values": losses, "grad": replica_gradients, "value_fn": loss_of_one}


def in_units_of_the_loss(factory, **kwargs):
    def recipe(link):
        tail = pranam_optax.per_replica(factory(**kwargs))
        return optax.chain(link(normalize_updates=False), tail), {"values": losses}

    return recipe


def mechanize(link):
    return contrib.mechanize(optax.chain(link(), optax.sgd(1.0))), {}


def sam(link):
    climb = optax.chain(contrib.normalize(), optax.sgd(0.05))
    descend = optax.chain(link(), optax.adam(0.1))
    climb = pranam_optax.per_replica(climb)
    return contrib.sam(descend, climb, opaque_mode=True), {"grad_fn": gradient_of_all}


def schedule_free(link):
    descend = optax.chain(link(), optax.sgd(0.1))
    return contrib.schedule_free(descend, learning_rate=0.1), {}


def sophia(link):
    return optax.chain(link(), contrib.sophia(0.1)), {"obj_fn": loss_of_all}


RECIPES = {
    "lbfgs": lbfgs,
    "mechanize": mechanize,
    "momo": in_units_of_the_loss(contrib.momo),
    "momo_adam": in_units_of_the_loss(contrib.momo_adam, learning_rate=0.1),
    "polyak_sgd": in_units_of_the_loss(optax.polyak_sgd),
    "sam": sam,
    "schedule_free": schedule_free,
    "sophia": sophia,
}


def make_optimizer(name):
    arguments = inspect.signature(OPTIMIZERS[name]).parameters
    rate = arguments.get("learning_rate")
    given = rate is not None and rate.default is inspect.Parameter.empty
    kwargs = ARGUMENTS.get(name, {"learning_rate": 0.1} if given else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Optax's own
        return OPTIMIZERS[name](**kwargs)


def test_no_exception_is_out_of_date():
    assert {*EXEMPTED, *ARGUMENTS, *RECIPES} <= set(OPTIMIZERS)
    assert len(OPTIMIZERS) >= 50
    assert {"adam", "dog", "lbfgs", "muon", "mechanize", "sam"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in EXEMPTED])
def test_every_optimizer_descends_behind_pranam(name, link, params):
    if name in RECIPES:
        tx, keywords = RECIPES[name](link)
    else:
        tx, keywords = optax.chain(link(), make_optimizer(name)), {}
    values, _, state = train(tx, params, **keywords)
    print('RESULT', name, values[0].mean(), values[-1].mean())
    assert values[-1].mean() < 0.5 * values[0].mean()
    # What the embedding learned is in the state, wherever the optimizer keeps it.
    assert optax.tree.get(state, "nonfinite").sum() == 0
