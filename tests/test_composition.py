"""`pranam` before every optimizer of Optax, and inside and outside its wrappers."""

import functools
import inspect
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import conftest
import pranam_optax
from conftest import assert_equal, make_gradients, scaled, slow_unless

R, NUM_STEPS = 8, 60

pytestmark = pytest.mark.usefixtures("optax_promotion")


def loss(params):
    """Ripples on a bowl: 3 local minima per weight near the start, the deepest is 0."""
    terms = [jnp.sum(x**2 + 1 - jnp.cos(4 * x)) for x in jax.tree.leaves(params)]
    return sum(terms) / 9


def total_loss(params):
    return jnp.sum(jax.vmap(loss)(params))


grad_fn = pranam_optax.replica_value_and_grad(loss)


@pytest.fixture(scope="module")
def params():
    shapes = {"w": (R, 2, 3), "b": (R, 3)}
    drawn = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return scaled(2.0, make_gradients(drawn))


@pytest.fixture(scope="module")
def fitted(params):
    """The default embedding, fitted once."""
    embedding = pranam_optax.mlp_embedding()
    phi = jax.jit(embedding.init)(jax.random.key(0), params)
    return embedding._replace(init=lambda key, params: phi)


@pytest.fixture(scope="module")
def link(fitted):
    """Makes the link: `pranam`, released over the run."""
    release = optax.linear_schedule(1.0, 0.0, NUM_STEPS)
    return lambda **kwargs: pranam_optax.pranam(fitted, coupling=release, **kwargs)


def make_step(tx, keywords):
    def step(params, state):
        values, grads = grad_fn(params)
        given = {k: f(params, values, grads) for k, f in keywords.items()}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state, values

    return step


def train(tx, params, keywords, num_steps=NUM_STEPS):
    """Losses of all replicas before each step, and the last params and state."""
    step = make_step(tx, keywords)

    def scan_step(carry, _):
        params, state, values = step(*carry)
        return (params, state), values

    def run(params):
        return jax.lax.scan(scan_step, (params, tx.init(params)), None, num_steps)

    (params, state), values = jax.jit(run)(params)
    chex.assert_tree_all_finite((params, values))
    return values, params, state


# Every optimizer


MARKS = {"learning_rate", "max_learning_rate", "base_optimizer", "adv_optimizer"}


def optimizers():
    """All that Optax exports and that has a learning rate or wraps an optimizer."""
    found = {}
    for module in (optax, contrib):
        for name, factory in inspect.getmembers(module, inspect.isfunction):
            arguments = inspect.signature(factory).parameters
            link = name.startswith(("_", "scale_by_"))
            if not link and not MARKS.isdisjoint(arguments):
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
    "dog": {"learning_rate": 1.0, "init_step": ("distance", 0.3)},
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


# What needs more than `chain(pranam(), optimizer)`: the transformation, and keywords
# of update as functions of the params, the losses and the gradients.


LOSSES = {"values": lambda params, values, grads: values}
LINE_SEARCH = LOSSES | {
    "grad": lambda params, values, grads: grads,
    "value_fn": lambda params, values, grads: loss,
}


def in_units_of_the_loss(optimizer):
    def recipe(link):
        tail = pranam_optax.per_replica(optimizer)
        return optax.chain(link(normalize_updates=False), tail), LOSSES

    return recipe


def around_sgd(wrap, rate):
    return lambda link: (wrap(optax.chain(link(), optax.sgd(rate))), {})


def sam(link):
    climb = optax.chain(contrib.normalize(), optax.sgd(0.05))
    descend = optax.chain(link(), optax.adam(0.1))
    tx = contrib.sam(descend, pranam_optax.per_replica(climb), opaque_mode=True)
    return tx, {"grad_fn": lambda *_: lambda params, step: grad_fn(params)[1]}


