"""The code of the README and of the pages in docs/ runs, block after block."""

import collections
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import (
    as_matrix,
    assert_close,
    assert_equal,
    line_search,
    make_both,
    make_gradients,
    make_params,
    rms,
    rows,
    spread,
)

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("optax_promotion")


class Page:
    """The variables of a page: after its last block, or after one of a section's."""

    def __init__(self, name):
        self.sections = collections.defaultdict(list)
        section, namespace = "", {}
        text = (ROOT / name).read_text()
        for title, block in re.findall(
            r"^#+ (.*?)$|^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        ):
            section = title or section
            if block:
                exec(compile(block, f"{name}, {section}", "exec"), namespace)
                self.sections[section].append(dict(namespace))
        assert self.sections
        self.last = namespace

    def __getitem__(self, name):
        return self.last[name]

    def after(self, section, block=-1):
        return self.sections[section][block]


def anchors(page):
    """Of the page's titles, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*?)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in plain}


PAGES = [p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]]


@pytest.mark.parametrize("page", sorted(PAGES), ids=str)
def test_links_of(page):
    page = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target


def test_every_result_is_listed():
    folder = ROOT / "docs/results"
    text = (folder / "README.md").read_text()
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in names if name != "README.md" and name not in text]


def first_update(tx, grads, params=None, **keywords):
    params = grads if params is None else params
    return tx.update(grads, tx.init(params), params, **keywords)


def test_readme():
    example = Page("README.md")
    result, found = example["result"], example["found"]
    assert abs(result.params["frequency"] - 7) < 4 * result.standard_errors["frequency"]
    assert found.value < 0.01
    assert example["values"].mean() < 0.01
    assert example["problem"].fun(example["best"]) < 0.01


@pytest.mark.slow
def test_getting_started():
    try:
        with jax.numpy_rank_promotion("allow"):  # the model is a user's
            page = Page("docs/getting_started.md")
        result = page["result"]
        for name, true in page["truth"].items():
            error = float(result.standard_errors[name])
            assert abs(float(result.params[name]) - true) < 4 * error
        assert page["budget"].value < 1e-3
        assert page["problem"].fun(page["best"]) < 0.01
    finally:
        jax.config.update("jax_enable_x64", False)  # the page sets it, as users do


def test_inside():
    with jax.numpy_rank_promotion("allow"):
        page = Page("docs/inside.md")
        phi = page["state"].phi
        distance = page["circle"](1.0).apply(phi) - phi["center"]
    assert page["updates"].shape == (8, 5)
    assert_close(np.linalg.norm(distance, axis=1), np.ones(8), 1e-5)


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/api.md").read_text()
    listed = set(re.findall(r"(?:\.\. auto\w+:: |## pranam_optax\.)(\w+)\n", page))
    for module in (pranam_optax, pranam_optax.fitting):
        assert {name for name in vars(module) if name[0] != "_"} <= listed


def test_original():
    page = Page("docs/original.md")
    program = page.after("From the TensorFlow program to pranam_optax")
    assert jnp.all(jnp.abs(program["params"]) <= 500)

    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    partition = page.after("The optimizer")["tx"]
    assert_close(first_update(partition, params)[0]["b"], -1e-3, 1e-5)
    embedding = page["shared_row"](8)
    tx = pranam_optax.reparametrize(optax.adam(1e-3), embedding)
    updates, state = first_update(tx, params)
    assert_close(params["w"] + updates["w"], embedding.apply(state.phi)["w"], 1e-5)
    updates, _ = first_update(page["tf1_adam"](0.1), params)
    assert_close(updates, {"w": -0.1, "b": -0.1}, 1e-5)


def test_composition():
    page = Page("docs/composition.md")
    assert page["grad_fn"](page["params"])[0].mean() > 20
    assert page["values"].mean() < 0.01
    # Polyak's steps may throw a replica out of the minimum, alone.
    assert jnp.median(page["polyak_values"]) < 0.01
    assert page["polished_values"].mean() <= page["values"].mean()
    assert jnp.all(jnp.isfinite(page["sam_params"]))
    assert page["released"][0].count == 400
    assert page["released"][1][0].count == 0


def test_frameworks():
    page = Page("docs/frameworks.md")
    nnx = page.after("Flax NNX")
    assert_close(nnx["functional_losses"], nnx["losses"], 1e-2, 1e-4)
    for name in ("Plain pytrees", "Flax Linen", "Flax NNX", "Equinox"):
        recipe = page.after(name)
        losses = np.stack(recipe["losses"])
        assert losses.shape == (30, 8)
        assert losses[-1].mean() < 0.5 * losses[0].mean()
        if "prediction" in recipe:  # of the best after one more step
            best = np.mean((recipe["prediction"][:, 0] - recipe["data"].y) ** 2)
            assert best < 1.5 * recipe["values"].min()

    best = nnx["best"](nnx["data"].x)[:, 0]
    assert_close(np.mean((best - nnx["data"].y) ** 2), nnx["values"].min(), 1e-3)
    short = page.after("Flax NNX", 1)
    assert_close(short["prediction"], short["best"](short["data"].x), 1e-5)
    assert_close(short["metrics"]["loss_min"], short["values"].min(), 1e-5)
    assert short["metrics"]["nonfinite"] == 0


def test_elastic():
    many = Page("docs/elastic.md").after("One model out of many")
    mean = many["statistics"]["batch_stats"]["BatchNorm_0"]["mean"]
    layer = jax.tree.map(np.asarray, many["average"]["Dense_1"])
    hidden = np.asarray(many["data"].x) @ layer["kernel"] + layer["bias"]
    assert_close(mean, hidden.mean(axis=0), 1e-4, 1e-5)
    loss = np.mean((many["prediction"][:, 0] - many["data"].y) ** 2)
    assert loss < 1.5 * many["values"].mean()


def test_checkpoints():
    page = Page("docs/checkpoints.md")
    checkpoint = page.after("Checkpoints")
    run, restored = checkpoint["run"], checkpoint["restored"]
    for tree in (run, restored):
        tree["key"] = jax.random.key_data(tree["key"])
    assert_equal(run, restored)

    revived = page.after("Replicas that die")
    assert np.all(np.isfinite(revived["params"]["hidden"]))
    assert np.all(revived["left_out"] == 0)
    assert page["metrics"]["dead"] == 0


def test_devices():
    page = Page("docs/devices.md")
    assert page["params"].sharding.shard_shape((64, 30)) == (8, 30)
    assert page["heads"].sharding.shard_shape((4, 16)) == (4, 2)
    # Gradients by shard_map are those of the replicas together.
    actual = jax.jit(page["local_grad_fn"])(page["params"])
    expected = jax.jit(page["grad_fn"])(np.asarray(page["params"]))
    assert_close(actual, expected, 1e-4, 1e-5)
    assert page["values"].mean() < page.after("Several devices", 0)["values"].mean()


@pytest.mark.slow
def test_fitting():
    try:
        with jax.numpy_rank_promotion("allow"):  # the model is a user's
            page = Page("docs/fitting.md")
        result, truth = page["result"], page["truth"]
        assert result.confirmed
        order = np.argsort(result.params["center"])
        deviation = result.params["center"][order] - truth["center"]
        errors = result.standard_errors["center"][order]
        assert np.all(np.abs(deviation) < 4 * errors)
        results = page["results"]
        assert_close(results.params["slope"], page["slopes"], 1e-6)
        assert page["first"].covariance.shape == (2, 2)
        low, high = page["low"], page["high"]
        assert np.all((low < truth["center"]) & (truth["center"] < high))
        together = page["same_width"].params
        assert_close(together["center"], truth["center"], 0.05)
        assert_close(together["width"], np.full(2, 20.0))
    finally:
        jax.config.update("jax_enable_x64", False)  # the page sets it, as users do


@pytest.mark.slow
def test_odes():
    try:
        with jax.numpy_rank_promotion("allow"):
            page = Page("docs/odes.md")
            result = page["result"]
            assert page["close"]
            for name, true in page["truth"].items():
                error = float(result.standard_errors[name])
                assert abs(float(result.params[name]) - true) < 4 * error
            theta = {"theta": jnp.array(300.0), "size": jnp.array(1.0)}
            cold = page["debye"](theta, jnp.array([5.0]))[0] / 5.0**4
            assert_close(cold, np.pi**4 / 15, 2e-2)
    finally:
        jax.config.update("jax_enable_x64", False)


# docs/recipes.md and docs/recipes_advanced.md: each recipe against its formula


@pytest.fixture(scope="module")
def pages():
    jax.config.update("jax_numpy_rank_promotion", "allow")  # the recipes are a user's
    with jax.numpy_dtype_promotion("standard"):
        pages = Page("docs/recipes.md"), Page("docs/recipes_advanced.md")
    yield pages
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def recipes(pages):
    return pages[0]


@pytest.fixture
def advanced(pages):
    return pages[1]


@pytest.fixture
def grads(recipes):
    return recipes["grad_fn"](recipes["initial"])[1]


def test_variance_of_the_noise_falls(recipes):
    """As eta / t^gamma, and no two replicas share it."""
    zeros, noise = jnp.zeros((2, 10_000)), recipes["noise"]
    state = noise.init(zeros)
    for t in range(1, 5):
        drawn, state = noise.update(zeros, state)
        assert_close(drawn.var(axis=1), 0.1 / t**0.55, 0.05)
        assert abs(np.corrcoef(drawn)[0, 1]) < 0.05


def test_each_replica_is_clipped_to_norm_1_or_left_as_it_is(recipes, grads):
    scaled = grads * np.geomspace(1e-3, 1e3, recipes["R"])[:, None].astype("f4")
    clipped, _ = first_update(recipes["clip"], scaled)
    expected = np.minimum(np.linalg.norm(scaled, axis=1), 1)
    assert_close(np.linalg.norm(clipped, axis=1), expected, 1e-5)


def test_averages(recipes):
    averaged = recipes.after("Averages of the weights")
    path = np.stack(averaged["path"])
    weights = 0.9 ** np.arange(len(path))[::-1]
    expected = np.tensordot(weights / weights.sum(), path, 1)
    assert_close(averaged["average"], expected, 1e-4, 1e-5)
    assert averaged["average_values"].mean() < averaged["values"].mean()


@pytest.mark.parametrize(
    ("name", "points"),
    {
        "warmup": {0: 0, 10: 1.5, 20: 3, 110: 1.5, 200: 0},
        # Cycles of 40, 60 and 100 steps.
        "restarts": {0: 0, 4: 3, 22: 1.5, 40: 0, 44: 3, 72: 1.5, 100: 0, 104: 3},
        "coupling": {0: 1, 12: 0.5, 24: 0, 40: 1, 58: 0.5, 76: 0, 100: 1, 160: 0},
        "one_cycle": {0: 3 / 25, 60: 3, 200: 3 / 25e4},
        "growing": {0: 0.01, 50: 0.1, 100: 1, 200: 100},
        "share": {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1},
    }.items(),
)
def test_schedules(name, points, recipes):
    for step, value in points.items():
        assert_close(recipes[name](step), value, 1e-4, 1e-6)


def test_range_test(recipes):
    rates, curve = recipes["rates"], recipes["curve"]
    assert curve.shape == (recipes["NUM_STEPS"], recipes["R"])
    # The lowest loss is inside the range.
    assert min(curve[0].mean(), curve[-1].mean()) > 1.5 * curve.mean(axis=1).min()
    assert recipes["guess"] == rates[np.argmin(curve.mean(axis=1))] / 3


def test_resampling_is_below_the_same_run_without(recipes):
    plain = recipes["initial"]
    state = recipes["tx"].init(plain)
    for _ in range(recipes["NUM_STEPS"]):
        plain, state, values = recipes["step"](plain, state)
    resampled = recipes.after("Resampling")
    assert resampled["values"].mean() < values.mean()
    assert resampled["num_steps"] == 199


def test_a_quarter_of_the_replicas_is_free(recipes):
    params, grads = np.random.default_rng(0).normal(size=(2, 32, 5)).astype("f4")
    updates, _ = first_update(recipes["partly"], grads, params)
    # Adam's first step goes by the sign: of the gradient, where replicas are free.
    free, coupled = np.split(np.sign(updates) == -np.sign(grads), [8])
    assert np.all(free)
    assert not np.all(coupled)


def test_early_stopping(recipes):
    stopped = recipes.after("Early stopping")
    assert 120 < stopped["num_steps"] < 1000
    assert stopped["waited"] == stopped["patience"]
    best = stopped["problem"].fun(stopped["best"])
    assert_close(best, stopped["lowest"], 1e-3, 1e-5)
    assert stopped["lowest"] <= stopped["values"].min() + 1e-3


def test_curriculum(recipes):
    hardness, batches = jnp.abs(recipes["data"].y), recipes["batches"]
    for epoch in range(4):
        drawn = np.ravel(batches(epoch))
        assert len(drawn) == len(set(drawn)) == 16 * (epoch + 1)
        assert hardness[drawn].max() <= jnp.sort(hardness)[len(drawn) - 1]
    assert not np.array_equal(batches(3), batches(4))
    assert set(np.ravel(batches(3))) == set(np.ravel(batches(4)))


def test_adabound_against_the_equations_and_at_the_limits_of_its_bounds(advanced):
    adabound = advanced["adabound"]
    grads = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)

    def steps(tx):
        update, state, updates = jax.jit(tx.update), tx.init(grads[0]), []
        for g in grads:
            steps, state = update(g, state)
            updates.append(steps)
        return np.stack(updates)

    mean = square = 0.0
    expected = []
    for t, g in enumerate(grads.astype(float), 1):
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g**2
        rate = 0.5 / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        rate = np.clip(rate, 0.4 * (1 - 1 / (0.5 * t + 1)), 0.4 * (1 + 1 / (0.5 * t)))
        expected.append(-rate * mean / (1 - 0.9**t))
    actual = steps(adabound(0.5, 0.4, gamma=0.5))
    assert_close(actual, expected, 1e-3, 1e-6)
    like_adam = steps(adabound(0.5, 0.4, gamma=1e-6))
    assert_close(like_adam, steps(optax.adam(0.5)), 1e-4)
    like_sgd = steps(adabound(0.5, 0.4, gamma=1e9))
    sgd = optax.chain(optax.ema(0.9), optax.scale(-0.4))
    assert_close(like_sgd, steps(sgd), 1e-4, 1e-6)


def test_sgdw_decays_behind_the_momentum(advanced, grads):
    sgdw, link, params = advanced["sgdw"], advanced["link"], advanced["initial"]
    state, link_state, momentum = sgdw.init(params), link.init(params), 0.0
    update, pull = jax.jit(sgdw.update), jax.jit(link.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        pulled, link_state = pull(grads, link_state, params)
        momentum = 0.9 * momentum + pulled
        expected = -0.1 * (momentum + 1e-3 * params)
        assert_close(updates, expected, 1e-4, 1e-6)


def test_each_replica_has_its_own_decay(advanced, grads):
    searched, params = advanced["searched"], advanced["initial"]
    update = jax.jit(searched.update)
    with_decay, _ = update(grads, advanced["searched_state"], params)
    without, _ = update(grads, searched.init(params), params)
    expected = -advanced["decays"][:, None] * params
    assert_close(with_decay - without, expected, 1e-2, 1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("bad", [None, np.nan, -np.inf])
def test_weights_by_loss(advanced, temperature, bad):
    values = np.array([3.0, 1.0, 2.0, 6.0], np.float32)
    if bad is not None:
        values[1] = bad
    tx = advanced["weight_replicas"](temperature)
    grads = {"w": jnp.ones((4, 3))}
    updates, _ = first_update(tx, grads, values=jnp.asarray(values), other=1)
    finite = np.isfinite(values)
    v = values[finite].astype(float)
    softmin = np.exp(-(v - v.mean()) / v.std() / temperature)
    expected = np.zeros(4)
    expected[finite] = len(v) * softmin / softmin.sum()
    assert_close(updates["w"][:, 0], expected, 1e-5, 1e-7)
    # Equal losses change nothing.
    equal, _ = first_update(tx, grads, values=jnp.full(4, 2.5))
    assert_close(equal["w"], 1.0, 1e-6)


@pytest.mark.parametrize("trunk", ["dense", "attention"])
def test_a_flax_module_as_trunk(advanced, trunk):
    import flax.linen as nn

    attention = trunk == "attention"
    module = advanced["Attention"]() if attention else nn.Dense(5)
    params = make_params(8)
    embedding = advanced["flax_embedding"](module, 8)
    phi = jax.jit(embedding.init)(jax.random.key(0), params)
    features = module.apply(phi.trunk, phi.table)
    output = embedding.apply(phi)
    for name in params:  # g(Z) B + beta
        expected = np.tensordot(features, phi.heads[name], 1) + phi.bias[name][None]
        assert_close(output[name], expected, 1e-4, 1e-5)
    # Fitted: what is left is orthogonal to the features and to the bias.
    residual = as_matrix(params) - as_matrix(output)
    assert_close(features.T @ residual, 0, 1e-7, 1e-3)
    assert_close(residual.sum(axis=0), 0, 1e-7, 1e-3)
    # Behind pranam the module is trained, and dead replicas can be revived.
    tx = pranam_optax.pranam(embedding)
    state = jax.jit(tx.init)(params)
    _, state = jax.jit(tx.update)(make_gradients(params), state, params)
    pranam_optax.revive_replicas(params, state, 0, embedding=embedding)
    trunks = jax.tree.leaves(phi.trunk), jax.tree.leaves(state.phi.trunk)
    for old, new in zip(*trunks, strict=True):
        assert attention or not np.array_equal(old, new)


def test_the_algorithm_written_out_is_that_of_the_package(advanced):
    """With the line search for the optimizer; and its step is that of the optimizer."""
    (params, grads), embedding = make_both(), advanced["embedding"]
    factor = 4.0 * spread(params) / rms(grads)
    target = jax.tree.map(lambda w, g: w - factor * g, params, grads)

    @jax.jit
    def both(params):
        phi = embedding.init(jax.random.key(0), params)
        output, pull_back = jax.vjp(embedding.apply, phi)
        (gradient,) = pull_back(optax.tree.sub(output, target))
        rate = line_search(embedding.apply, phi, gradient)
        ours = advanced["projected"](optax.sgd(rate), embedding, 0.6)
        theirs = pranam_optax.pranam(embedding, coupling=0.6)
        return [first_update(tx, grads, params) for tx in (ours, theirs)]

    (updates, (phi, _)), (expected, state) = both(params)
    assert_close(updates, expected, 1e-4, 1e-5)
    assert_close(phi, state.phi, 1e-4, 1e-5)


def test_slope_and_curvature_against_the_full_hessian(advanced):
    def fun(params):
        return jnp.sum(jnp.tanh(params["w"]) ** 2) * params["b"] ** 2

    params = make_params()
    slopes, curvatures = advanced["slope_and_curvature"](fun)(params)
    for r in range(6):
        flat, unflatten = jax.flatten_util.ravel_pytree(rows(params, r))
        loss = functools.partial(lambda u, v: fun(u(v)), unflatten)
        g, h = jax.grad(loss)(flat), jax.hessian(loss)(flat)
        assert_close(slopes[r], g @ g, 1e-4)
        assert_close(curvatures[r], g @ h @ g, 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(jnp.tanh, lambda z: 1 - np.tanh(z) ** 2), (jax.nn.relu, lambda z: z > 0)],
)
def test_saturation(advanced, activation, slope):
    inputs = 2 * np.random.default_rng(0).normal(size=(6, 50, 3)).astype("f4")
    flat = slope(inputs.astype(float)) < 0.2
    actual = advanced["saturation"](activation, jnp.asarray(inputs), threshold=0.2)
    assert_close(actual, flat.mean(axis=(1, 2)), 1e-6)


@pytest.mark.parametrize(
    "name", ["noisy", "clipped", "partly", "bounded", "attended", "by_adam", 0, 1, 2]
)
def test_recipes_in_the_chain(name, recipes, advanced, grads):
    named = recipes.last | advanced.last
    tx = named["scheduled"][name] if isinstance(name, int) else named[name]

    @jax.jit
    def two_steps(params):
        _, state = first_update(tx, grads, params)
        return tx.update(grads, state, params)[0]

    assert np.all(np.isfinite(two_steps(recipes["initial"])))
