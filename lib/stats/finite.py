"""Numbers that can be computed with: what is NaN or infinite is refused by name before a verdict rests on it."""

import numpy as np

from lib.errors import BadInput


def check_finite(**arrays: np.ndarray) -> None:
    """Raise BadInput that names the first of the arrays with a value that is NaN or infinite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise BadInput(f"{name.replace('_', ' ')}: NaN or infinite values; measure them again")
