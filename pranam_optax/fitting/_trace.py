"""Functions as data: a program that compares by what it computes, and its numbers."""

import contextlib
import functools
import traceback
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.tree_util import Partial

from pranam_optax._tree import PyTree, scale

# Compiled programs that are kept; the one that was not used for longest is dropped.
_NUM_CACHED = 32
# Calls that are evaluated in place. Nothing is differentiated after it was traced, so
# that custom rules are not needed any more.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Program:
    """A traced function of flat arguments, apart from the numbers it closes over.

    Two programs are equal if they do the same with their numbers, whichever functions
    they were traced from.
    """

    def __init__(self, jaxpr: Jaxpr, out_tree: Any):
        self.jaxpr, self.out_tree = jaxpr, out_tree
        self.identity = (_fingerprint(jaxpr, lifted=True), out_tree)
        self._hash = hash(self.identity)  # tuples do not remember theirs

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.identity == other.identity

    def __call__(self, numbers: list[Any], *args: PyTree) -> PyTree:
        outputs = _evaluate(self.jaxpr, iter(numbers), jax.tree.leaves(args))
        return jax.tree.unflatten(self.out_tree, outputs)


def as_partial(fun: Callable[..., Any]) -> Partial:
    """The function as a pytree: the data of a Partial may change or be traced."""
    return fun if isinstance(fun, Partial) else Partial(_comparable(fun))


def trace(fun: Callable[..., PyTree], *args: PyTree) -> Partial:
    """The function, for arguments of these shapes, as a pytree of its numbers.

    Its numbers are the arrays that it closes over and the floats in its code. JAX does
    not compile anew for a function that differs in them alone.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), args)
    # Not `fun` itself: JAX would return what it traced before.
    closed, out = jax.make_jaxpr(lambda *a: fun(*a), return_shape=True)(*shapes)
    numbers = [jnp.asarray(x) for x in _numbers(closed.jaxpr, closed.consts)]
    return Partial(Program(closed.jaxpr, jax.tree.structure(out)), numbers)


def scalar_function(fun: Callable[[PyTree], jax.Array], params: PyTree) -> Partial:
    """The function as a pytree that can be differentiated once, in reverse."""
    slope = _first_that_works(
        lambda: trace(jax.value_and_grad(fun), params),
        lambda: trace(lambda p: (fun(p), jax.jacfwd(fun)(p)), params),
    )
    return Partial(_scalar, trace(fun, params), slope)


def _scalar(value: Partial, value_and_grad: Partial, params: PyTree) -> jax.Array:
    fun = jax.custom_vjp(value)
    fun.defvjp(value_and_grad, lambda grads, factor: (scale(factor, grads),))
    return fun(params)


def vector_function(fun: Callable[[PyTree], jax.Array], params: PyTree) -> Partial:
    """The function as a pytree that can be differentiated once, forward.

    Where forward differentiation fails, as with adjoint methods for differential
    equations, the tangent is the product with a Jacobian made in reverse.
    """
    value = trace(fun, params)
    slope = _first_that_works(
        lambda: trace(lambda p, t: jax.jvp(fun, (p,), (t,)), params, params),
        lambda: Partial(_by_jacobian, value, trace(jax.jacrev(fun), params)),
    )
    return Partial(_vector, value, slope)


def _vector(value: Partial, jvp: Partial, params: PyTree) -> jax.Array:
    fun = jax.custom_jvp(value)
    fun.defjvp(lambda primals, tangents: jvp(*primals, *tangents))
    return fun(params)


def only_in_reverse(fun: Any) -> bool:
    """Whether a `vector_function` can be differentiated in reverse only."""
    return (
        isinstance(fun, Partial)
        and fun.func is _vector
        and fun.args[1].func is _by_jacobian
    )


def _by_jacobian(
    value: Partial, jacobian: Partial, params: PyTree, tangents: PyTree
) -> tuple[jax.Array, jax.Array]:
    output = value(params)

    def product(matrix: jax.Array, tangent: jax.Array) -> jax.Array:
        matrix, tangent = (x.astype(output.dtype) for x in (matrix, tangent))
        return jnp.tensordot(matrix, tangent, tangent.ndim)

    parts = jax.tree.map(product, jacobian(params), tangents)
    return output, functools.reduce(jnp.add, jax.tree.leaves(parts))


def _first_that_works(
    first: Callable[[], Partial], other: Callable[[], Partial]
) -> Partial:
    """What `first` makes, or `other` where a model has no derivative that way."""
    try:
        made = first()
        program: Any = made.func
        # JAX may leave it to the evaluation to fail.
        if _has(program.jaxpr, "custom_lin"):
            raise TypeError("forward differentiation of a custom_vjp function")
        return made
    except Exception:
        try:
            return other()
        except Exception:
            # Of the two, what the caller asked for.
            pass
        raise


def _has(jaxpr: Jaxpr, name: str) -> bool:
    """Whether a primitive of this name is in a program."""

    def within(x: Any) -> bool:
        if isinstance(x, (tuple, list)):
            return any(within(y) for y in x)
        inner = x.jaxpr if isinstance(x, ClosedJaxpr) else x
        return isinstance(inner, Jaxpr) and _has(inner, name)

    return any(
        eqn.primitive.name == name or within(list(eqn.params.values()))
        for eqn in jaxpr.eqns
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says which line of a function asks for the value of what JAX traces."""
    try:
        yield
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
    ) as error:
        if isinstance(error, jax.errors.TracerArrayConversionError):
            cure = (
                "NumPy and SciPy cannot take its parameters: use jnp.exp for np.exp "
                "(import jax.numpy as jnp) and jax.scipy.special for scipy.special"
            )
        elif isinstance(error, jax.errors.TracerBoolConversionError):
            cure = (
                "a condition on parameters has no value yet: use jnp.where(condition, "
                "a, b) for if, and jnp.minimum or jnp.clip for min"
            )
        else:
            cure = (
                "parameters have no value yet: use jnp.exp for math.exp, and neither "
                "float(), int() nor .item()"
            )
        raise TypeError(f"{_line_of(error)}: {cure}") from error


