"""Doctests show a user's session: they run under JAX's default promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def default_promotion_in_doctests(request):
    if isinstance(request.node, pytest.DoctestItem):
        with jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield
