"""The package as a whole: who may import whom, what importing it loads, what it asks to install."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import warm_diffusion

PACKAGE = Path(warm_diffusion.__file__).parent

# Imports go downwards; every other name at the top of the package is the core, which is 0.
LAYERS = {
    "runtime": 1,
    "public": 2,
    **dict.fromkeys(("models", "data", "evaluation", "training"), 3),
    "pretrained": 4,
    "app": 5,
}
ROOMS = 3  # the layer of those that do not import each other
CORE_MAY_IMPORT = {"jax", "numpy", "warm_diffusion"} | sys.stdlib_module_names
NOT_IN_THE_CORE = ("flax", "optax", "orbax", "ml_collections", "clu", "tensorflow_datasets",
                   "tensorflow", "sklearn", "matplotlib", "PIL")  # fmt: skip


def imported(tree):
    """Absolute names of the modules that a file imports; imports for type checkers do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            # `from warm_diffusion import dct` imports warm_diffusion.dct.
            whole = node.module == "warm_diffusion"
            yield from (f"{node.module}.{a.name}" for a in node.names) if whole else [node.module]
        else:
            yield from imported(node)


def test_imports_go_downwards_only():
    upwards = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own = LAYERS.get(parts[0], 0)
        for name in imported(ast.parse(path.read_text())):
            root, _, member = name.partition(".")
            other = member.partition(".")[0]
            if root != "warm_diffusion":
                wrong = own == 0 and root not in CORE_MAY_IMPORT
            elif other == parts[0] or other == "__version__":
                wrong = False
            else:
                wrong = LAYERS.get(other, 0) > own or LAYERS.get(other, 0) == own == ROOMS
            if wrong:
                upwards.append(f"{'/'.join(parts)} imports {name}")
    assert upwards == []


def test_importing_the_package_loads_no_library_but_jax_and_numpy():
    # In a process of its own: here, other tests have loaded them.
    script = f"import sys, warm_diffusion; print(*set({NOT_IN_THE_CORE!r}) & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_requirements_txt_is_what_the_package_and_the_app_need():
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == project["dependencies"] + project["optional-dependencies"]["app"]


def test_constraints_pin_what_the_tests_install():
    root = PACKAGE.parent
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = ("app", "features", "gcs", "photos", "export", "docs", "dev")
    wanted = [Requirement(line) for name in tested for line in extras[name]]
    wanted += [Requirement(line) for line in project["dependencies"]]
    for need in wanted:
        if need.name != project["name"]:
            name = need.name.lower()
            pin = pins.get(name) or pins[name.replace("_", "-")]
            assert need.specifier.contains(pin), need
