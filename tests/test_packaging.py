"""What the source itself must keep to: which module may import which, what imports without extras, what is packaged."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A module may import from tiers above its own in this list, and from its own package.
TIERS = (
    {"commandline"},
    {"config", "kernels"},
    {"envs"},
    {"replay", "algorithm", "runtime"},
    {"run"},
    {"report", "probe"},
    {"train", "evaluate", "suite"},
)
TIER = {part: tier for tier, parts in enumerate(TIERS) for part in parts}
LEARNER = ("algorithm.agent", "runtime.acting", "runtime.learner", "replay", "run.checkpoint")
LEARNER_NEEDS = {"torch", "triton", "numpy"}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}  # where they differ from the distribution's
FOLDERS = {"fastdreamer", "kernels", "profiling", "tests", "bench"}
TARGETS = ("setup", "train", "test", "test-all", "lint", "bench", "bench-gpu", "bench-check")
MACHINERY = re.compile(r"stream|cuda|perf_counter|\btime\.|torch\.compile\b")
"""What the method's code knows nothing of."""

SOURCES = sorted(
    path for folder in ("fastdreamer", "kernels/fastdreamer_kernels") for path in (ROOT / folder).rglob("*.py")
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("kernels", "__init__"))


def part_of(module: str) -> str | None:
    """Which of TIERS' parts a module belongs to; None for one that is not ours."""
    if module.split(".")[0] == "fastdreamer_kernels":
        return "kernels"
    names = module.split(".")
    return names[1] if names[0] == "fastdreamer" and len(names) > 1 else None


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes: Iterable[ast.AST], package: str) -> Iterator[str]:
    """Dotted names that some statements of a module of `package` import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*base, *([origin] if origin else [])])
            # `from fastdreamer import envs` names a module; `from fastdreamer.envs import make` perhaps does not.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports(path: Path, nodes: list[ast.stmt] | None = None) -> list[str]:
    """Dotted names that a file imports: anywhere in it, or among some of its statements."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    return list(imported(ast.walk(parsed(path)) if nodes is None else nodes, package))


