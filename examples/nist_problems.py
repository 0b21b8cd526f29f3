"""The 27 nonlinear regressions of the NIST Statistical Reference Datasets (StRD)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Model = Callable[[jax.Array, jax.Array], jax.Array]


class Regression(NamedTuple):
    """One data set with what NIST certifies.

    Attributes:
      model: `model(b, x)`, predictions `[num_points]` for parameters `b`.
      x: predictors, `[num_points]`, or `[num_points, 2]` for Nelson.
      y: responses, `[num_points]`.
      starts: the two official starting points, `[2, num_params]`.
      certified: certified parameters, `[num_params]`.
      deviations: certified standard deviations of the parameters, `[num_params]`.
      rss: certified residual sum of squares.
    """

    model: Model
    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    certified: np.ndarray
    deviations: np.ndarray
    rss: float


def bennett5(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (b[1] + x) ** (-1 / b[2])


def saturation(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - jnp.exp(-b[1] * x))


def chwirut(b: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


def danwood(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * x ** b[1]


def enso(b: jax.Array, x: jax.Array) -> jax.Array:
    def wave(
        period: float | jax.Array, cosine: jax.Array, sine: jax.Array
    ) -> jax.Array:
        angle = 2 * jnp.pi * x / period
        return cosine * jnp.cos(angle) + sine * jnp.sin(angle)

    return (
        b[0] + wave(12.0, b[1], b[2]) + wave(b[3], b[4], b[5]) + wave(b[6], b[7], b[8])
    )


def eckerle4(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / b[1] * jnp.exp(-0.5 * ((x - b[2]) / b[1]) ** 2)


def gauss(b: jax.Array, x: jax.Array) -> jax.Array:
    return (
        b[0] * jnp.exp(-b[1] * x)
        + b[2] * jnp.exp(-(((x - b[3]) / b[4]) ** 2))
        + b[5] * jnp.exp(-(((x - b[6]) / b[7]) ** 2))
    )


def cubic_ratio(b: jax.Array, x: jax.Array) -> jax.Array:
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (
        1 + x * (b[4] + x * (b[5] + x * b[6]))
    )


def kirby2(b: jax.Array, x: jax.Array) -> jax.Array:
    return (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4]))


def lanczos(b: jax.Array, x: jax.Array) -> jax.Array:
    return (
        b[0] * jnp.exp(-b[1] * x)
        + b[2] * jnp.exp(-b[3] * x)
        + b[4] * jnp.exp(-b[5] * x)
    )


def mgh09(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3])


def mgh10(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * jnp.exp(b[1] / (x + b[2]))


def mgh17(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4])


def misra1b(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - (1 + b[1] * x / 2) ** -2)


def misra1c(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5)


def misra1d(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * b[1] * x / (1 + b[1] * x)


def nelson(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] - b[1] * x[:, 0] * jnp.exp(-b[2] * x[:, 1])


def rat42(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / (1 + jnp.exp(b[1] - b[2] * x))


def rat43(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3])


def roszman1(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi


# In NIST's order: lower, average, higher level of difficulty.
MODELS: dict[str, Model] = {
    "Misra1a": saturation,
    "Chwirut2": chwirut,
    "Chwirut1": chwirut,
    "Lanczos3": lanczos,
    "Gauss1": gauss,
    "Gauss2": gauss,
    "DanWood": danwood,
    "Misra1b": misra1b,
    "Kirby2": kirby2,
    "Hahn1": cubic_ratio,
    "Nelson": nelson,
    "MGH17": mgh17,
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Gauss3": gauss,
    "Misra1c": misra1c,
    "Misra1d": misra1d,
    "Roszman1": roszman1,
    "ENSO": enso,
    "MGH09": mgh09,
    "Thurber": cubic_ratio,
    "BoxBOD": saturation,
    "Rat42": rat42,
    "MGH10": mgh10,
    "Eckerle4": eckerle4,
    "Rat43": rat43,
    "Bennett5": bennett5,
}


def read(name: str, text: str) -> Regression:
    """Parses one of NIST's files."""
    number = r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?|[-+]?\.\d+(?:[eE][-+]?\d+)?"
    rows = re.findall(
        rf"^\s*b\d+\s*=((?:\s+(?:{number})){{4}})\s*$", text, re.MULTILINE
    )
    params = np.array([[float(v) for v in row.split()] for row in rows])
    (rss,) = re.findall(rf"Sum of Squares:\s*({number})", text)
    (data,) = re.findall(r"^Data:[^\n]*x\d?\s*\n(.*)", text, re.MULTILINE | re.DOTALL)
    columns = np.array(
        [[float(v) for v in row.split()] for row in data.splitlines() if row.strip()]
    )
    y, x = columns[:, 0], columns[:, 1:]
    if name == "Nelson":
        y = np.log(y)
    else:
        x = x[:, 0]
    return Regression(
        MODELS[name], x, y, params[:, :2].T, params[:, 2], params[:, 3], float(rss)
    )


def load(folder: Path) -> dict[str, Regression]:
    return {name: read(name, (folder / f"{name}.dat").read_text()) for name in MODELS}
