"""What `minimize` and `fit` return and take: results, progress and refinements."""

from pranam_optax.fitting._minimize import Progress as Progress
from pranam_optax.fitting._polish import Polish as Polish
from pranam_optax.fitting._polish import Polished as Polished
from pranam_optax.fitting._polish import lbfgs as lbfgs
from pranam_optax.fitting._polish import levenberg_marquardt as levenberg_marquardt
from pranam_optax.fitting._polish import second_order as second_order
from pranam_optax.fitting._result import FitResult as FitResult
from pranam_optax.fitting._result import MinimizeResult as MinimizeResult
from pranam_optax.fitting._result import Minimum as Minimum

__all__ = [
    "FitResult",
    "MinimizeResult",
    "Minimum",
    "Polish",
    "Polished",
    "Progress",
    "lbfgs",
    "levenberg_marquardt",
    "second_order",
]