LBFGS, SGD = pranam_optax.per_replica(optax.lbfgs()), optax.sgd(0.1)
RECIPES = {
    "lbfgs": lambda link: (optax.chain(link(), LBFGS), LINE_SEARCH),
    "mechanize": around_sgd(contrib.mechanize, 1.0),
    "momo": in_units_of_the_loss(contrib.momo()),
    "momo_adam": in_units_of_the_loss(contrib.momo_adam(learning_rate=0.1)),
    "polyak_sgd": in_units_of_the_loss(optax.polyak_sgd()),
    "sam": sam,
    "schedule_free": around_sgd(lambda tx: contrib.schedule_free(tx, 0.1), 0.1),
    "sophia": lambda link: (
        optax.chain(link(), contrib.sophia(0.1)),
        {"obj_fn": lambda *_: total_loss},
    ),
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


def behind_pranam(name, link):
    if name in RECIPES:
        return RECIPES[name](link)
    return optax.chain(link(), make_optimizer(name)), {}


TESTED = [name for name in OPTIMIZERS if name not in EXEMPTED]
# One of each kind; the others are compiled in the slow tests.
KINDS = ["adam", "momo", "muon", "sam"]


@pytest.mark.parametrize("name", TESTED)
def test_every_optimizer_is_traced_once(name, link, params):
    """A step leaves all types as they were."""
    tx, keywords = behind_pranam(name, link)

    def old_and_new(params):
        start = params, tx.init(params)
        return start, make_step(tx, keywords)(*start)[:2]

    old, new = jax.eval_shape(old_and_new, params)
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


@pytest.mark.parametrize("name", slow_unless(KINDS, TESTED))
def test_every_optimizer_descends_behind_pranam(name, link, params):
    tx, keywords = behind_pranam(name, link)
    values, _, state = train(tx, params, keywords)
    # A line search takes back part of the pull over barriers (docs/composition.md).
    part = 0.7 if name == "lbfgs" else 0.5
    assert values[-1].mean() < part * values[0].mean()
    # What the embedding counts is in the state, wherever the optimizer keeps it.
    assert_equal(optax.tree.get(state, "nonfinite"), np.zeros(R))


@pytest.mark.slow
def test_line_search_after_the_release(link, params):
    """The use of L-BFGS: each replica to the bottom of the valley that it is in."""
    _, params, _ = train(optax.chain(link(), optax.adam(0.1)), params, {})
    values, params, _ = train(LBFGS, params, LINE_SEARCH, 20)
    _, grads = grad_fn(params)
    assert jnp.all(values[-1] <= values[0])
    assert values[-1].mean() < 0.8
    for g in jax.tree.leaves(grads):
        np.testing.assert_allclose(g, 0.0, atol=1e-5)


# Every wrapper


MEAN = pranam_optax.mlp_embedding(())


def small_pranam(**kwargs):
    """With the quickest embedding to compile: the mean of the replicas."""
    return pranam_optax.pranam(MEAN, **{"coupling": 0.5, **kwargs})


@pytest.fixture(scope="module")
def grads(params):
    return jax.jit(grad_fn)(params)[1]


@pytest.fixture(scope="module")
def pulled(grads, params):
    """What `small_pranam` makes of the gradients."""
    return run_updates(small_pranam(), params, grads)[0][0]


def run_updates(tx, params, *gradients, keywords=({},)):
    """Updates for these gradients one after the other, and the last state."""

    def run(gradients, keywords):
        state, every = tx.init(params), []
        for grads, given in zip(gradients, keywords, strict=True):
            updates, state = tx.update(grads, state, params, **given)
            every.append(updates)
        return every, state

    if len(keywords) < len(gradients):
        keywords = list(keywords) * len(gradients)
    return jax.jit(run)(gradients, keywords)


assert_close = functools.partial(conftest.assert_close, rtol=1e-5, atol=1e-6)
LINKS = [small_pranam(), pranam_optax.reparametrize(SGD, MEAN)]


@pytest.mark.parametrize("link", LINKS)
def test_partition(link, params, grads):
    tx = optax.partition(
        {"coupled": link, "direct": SGD}, {"w": "coupled", "b": "direct"}
    )
    (updates,), state = run_updates(tx, params, grads)
    (expected,), _ = run_updates(link, {"w": params["w"]}, {"w": grads["w"]})
    assert_close(updates, {"w": expected["w"], "b": -0.1 * grads["b"]})
    found = state.inner_states["coupled"].inner_state
    assert MEAN.apply(found.phi)["w"].shape == params["w"].shape


@pytest.mark.parametrize("link", LINKS)
def test_multi_steps(link, params, grads):
    """Two micro-batches whose gradients' mean is that of the whole batch."""
    noise = jax.tree.map(jnp.sin, params)
    batches = [jax.tree.map(lambda g, n: g + s * n, grads, noise) for s in (1, -1)]
    (first, second), state = run_updates(optax.MultiSteps(link, 2), params, *batches)
    (expected,), _ = run_updates(link, params, grads)
    assert_close(first, scaled(0.0, grads))
    assert_close(second, expected)
    assert state.inner_opt_state.count == 1


@pytest.mark.parametrize("outside", [True, False])
def test_apply_if_finite(params, grads, outside):
    """Outside it sees the dead replica and stops all; inside there is none to see."""
    spoiled = jax.tree.map(lambda g: g.at[2].set(jnp.nan), grads)
    if outside:
        tx = optax.apply_if_finite(optax.chain(small_pranam(), optax.scale(2.0)), 3)
    else:
        tx = optax.chain(small_pranam(), optax.apply_if_finite(optax.scale(2.0), 3))
    (updates,), state = run_updates(tx, params, spoiled)
    assert optax.tree.get(state, "notfinite_count") == outside
    for u in jax.tree.leaves(updates):
        moved = jnp.any(u != 0, axis=range(1, u.ndim))
        assert_equal(moved, [(r != 2) and not outside for r in range(R)])


def test_masked_leaves_are_left_alone(params, grads, pulled):
    tx = optax.masked(small_pranam(), {"w": True, "b": True, "steps": False})
    steps = {"steps": jnp.arange(3)}
    (updates,), _ = run_updates(tx, params | steps, grads | steps)
    assert_close(updates, pulled | steps)


def test_lookahead(params, grads, pulled):
    descend = optax.chain(small_pranam(), SGD)
    tx = optax.lookahead(descend, sync_period=1, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(params)
    state = tx.init(both)
    updates, _ = jax.jit(tx.update)(grads, state, both)
    assert_close(updates.slow, scaled(-0.05, pulled))
    assert_close(updates.fast, scaled(-0.05, pulled))


def test_schedule_free(params, grads, pulled):
    tx = contrib.schedule_free(optax.chain(small_pranam(), SGD), 0.1)
    (updates,), state = run_updates(tx, params, grads)
    assert_close(updates, scaled(-0.1, pulled))  # the first: no average yet
    moved = optax.apply_updates(params, updates)
    assert_close(contrib.schedule_free_eval_params(state, moved), moved)


def test_flatten(params, grads, pulled):
    """Behind pranam, which needs the replica axis, and within each replica."""
    tx = optax.chain(small_pranam(), optax.flatten(optax.clip_by_global_norm(1.0)))
    (updates,), _ = run_updates(tx, params, grads)
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(pulled)))
    assert_close(updates, scaled(1.0 / norm, pulled))
    tx = pranam_optax.per_replica(optax.flatten(optax.scale(2.0)))
    (updates,), _ = run_updates(tx, params, grads)
    assert_close(updates, scaled(2.0, grads))


