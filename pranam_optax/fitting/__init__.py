"""What `minimize` and `fit` return and take: results, coordinates, progress, polish."""

from pranam_optax.fitting._coordinates import Bounds as Bounds
from pranam_optax.fitting._coordinates import Coordinates as Coordinates
from pranam_optax.fitting._coordinates import draw_around as draw_around
from pranam_optax.fitting._coordinates import make_coordinates as make_coordinates
from pranam_optax.fitting._coordinates import parse_bounds as parse_bounds
from pranam_optax.fitting._fit_result import FitResult as FitResult
from pranam_optax.fitting._minimize import Progress as Progress
from pranam_optax.fitting._polish import Polish as Polish
from pranam_optax.fitting._polish import Polished as Polished
from pranam_optax.fitting._polish import lbfgs as lbfgs
from pranam_optax.fitting._polish import levenberg_marquardt as levenberg_marquardt
from pranam_optax.fitting._polish import second_order as second_order
from pranam_optax.fitting._result import MinimizeResult as MinimizeResult
from pranam_optax.fitting._result import Minimum as Minimum
from pranam_optax.fitting._result import Run as Run
from pranam_optax.fitting._scipy import scipy_method as scipy_method
