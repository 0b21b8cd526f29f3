"""Parameters of a fit that are held, tied to others, or exchangeable."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr

from pranam_optax._tree import PyTree, is_traced
from pranam_optax.fitting._coordinates import Bounds
from pranam_optax.fitting._trace import as_partial


class Constraints(NamedTuple):
    """The parameters that are not free, by name: a pytree.

    Attributes:
      held: their values.
      tied: functions of all the others.
    """

    held: dict[str, jax.Array]
    tied: dict[str, Partial]

    def complete(self, free: PyTree) -> PyTree:
        """All params of one model, from those that are free."""
        if not (self.held or self.tied):
            return free
        given = free | self.held
        return given | {
            name: jnp.asarray(tie(given)) for name, tie in self.tied.items()
        }


def make_constraints(fixed: Mapping[str, Any] | None) -> Constraints:
    """Constraints from a dict of numbers, arrays and functions."""
    if not isinstance(fixed, Mapping | None):
        raise TypeError(
            f"fixed must be a dict from names to values or functions, got {fixed!r}"
        )
    given = dict(fixed or {})
    return Constraints(
        {k: _held(k, v) for k, v in given.items() if not callable(v)},
        {k: as_partial(v) for k, v in given.items() if callable(v)},
    )


def _held(name: str, value: Any) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(float)
    if not is_traced(array) and not bool(jnp.all(jnp.isfinite(array))):
        raise ValueError(f"fixed[{name!r}] must be finite, got {value!r}")
    return array


def free_part(tree: PyTree, constraints: Constraints, name: str) -> PyTree:
    """A tree of params, bounds or shapes without those that are not free."""
    gone = constraints.held | constraints.tied
    if not gone or tree is None:
        return tree
    if isinstance(tree, Mapping):
        return {k: v for k, v in tree.items() if k not in gone}
    if callable(tree):
        return lambda key: free_part(tree(key), constraints, f"{name}(key)")
    raise ValueError(
        f"fixed needs params that are a dict, so that {', '.join(gone)} can be left "
        f"out, but {name} is {tree!r}"
    )


def check_read(
    model: Callable[[PyTree], Any], constraints: Constraints, free: PyTree
) -> None:
    """Checks that the model reads every parameter that is held or tied."""
    held, tied = constraints
    if not (held or tied):
        return
    given = free | held
    others = held | {name: jax.eval_shape(tie, given) for name, tie in tied.items()}

    def outputs(others: PyTree) -> Any:
        given = free | {name: others[name] for name in held}
        return model(free | others), [tie(given) for tie in tied.values()]

    jaxpr = jax.make_jaxpr(outputs)(others).jaxpr
    read = {x for eqn in jaxpr.eqns for x in eqn.invars if not hasattr(x, "val")}
    paths = jax.tree_util.tree_leaves_with_path(others)
    for (path, _), x in zip(paths, jaxpr.invars, strict=True):
        if x not in read:
            raise ValueError(f"the model does not read fixed{keystr(path)}")


def make_exchangeable(
    names: Sequence[str] | Sequence[Sequence[str]], bounds: Bounds
) -> tuple[tuple[str, ...], ...]:
    """Groups of names whose entries along axis 0 are terms that may be permuted."""
    if isinstance(names, str):
        names = (names,)
    one = bool(names) and all(isinstance(name, str) for name in names)
    groups: Any = [tuple(group) for group in ([names] if one else names)]
    for group in groups:
        for name in group:
            _check_exchangeable(name, group[0], bounds)
    return tuple(groups)


def _check_exchangeable(name: str, first: str, bounds: Bounds) -> None:
    free = bounds.low
    if not isinstance(free, dict) or name not in free or first not in free:
        known = ", ".join(free) if isinstance(free, dict) else "those of no dict"
        raise ValueError(
            f"exchangeable has {name!r}, which is none of the free parameters ({known})"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(free[name]):
        where, lead = f"{name}{keystr(path)}", jnp.shape(free[first])[:1]
        if jnp.shape(leaf)[:1] != lead or not lead:
            raise ValueError(
                f"exchangeable terms lie along axis 0, but {where} has shape "
                f"{jnp.shape(leaf)} and {first} has shape {jnp.shape(free[first])}"
            )
    for side in bounds:
        if not is_traced(side[name]) and np.any(
            np.asarray(side[name]) != np.asarray(side[name])[:1]
        ):
            raise ValueError(
                f"exchangeable terms need equal bounds, but those of {name} differ"
            )


def in_order(params: PyTree, groups: tuple[tuple[str, ...], ...]) -> PyTree:
    """Params with exchangeable terms sorted by the first parameter of each group."""
    for group in groups:
        first = params[group[0]]
        order = jnp.argsort(first.reshape(len(first), -1)[:, 0])
        params = params | {name: params[name][order] for name in group}
    return params