def at_import(path: Path) -> list[ast.stmt]:
    """The import statements that run when the module is imported."""
    found, rest = [], list(parsed(path).body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.Try):
            rest += [*node.body, *node.orelse, *node.finalbody, *(line for h in node.handlers for line in h.body)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            rest += [*node.body, *node.orelse]
    return found


def breaches(module: str, names: Iterable[str]) -> list[str]:
    """What is wrong with a module that imports these names, a line each."""
    part = part_of(module)
    others = [(name, other) for name in names if (other := part_of(name)) is not None]
    if part is None:
        return [f"{module} imports {name}, and is to import nothing of ours" for name, _ in others]
    if part not in TIER:
        return [f"{module}: {part} has no place in TIERS, give it the one its imports demand"]
    return [
        f"{module} imports {name}, which is not below it"
        for name, other in others
        if other != part and TIER.get(other, len(TIERS)) >= TIER[part]
    ]


def test_imports_run_downwards():
    assert [line for path in SOURCES for line in breaches(module_of(path), imports(path))] == []


def test_an_import_that_does_not_run_downwards_is_found():
    def found(module: str, source: str) -> int:
        return len(breaches(module, imported(ast.walk(ast.parse(source)), module.rpartition(".")[0])))

    middle = ("algorithm", "runtime", "replay")
    for part in middle:
        module = f"fastdreamer.{part}.x"
        for other in (*middle, "run", "report", "train"):
            for source in (
                f"import fastdreamer.{other}", f"from fastdreamer import {other}", f"from ..{other} import y",
                f"def later():\n    from fastdreamer.{other}.z import y", f"import fastdreamer.{other}.z as y, os",
            ):  # fmt: skip
                assert found(module, source) == (part != other), (module, source)
        assert not found(module, "from fastdreamer.envs.base import Spaces\nimport fastdreamer_kernels.ops, torch")
        assert not found("fastdreamer.run.x", f"from fastdreamer.{part} import y")
    for module, source in {
        "fastdreamer_kernels.ops": "import fastdreamer.config",
        "fastdreamer.config": "from fastdreamer_kernels import ops",
        "fastdreamer.envs.pool": "from fastdreamer.replay import Replay",
        "fastdreamer.run.trainer": "import fastdreamer.report.published",
        "fastdreamer.evaluate": "from fastdreamer import train",
        "fastdreamer.report.x": "import fastdreamer.unknown",
        "fastdreamer.unknown": "import os",
        "fastdreamer": "import fastdreamer.config",
    }.items():
        assert found(module, source) == 1, (module, source)


def test_config_imports_the_command_line_alone():
    found = {part for name in imports(ROOT / "fastdreamer/config.py") if (part := part_of(name))}
    assert found == {"commandline"}


def test_sources_import_no_tests_and_keep_optional_packages_inside_functions():
    found = []
    for path in SOURCES:
        allowed = {"numpy", "fastdreamer", "fastdreamer_kernels", *sys.stdlib_module_names}
        if part_of(module_of(path)) != "envs":
            allowed |= {"torch", "triton"}
        wrong = {name.split(".")[0] for name in imports(path)} & {"tests", "bench", "profiling"}
        wrong |= {name.split(".")[0] for name in imports(path, at_import(path))} - allowed
        found += [f"{module_of(path)} imports {name}" for name in sorted(wrong)]
    assert found == []


def code_of(source: str) -> list[str]:
    """Lines without comments and docstrings."""

    class Bare(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            said = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            return ast.Pass() if said else node

    return [line.strip() for line in ast.unparse(Bare().visit(ast.parse(source))).splitlines()]


def test_the_method_knows_no_machinery():
    files = [path for path in SOURCES if part_of(module_of(path)) == "algorithm"]
    assert len(files) > 5
    lines = [(module_of(path), line) for path in files for line in code_of(path.read_text(encoding="utf-8"))]
    assert [f"{module}: {line}" for module, line in lines if MACHINERY.search(line)] == []
    for line in ("x = torch.cuda.Stream()", "y = x.is_cuda", "torch.compile(f)", "from time import perf_counter"):
        assert any(map(MACHINERY.search, code_of(f'def f():\n    """Of its time."""\n    {line}\n')))
    assert not any(map(MACHINERY.search, code_of('x: int = 0\n"""On cuda, time. and time again."""\n# a stream\n')))


def test_packages_say_what_they_are_and_hold_next_to_nothing():
    found = []
    for path in (ROOT / "fastdreamer").rglob("__init__.py"):
        tree, holds = parsed(path), module_of(path) == "fastdreamer.envs"  # that one holds `make`
        lines = ast.unparse(ast.Module(tree.body[1:], [])).splitlines()
        if ast.get_docstring(tree) is None or (len(lines) > 3 and not holds):
            found.append(f"{module_of(path)}: {len(lines)} lines of code")
    assert found == []


def test_environments_name_no_torch():
    envs = [path for path in SOURCES if path.parent.name == "envs"]
    assert [path.name for path in envs if "torch" in {name.split(".")[0] for name in imports(path)}] == []


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_environments_load_no_torch():
    modules = [module_of(path) for path in SOURCES if path.parent.name == "envs"]
    done = run(f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def blocked() -> set[str]:
    """Packages that we declare and that a machine with a GPU may lack, by the names they are imported under."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    names = {match.group() for line in declared if (match := re.match(r"[A-Za-z0-9_-]+", line))}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names - LEARNER_NEEDS}


def test_the_learner_imports_with_torch_triton_and_numpy_alone_and_the_benchmarks_with_pytest_besides():
    assert {"PIL", "yaml", "nvtx", "envpool", "av"} <= blocked()
    modules = [f"fastdreamer.{name}" for name in LEARNER]
    modules += [module_of(path) for path in SOURCES if "fastdreamer_kernels" in path.parts]
    # Installed plugins are loaded by pytest itself.
    tools = sorted(blocked() & {"pytest", "pytest_benchmark", "pytest_timeout", "hypothesis"})
    done = run(
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked())}))\n"  # None makes an import fail
        f"import {', '.join(modules)}\n"
        f"for name in {tools}:\n    del sys.modules[name]\n"
        "import pytest\nsys.exit(pytest.main(['bench', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench/test_update.py" in done.stdout


def test_kernels_is_no_package_and_top_level_names_are_the_known_ones():
    # A top-level import name `kernels` would overwrite a well-known package.
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not list(ROOT.glob("*.py"))
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert {path.name for path in folders if any(path.rglob("*.py"))} <= FOLDERS


def test_the_wheel_holds_both_packages():
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["packages"] == ["fastdreamer", "kernels/fastdreamer_kernels"]
    assert (ROOT / "kernels/fastdreamer_kernels/py.typed").exists()


def test_make_has_the_commands_that_the_readme_names():
    done = subprocess.run(["make", "-n", *TARGETS], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_make_names_the_mend_for_an_old_python(tmp_path):
    """With an interpreter that is too old (one that fails the version check) nothing is made, and one line says why."""
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_readme_activates_the_environment_before_its_commands():
    text = (ROOT / "README.md").read_text()
    assert text.index(". .venv/bin/activate") < text.index("\npython -m fastdreamer")
    assert len(text.splitlines()) <= 150