def test_chains_in_chains_and_their_state(params, grads, pulled):
    inner = optax.chain(optax.identity(), small_pranam(), optax.scale(2.0))
    named = optax.named_chain(("inner", inner), ("ema", optax.ema(0.9, debias=False)))
    tx = optax.chain(named, SGD)
    (updates,), state = run_updates(tx, params, grads)
    assert_close(updates, scaled(-0.1 * 0.1 * 2.0, pulled))
    found = state[0]["inner"][1]
    assert isinstance(found, pranam_optax.PranamState)


@pytest.mark.parametrize("selective", [True, False])
def test_frozen_leaves(params, grads, pulled, selective):
    frozen = {"w": False, "b": True}
    if selective:  # pranam does not see them
        tx = optax.selective_transform(small_pranam(), freeze_mask=frozen)
        only_w = {"w": params["w"]}
        (expected,), _ = run_updates(small_pranam(), only_w, {"w": grads["w"]})
    else:  # it does, and then they stay
        tx = optax.chain(small_pranam(), optax.freeze(frozen))
        expected = pulled
    (updates,), _ = run_updates(tx, params, grads)
    assert_close(updates, {"w": expected["w"], "b": jnp.zeros_like(grads["b"])})


def test_getting_and_setting_what_is_in_the_state(params, grads):
    release = optax.linear_schedule(1.0, 0.0, 10)
    tx = optax.chain(small_pranam(coupling=release), optax.adam(0.1))
    state = jax.jit(tx.init)(params)

    def of_pranam(path, value):
        return getattr(path[-1], "tuple_name", None) == "PranamState"

    assert optax.tree.get(state, "count", filtering=of_pranam) == 0
    count = jnp.array(10, jnp.int32)
    state = optax.tree.set(state, of_pranam, count=count)
    assert (state[0].count, state[1][0].count) == (10, 0)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    free = optax.chain(small_pranam(coupling=0.0), optax.adam(0.1))
    (expected,), _ = run_updates(free, params, grads)
    assert_close(updates, expected)


def test_the_rate_falls_for_the_replica_on_a_plateau(params, grads):
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = optax.chain(small_pranam(), pranam_optax.per_replica(plateau))
    falling = jnp.linspace(9.0, 2.0, R)
    keywords = [{"values": (falling / (t + 1)).at[0].set(9.0)} for t in range(3)]
    updates, state = run_updates(tx, params, *[grads] * 3, keywords=keywords)
    expected, _ = run_updates(small_pranam(), params, *[grads] * 3)
    scales = np.ones(R)
    for actual, link in zip(updates, expected, strict=True):
        scaled_link = jax.tree.map(lambda u: (scales * np.asarray(u).T).T, link)
        conftest.assert_close(actual, scaled_link, 1e-5)
        scales[0] /= 2
    assert_equal(optax.tree.get(state, "scale"), [0.25] + [1] * 7)
