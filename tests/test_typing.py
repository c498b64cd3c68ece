"""Type checkers read the package (py.typed): mypy accepts right programs and refuses wrong ones."""

import re
import subprocess
import sys

import pytest

# A user's program, complete; checked, not run. Scalars, numpy and JAX arrays, both forms of sample.
RIGHT = """\
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct, denoiser, losses, oracle, process, samplers, schedules, spectra


def network(x: jax.Array, c_noise: jax.Array, c_blur: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x], axis=-1)


def twice(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> denoiser.Prediction:
    return denoiser.Prediction(2 * x, jnp.zeros_like(x))


images = np.zeros((4, 8, 8, 3), np.float32)
noise = samplers.initial_noise(np.arange(4), (8, 8, 3))
path = schedules.from_functions(lambda t: 0.5 * t, lambda t: t**2, t_min=0.05, t_max=9.0)
denoise: denoiser.Denoiser = denoiser.precondition(network, sigma_data=0.5)
prediction = denoise(noise, 0.5, np.ones(4))
blurry: jax.Array = dct.blur(images, np.array([0.0, 0.5, 1.0, 2.0]))
x = process.perturb(images, noise, path.alpha(1), path.beta(1.0))
x = process.transition(x, images, (0.5, 1.0), (np.ones(4), jnp.ones(4)))
flow: jax.Array = process.velocity(x, prediction, path, 1.0)
loss: jax.Array = losses.score_matching_loss(twice, jax.random.key(0), images, path).total
end: jax.Array = samplers.sample(denoise, noise, path, churn=10.0, key=jax.random.key(0))
end, states = samplers.sample(oracle.mixture(images), images, path, return_trajectory=True)
count: int = states.shape[0]
ratio: float = spectra.recommend_bnr(np.asarray(spectra.power_spectrum(images)))
kept: float = spectra.least_kept(np.ones((8, 8)), ratio)
best: schedules.Schedule = schedules.constant_bnr(ratio)
"""

WRONG = """\
import jax
import numpy as np

from warm_diffusion import dct, oracle, samplers, schedules

noise = samplers.initial_noise(np.arange(4), (8, 8, 3))
denoise = oracle.mixture(np.zeros((4, 8, 8, 3)))
path = schedules.constant_bnr("0.5")
image: jax.Array = samplers.sample(denoise, noise, path, return_trajectory=True)
blurry = dct.blur(noise, alpha=[0.5, 1.0, 1.5, 2.0])
"""
MISTAKES = {8: "arg-type", 9: "assignment", 10: "arg-type"}  # line of WRONG -> mypy's name for it


@pytest.mark.long
def test_mypy_accepts_the_right_program_and_finds_each_mistake_on_its_line(tmp_path):
    pytest.importorskip("mypy", reason="type checks need mypy (the dev extra)")
    files = [tmp_path / "right.py", tmp_path / "wrong.py"]
    for file, program in zip(files, (RIGHT, WRONG), strict=True):
        file.write_text(program)
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    # In a process of its own: freeing all of JAX's types takes longer than the check itself.
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, files)], capture_output=True, text=True
    )
    assert not run.stderr
    found = re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]", run.stdout)
    assert len(found) == run.stdout.count("error: "), run.stdout
    assert found == [("wrong", str(line), code) for line, code in MISTAKES.items()]
