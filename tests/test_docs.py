"""README and the site show what works: snippets run, commands, files and links exist.

Blocks marked `python` run, in order, in one namespace per page; `py` is for what runs elsewhere and
must parse. Commands are parsed by main.py itself: flags, configuration, keys and their ranges.
"""

import ast
import collections
import itertools
import json
import math
import re
import shlex
import statistics
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import main
import warm_diffusion
from configs import default
from tests.app.conftest import REPOSITORY as ROOT
from tests.app.conftest import _fresh_flags
from warm_diffusion.app import settings

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pretrained/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
TEXT["docs/changelog.md"] = (ROOT / "CHANGELOG.md").read_text()  # which it includes
README = TEXT["README.md"]
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "lsun.py"})
SHORT_EXAMPLES = ("plain_jax",)  # the others compile for a while
LONG_PAGES = ("docs/restoration.md", "docs/sample.md")


def blocks(language, text):
    """Fenced blocks of a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def named(pattern):
    """Everything in the pages that a pattern finds, once."""
    return sorted({found for text in TEXT.values() for found in re.findall(pattern, text)})


# --- snippets ------------------------------------------------------------------------------------


def marked(values, names, long):
    """Parameters of which those named are long."""
    marks = ([pytest.mark.long] if name in long else [] for name in names)
    return [
        pytest.param(value, id=name, marks=mark)
        for value, name, mark in zip(values, names, marks, strict=True)
    ]


def run_and_learn(source, path, names):
    """Runs code, of a training 40 steps instead of thousands, in which the loss must fall."""
    training, seen = (
        re.search(r"^for n in range\(\d{4,}\):.*\n((?:    .*\n)+)", source, re.MULTILINE),
        [],
    )
    if training:
        exec(compile(source[: training.start()], path, "exec"), names)
        step = compile(textwrap.dedent(training[1]), path, "exec")
        for names["n"] in range(40):
            exec(step, names)
            seen.append(float(names["loss"]))
        assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:5])
        source = source[training.end() :]
    exec(compile(source, path, "exec"), names)


RUN = [page for page, text in TEXT.items() if blocks("python", text)]


@pytest.mark.parametrize("page", marked(RUN, RUN, LONG_PAGES))
def test_python_on_a_page_runs_from_top_to_bottom(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for code in blocks("python", TEXT[page]):
        run_and_learn(code, page, names)
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()  # CONTRIBUTING's test is a test


@pytest.mark.parametrize("page", [page for page, text in TEXT.items() if blocks("py", text)])
def test_python_that_runs_elsewhere_parses(page):
    for code in blocks("py", TEXT[page]):
        included = re.findall(r'^--8<-- "(.*)"$', code, re.MULTILINE)
        assert all((ROOT / path).is_file() for path in included)
        ast.parse(re.sub(r"^--8<--.*$", "", code, flags=re.MULTILINE))


STEMS = [path.stem for path in EXAMPLES]


@pytest.mark.parametrize("path", marked(EXAMPLES, STEMS, set(STEMS) - set(SHORT_EXAMPLES)))
def test_an_example_runs_and_learns(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    run_and_learn(path.read_text(), path.name, names)
    (drawn,) = (names[name] for name in ("images", "filled", "signals") if name in names)
    assert drawn.ndim >= 3
    assert bool(jnp.all(jnp.isfinite(drawn)))


# --- commands ------------------------------------------------------------------------------------


def commands():
    """(page, words) of every command that starts python, in blocks and between backticks."""
    found = {}
    for page, text in TEXT.items():
        text = re.sub(r"^ *```(?:python|py|bibtex)\n.*?^ *```", "", text, flags=re.DOTALL | re.M)
        text = re.sub(r" *\\\n\s*", " ", text)
        for line in re.findall(r"(?:^|[`\s])(python (?:main\.py|-m) [^`\n]*)", text):
            line = re.split(r" && |;|\"$|\)$", line)[0]
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            found[f"{page}: {' '.join(words)}"] = words
    return found


COMMANDS = commands()
APP = {name: words for name, words in COMMANDS.items() if words[1] == "main.py"}
MODULES = {name: words for name, words in COMMANDS.items() if words[1] == "-m"}


def parse(arguments):
    """Parses flags as main.py does, and checks everything that needs no data."""
    # The configuration of a run that is not there: main.py would take the file beside it.
    arguments = [word for word in arguments if not re.fullmatch(r"--config=.*\.json", word)]
    argv = [str(ROOT / "main.py"), *arguments]
    with pytest.MonkeyPatch.context() as patch, _fresh_flags():
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)  # ml_collections looks there
        rest = main.FLAGS(settings.resolve_config_argument(argv, ROOT / "configs"))
        settings.check(main.FLAGS.config)
        return rest[1:]


@pytest.mark.parametrize("name", APP, ids=list(APP))
def test_a_command_is_one_that_the_app_takes(name):
    assert parse([word for word in APP[name][2:] if word not in ("--help", "--version")]) == []


@pytest.mark.parametrize("name", MODULES, ids=list(MODULES))
def test_a_module_named_is_there_with_its_flags(name):
    _, _, module, *arguments = MODULES[name]
    if module in ("venv", "pytest"):
        return
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    source += (ROOT / "benchmarks/comparison.py").read_text()
    words = [word for word in arguments if word.startswith("--")]
    parse([word for word in words if word.startswith("--config")])
    for flag in {
        word.split("=")[0].strip("-") for word in words if not word.startswith("--config")
    }:
        assert re.search(rf'["-]{flag}"', source), flag


def test_every_key_named_alone_is_there():
    known = settings._flat(default.get_config().to_dict())
    sections = "data|augment|schedule|loss|optimizer|training|sampling|eval|analysis|export"
    keys = named(r"--config\.(\w+(?:\.\w+)*)") + named(
        rf"`((?:{sections})(?:\.(?!json)\w+)+)(?:=[^`]*)?`"
    )
    assert len(keys) > 50
    assert set(keys) - known.keys() == set()


def test_every_flag_named_alone_is_there():
    flags = set(named(r"`--(?!xla)([a-z_]+)(?:=[^`]*)?`")) - {"config"}
    modules = [ROOT / words[2].replace(".", "/") for words in MODULES.values() if "." in words[2]]
    sources = [
        ROOT / "main.py",
        ROOT / "warm_diffusion/app/settings.py",
        *(module.with_suffix(".py") for module in modules),
    ]
    text = "".join(source.read_text() for source in sources)
    assert [flag for flag in flags if not re.search(rf'["-]{flag}"', text)] == []


@pytest.mark.parametrize("target", named(r"(?m)\bmake ([a-z]+)`|^ *make ([a-z]+)"))
def test_every_make_target_named_is_there(target):
    target = "".join(target)
    assert not target or re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_version_is_the_same_wherever_it_stands():
    assert f"\nversion: {warm_diffusion.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert warm_diffusion.__version__ in TEXT["docs/changelog.md"]


# --- numbers -------------------------------------------------------------------------------------


def measured():
    """Every distance of docs/results, and (mean, deviation) of the seeds of each setting."""
    values, seeds = [], collections.defaultdict(list)

    def read(item, name):
        for value in item if isinstance(item, list) else item.values():
            if isinstance(value, dict | list):
                read(value, name)
        if isinstance(item, dict):
            setting = [item.get(k) for k in ("network", "variant", "bnr", "solver", "nfe")]
            for key in (key for key in item if key.startswith("fd_") or key == "distance"):
                values.append(item[key])
                seeds[name, key, str(setting)].append(item[key])

    for path in (ROOT / "docs/results").iterdir():
        lines = path.read_text()
        for part in lines.splitlines() if path.suffix == ".jsonl" else [lines]:
            read(json.loads(part), path.name)
    several = [given for given in seeds.values() if len(given) > 1]
    return values, [(statistics.mean(given), statistics.stdev(given)) for given in several]


def shown(value, like):
    """A number with as many digits as a text."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_distances_in_tables_of_results_are_those_measured():
    values, moments = measured()
    paper = re.findall(r"\d+\.\d+", re.search(r"\| FID .*", TEXT["docs/reproduce.md"])[0])
    checked, wrong = 0, []
    for table in re.findall(r"(?:^\|.*\n)+", TEXT["docs/results_all.md"], re.MULTILINE):
        header, _, *rows = table.splitlines()
        if not re.search("NFE|calls", header):
            continue
        for cell in (cell.strip(" *") for row in rows for cell in row.split("|")[2:]):
            if found := re.fullmatch(r"(\d+\.\d+) ± (\d+\.\d+)", cell):
                m, s = found.groups()
                good = any(shown(mean, m) == m and shown(std, s) == s for mean, std in moments)
            elif re.fullmatch(r"\d+\.\d+", cell):
                good = cell in paper or any(shown(value, cell) == cell for value in values)
            else:
                continue
            checked += 1
            wrong += [] if good else [cell]
    assert checked > 100
    assert wrong == []


