"""The examples in the core's docstrings print what they say, and nothing public is without one.

An example may use the core's modules by name, as after `from warm_diffusion import *`, and jax, jnp
and np.
"""

import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import warm_diffusion

MODULES = {
    name: importlib.import_module(f"warm_diffusion.{name}") for name in warm_diffusion.__all__
}
NAMES = MODULES | {"jax": jax, "jnp": jnp, "np": np}


def public(module):
    """Names of the functions and classes that a module defines for others."""
    return {
        label
        for label, value in vars(module).items()
        if not label.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def examples(module):
    """The examples of a module by the function or class that they belong to."""
    tests = doctest.DocTestFinder().find(module, globs=NAMES)
    return {t.name.removeprefix(f"{module.__name__}."): t for t in tests if t.examples}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_a_short_example_that_prints_what_it_says(name):
    module = MODULES[name]
    found = examples(module)
    assert public(module) - set(found) == set()
    for label, test in found.items():
        said = []
        results = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert results.attempted > 0, label
        assert results.failed == 0, "".join(said)
        assert sum((e.source + e.want).count("\n") for e in test.examples) <= 6, label
