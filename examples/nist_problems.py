"""The 27 nonlinear regressions of the NIST Statistical Reference Datasets (StRD)."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from datasets import Source, find

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
    x: Any
    y: Any
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


# Of the files in lmfit's repository: NIST's, without trailing blanks.
SHA256 = {
    "Misra1a": ("45c8da1de19d1cd0bdcefe06e333dee7ec8b31fa5c58b4eada427a7777853650"),
    "Chwirut2": ("968142c6f5427d87b1fed1e1bfc8cfce1f7ae8c6b89d3fbfb4960d7ced3c1e11"),
    "Chwirut1": ("a934a583464358c8cb3f67d27a016c15ab90dadfbf5303079b33dd284134b55b"),
    "Lanczos3": ("1a9fc8e9adefdd5222ce99d71e640605b4093778af3b31f0f186bd1036cece09"),
    "Gauss1": ("c7ce799e2a6667ae682152a816e7105645d0ae50acf968339862ace9dd51e8f2"),
    "Gauss2": ("77182830681f7b4ec1eab70e44e2e63b793022a779a40e495201ee3a4a63f618"),
    "DanWood": ("e8d05d54bc3646796cf8d5291c5e39c826049df4771587263357d76c18c393c2"),
    "Misra1b": ("521c50ed2063858bfa577c1413fbc07644c8425c8cd2819da004efc3c7b5c705"),
    "Kirby2": ("64f9f1c525a76d0ca56de05bf8f053dcced5f91a6eeb156051dbcb5b9b81c374"),
    "Hahn1": ("251ab6520101c6a14d50a3f3b9472b4ab9f720852efbd735c7a3aee12a9c65f5"),
    "Nelson": ("fc368adf8ac8c17658d3be390c73382398a17fd97786bcb83dd979e3c5946514"),
    "MGH17": ("8f8c6156dce64a48fd475388401d0e51fd1ab08d55e2f72978b69e7256ae3674"),
    "Lanczos1": ("42a9c2d11fd7cbfd88f9d1e56e25fc9ec8fe89a684f452feee74c0f59ede0efc"),
    "Lanczos2": ("4a3aaac05a11811d36c473bb505f8c9183b4060a3586a876813bedd81290116f"),
    "Gauss3": ("14c252a4d796a582af55f3a4fa5f4be3b32cd02798073a526cc5ced565117a03"),
    "Misra1c": ("bf51450b3582c2bdc660fe4e7554db3210c8546b1b03429b092b6d57a5d48404"),
    "Misra1d": ("55a26f4017fe7580cc59692527068d29c94f95f27ca1f4472916d3ac29b663f8"),
    "Roszman1": ("b62c19e840e9686ed11732bd45398e07efc240cb542ac11f1b7b77368f5a89e0"),
    "ENSO": ("f27b059fb680f986a0eb44a54fa4705bff1bd2ba4b0214bb680c19e2d66f2972"),
    "MGH09": ("6913c6e6f158da10d70154b6288883e81bc17f69e6092ae87ad44977552d18bf"),
    "Thurber": ("b66224bd6ec25754af5ec16f00b25ce18ccc8c09b40ebe0acf8515d01abec0a4"),
    "BoxBOD": ("406992ecdd177696e45662e927ad26947d9f3b095e02537d50fc880f982d720a"),
    "Rat42": ("a06bacb7113903cfbf607b5243d4525b58929172f60ac54c764a268525fdda83"),
    "MGH10": ("f89e5ff39d3b77dcb8bd6df9c5f93ff9872350aadc902b68d718ee229c484fb4"),
    "Eckerle4": ("b91c6505f0f0c8504e1b4c87b2a043368a8e18bd5ecb5efeb7a0fb346e9a3e10"),
    "Rat43": ("5bcbb16649254975701acb2e07a5658a2248ce90cc22bc6f52e35e2a4cc0ee9e"),
    "Bennett5": ("e2be71fffe2a78821361ff3e71eef4549df7015911e3e8e893f3914829872ab4"),
}
SOURCE = (
    "https://raw.githubusercontent.com/lmfit/lmfit-py/"
    "fe389bbbd1fe936cd73742bd81fc6fce7ac92858/NIST_STRD/"
)


def load(
    data_dir: Path | None = None, names: Iterable[str] = MODELS
) -> dict[str, Regression]:
    """Reads problems from `data_dir`, ../shared or, in the end, the network."""
    sources = {
        f"{name}.dat": Source((f"{SOURCE}{name}.dat",), SHA256[name]) for name in names
    }
    files = find("nist_strd", sources, data_dir)
    return {name: read(name, files[f"{name}.dat"].decode()) for name in names}


# Terms of the sum that may change places, as parameters; and the signs that do not
# matter: (parameters, those that change sign with them).
_GAUSS_SYMMETRIES: Any = [((2, 3, 4), (5, 6, 7))], [(4,), (7,)]
_LANCZOS_SYMMETRIES: Any = [((0, 1), (2, 3)), ((2, 3), (4, 5)), ((0, 1), (4, 5))], []
SYMMETRIES: dict[str, Any] = {
    **dict.fromkeys(("Gauss1", "Gauss2", "Gauss3"), _GAUSS_SYMMETRIES),
    **dict.fromkeys(("Lanczos1", "Lanczos2", "Lanczos3"), _LANCZOS_SYMMETRIES),
    "MGH17": ([((1, 3), (2, 4))], []),
    "ENSO": ([((3, 4, 5), (6, 7, 8))], [(3, 5), (6, 8)]),
    "Eckerle4": ([], [(0, 1)]),
}


def equivalents(name: str, b: np.ndarray) -> np.ndarray:
    """All params that give the same model as `b`, `[..., num_params]`, on a new axis 0.

    Terms of a sum in another order, widths and periods of the other sign.
    """
    swaps, flips = SYMMETRIES.get(name, ([], []))
    found = [b]
    # Three terms have 6 orders: two rounds of exchanges make them all.
    for _ in range(2):
        for one, other in swaps:
            for x in list(found):
                y = x.copy()
                y[..., one + other] = x[..., other + one]
                found.append(y)
    for params in flips:
        for x in list(found):
            y = x.copy()
            y[..., params] *= -1
            found.append(y)
    return np.unique(np.stack(found), axis=0)


def digits(name: str, problem: Regression, b: np.ndarray) -> np.ndarray:
    """Correct digits of the worst parameter: its log relative error, at most 11.

    NIST certifies 11 digits. Of Lanczos1, whose certified minimum is below rounding,
    the digits are those of the parameters too.
    """
    with np.errstate(divide="ignore"):
        error = np.abs(equivalents(name, b) - problem.certified)
        lre = -np.log10(np.max(error / np.abs(problem.certified), axis=-1))
    return np.clip(np.nan_to_num(np.max(lre, axis=0), nan=0.0), 0, 11)