def test_the_announced_comparison_is_that_of_its_rows():
    rows = (ROOT / "docs/results/announced_cifar10_16.jsonl").read_text().splitlines()
    distances = {
        (row["solver"], row["bnr"], row["seed"]): row["fd_efficientnet_lite0_10000"]
        for row in map(json.loads, rows)
    }
    for solver, ratio in itertools.product(("heun", "multistep"), (0.5, 0.65)):
        logs = [
            math.log(distances[solver, ratio, s] / distances[solver, 0, s]) for s in range(4, 8)
        ]
        mean, error = statistics.mean(logs), statistics.stdev(logs) / 2
        p, smaller = scipy.stats.ttest_1samp(logs, 0).pvalue, sum(log < 0 for log in logs)
        cells = f"{mean:+.3f} ± {error:.3f}", f"{p:.2f}", f"{smaller} of 4 seeds"
        found = re.search(rf"\| \**{ratio} against 0, {solver}.*", TEXT["docs/results.md"], re.I)[0]
        assert [cell.strip(" *") for cell in found.split("|")[2:-1]] == list(cells)
        if (solver, ratio) == ("heun", 0.65):
            less = (
                f"{100 * (1 - math.exp(mean)):.1f} ± {100 * math.exp(mean) * error:.1f} % smaller"
            )
            assert f"{less}, no significant gain | four | {p:.2f} |" in TEXT["README.md"]
            assert less in TEXT["docs/results.md"]