def _line_of(error: Exception) -> str:
    """The line of the user's that an error comes from."""
    libraries = [str(Path(str(m.__file__)).parent) for m in (jax, np, scipy)]
    libraries.append(str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(tuple(libraries))]
    if not theirs:
        return "the function"
    return f"line {theirs[-1].lineno} of {theirs[-1].filename}, `{theirs[-1].line}`"


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """For Optax and Optimistix, which are not clean under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def call(fun: Callable[..., Any], *args: PyTree) -> Any:
    """fun(*args), compiled once for arguments of the same structure and shapes."""
    with standard_promotion():
        return _compiled(fun, jax.tree.structure(args))(*args)


@functools.lru_cache(_NUM_CACHED)
def _compiled(fun: Callable[..., Any], structure: Any) -> Callable[..., Any]:
    del structure
    return jax.jit(lambda *args: fun(*args))


def _inner(eqn: Any) -> ClosedJaxpr | None:
    """The program that an equation calls, if it is one of the calls."""
    return eqn.params.get(_CALLS.get(eqn.primitive.name))


def _lifted(x: Any) -> bool:
    """Whether a number in the code is an argument of the program."""
    aval: Any = getattr(x, "aval", None)
    return isinstance(x, Literal) and jnp.issubdtype(aval.dtype, jnp.floating)


def _numbers(jaxpr: Jaxpr, consts: list[Any]) -> Iterator[Any]:
    """The numbers, in the order in which `_evaluate` asks for them."""

    def literals(operands: Any) -> Iterator[np.ndarray]:
        return (np.asarray(x.val, x.aval.dtype) for x in operands if _lifted(x))

    yield from consts
    for eqn in jaxpr.eqns:
        yield from literals(eqn.invars)
        if inner := _inner(eqn):
            yield from _numbers(inner.jaxpr, inner.consts)
    yield from literals(jaxpr.outvars)


def _evaluate(jaxpr: Jaxpr, numbers: Iterator[Any], args: list[Any]) -> list[Any]:
    values = dict(zip(jaxpr.invars, args, strict=True))
    values |= {v: next(numbers) for v in jaxpr.constvars}

    def read(x: Any) -> Any:
        if isinstance(x, Literal):
            return next(numbers) if _lifted(x) else x.val
        return values[x]

    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        if inner := _inner(eqn):
            outputs = _evaluate(inner.jaxpr, numbers, operands)
        else:
            bound = eqn.primitive.get_bind_params(eqn.params)
            # Older versions of JAX return a pair.
            functions, params = bound if isinstance(bound, tuple) else ((), bound)
            with eqn.ctx.manager:
                outputs = eqn.primitive.bind(*functions, *operands, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= zip(eqn.outvars, outputs, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _fingerprint(jaxpr: Jaxpr, lifted: bool) -> Hashable:
    """What a program does, numbers that are lifted apart, as nested tuples."""
    index: dict[Any, int] = {}

    def variable(x: Any) -> Hashable:
        if not isinstance(x, Literal):
            return index.setdefault(x, len(index))
        return str(x.aval), None if lifted and _lifted(x) else repr(x.val)

    def parameter(x: Any, lifted: bool = False) -> Hashable:
        if isinstance(x, ClosedJaxpr):
            consts = () if lifted else tuple(parameter(c) for c in x.consts)
            return _fingerprint(x.jaxpr, lifted), consts
        if isinstance(x, Jaxpr):
            return _fingerprint(x, lifted)
        if isinstance(x, (tuple, list)):
            return tuple(parameter(y) for y in x)
        if isinstance(x, (np.ndarray, jax.Array)):
            return str(x.dtype), x.shape, np.asarray(x).tobytes()
        return _comparable(x)

    def equation(eqn: Any) -> Hashable:
        name = _CALLS.get(eqn.primitive.name)
        params = eqn.params if name is None else {name: eqn.params[name]}
        return (
            eqn.primitive.name,
            *(variable(x) for x in eqn.invars),
            *(variable(x) for x in eqn.outvars),
            *((k, parameter(x, lifted and k == name)) for k, x in params.items()),
        )

    return (
        tuple((variable(x), str(x.aval)) for x in (*jaxpr.constvars, *jaxpr.invars)),
        tuple(equation(eqn) for eqn in jaxpr.eqns),
        tuple(variable(x) for x in jaxpr.outvars),
    )


class _ByIdentity:
    """What cannot be hashed, compared by identity; as a function, if it is one."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


def _comparable(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:  # such as a dataclass that holds arrays
        return _ByIdentity(x)
    return x
