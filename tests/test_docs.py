"""README's snippets, its two commands, and every example run as they are written."""

import doctest
import inspect
import operator
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

import stabie_ase

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.rst").read_text()
DATA = files("stabie_ase") / "data"


def snippets(language):
    blocks = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", README)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in blocks]


def test_python_snippets_run_in_the_order_they_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "aspirin.xyz").write_bytes((DATA / "aspirin_xtb_train.xyz").read_bytes())
    (tmp_path / "aspirin_schnet.pt").write_bytes((DATA / "aspirin_schnet.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(snippets("python")) == 6
    names = {}
    for snippet in snippets("python"):
        exec(compile(snippet, "README.rst", "exec"), names)
    printed = capsys.readouterr().out
    assert "failed within 50 fs" in printed and "1/Å from" in printed


SHOWN = (
    "finetune", "evaluate", "load_potential", "read_reference", "AtomsBatch.from_atoms", "StABIECalculator", "simulate", "watched",
    "criteria_from", "observables_from", "observe",
)  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_examples_of_the_docstrings_that_users_meet_first_run(name, tmp_path, monkeypatch):
    (tmp_path / "aspirin.xyz").write_bytes((DATA / "aspirin_xtb_train.xyz").read_bytes())
    (tmp_path / "aspirin_schnet.pt").write_bytes((DATA / "aspirin_schnet.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    documented = operator.attrgetter(name)(stabie_ase)
    (example,) = (found for found in doctest.DocTestFinder(recurse=False).find(documented, name) if found.examples)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


@pytest.mark.parametrize("name", stabie_ase.__all__)
def test_public_names_are_there_and_documented(name):
    assert inspect.getdoc(getattr(stabie_ase, name))


def test_type_checkers_see_the_public_names():
    text = (ROOT / "stabie_ase" / "__init__.pyi").read_text()
    seen = {name: home for home, names in re.findall(r"^from stabie_ase\.(\S+) import (.*)$", text, flags=re.M)
            for name in re.findall(r"(\w+) as \1", names)}  # fmt: skip
    assert seen == stabie_ase._HOMES


def test_readme_tells_the_test_command_that_ci_runs():
    assert README.count("python -m pytest -q -n 2") == 1
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("python -m pytest -q -n 2")


def test_every_command_of_the_readme_exists():
    from stabie_ase.cli import main

    used = set(re.findall(r"^    (?:.*&& )?stabie-ase ([a-z]+)", README, flags=re.M))
    assert used == set(main.commands)
    shown = README[README.index("The command line\n====") :]
    for name, command in main.commands.items():
        flags = {flag for parameter in command.params for flag in parameter.opts + parameter.secondary_opts}
        usage = re.search(rf"^    stabie-ase {name} (?!--resume).*(?:\n {{20,}}.*)*", shown, flags=re.M)[0]
        assert set(re.findall(r"--[a-z-]+", usage)) <= flags, name


SMALL_SCHNET = ["--ref", str(ROOT / "stabie_ase/data/aspirin_xtb_train.xyz"), "--interactions", "1", "--channels", "8", "--epochs", "1"]


@pytest.mark.parametrize("script", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    extra = {"make_aspirin_schnet": ["--epochs", "1", "--output", str(tmp_path / "model.pt")],
             "make_schnet": [*SMALL_SCHNET, "--output", str(tmp_path / "model.pt")],
             "make_aspirin_xtb": ["--quick", "--output", str(tmp_path)],
             "make_argon": ["--quick", "--output", str(tmp_path / "argon.xyz")]}
    arguments = extra.get(script.stem, ["--quick"])
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("script, arguments, words", [
    ("false_alarms", [], "NAME=FEW,DYNAMICS"),
    ("false_alarms", ["a=none.xyz,none.xyz"], "none.xyz: no such file"),
    ("gains", ["--table", "none"], "No such file"),
    ("gains", ["none.pt", "--ref", "none.xyz", "--test", "none.xyz", "--output", "row"], "none.xyz: no such file"),
])  # fmt: skip
def test_benchmarks_refuse_what_is_not_there_in_a_line(script, arguments, words, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode not in (0, -9) and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("factor", [-1.0, 2.0], ids=["the sign", "a factor"])
def test_the_spring_example_sees_wrong_physics(factor, monkeypatch, capsys):
    """As it would be with this factor on beta in the estimator."""

    def wrong(*arguments, real=stabie_ase.Estimator.__call__, **settings):
        result = real(*arguments, **settings)
        return replace(result, weights=factor * result.weights)

    monkeypatch.setattr(stabie_ase.Estimator, "__call__", wrong)
    monkeypatch.setattr(sys, "argv", ["learn_a_spring.py", "--quick"])
    with pytest.raises(SystemExit, match="the gradient is"):
        runpy.run_path(str(ROOT / "examples" / "learn_a_spring.py"), run_name="__main__")