def test_the_network_for_all_ratios_is_compared_as_in_its_rows():
    found = {}
    for name in ("announced_cifar10_16", "any_cifar10_16"):
        for line in (ROOT / f"docs/results/{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            key = row.get("network", "fixed"), row["seed"], row["bnr"], row["solver"]
            found[key] = row["fd_efficientnet_lite0_10000"]
    for ratio in (0, 0.5, 0.65, 2):
        cells = [f"{ratio}"]
        for solver in ("heun", "multistep"):
            own, one = (found[network, 4, ratio, solver] for network in ("fixed", "any"))
            cells += [f"{own:.1f}", f"{one:.1f}", f"{one / own:.2f}"]
        assert f"\n| {' | '.join(cells)} |\n" in TEXT["docs/results.md"]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "pretrained/README.md"])
def test_every_file_linked_is_there(page):
    # Links among the site's pages: `make docs`.
    for path in re.findall(r"\]\((?!http)([^)#]+)", TEXT[page]):
        assert ((ROOT / page).parent / path).exists(), path


@pytest.mark.parametrize(
    "path", named(r"\b(?:configs|benchmarks|examples|tests|docs|warm_diffusion)/[\w/]+\.\w+")
)
def test_every_file_named_is_there(path):
    assert (ROOT / path).is_file()
