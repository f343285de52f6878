"""What the source itself must keep to: which module may import which, what imports without extras, what is packaged."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import from tiers above its own in this list, and from its own package.
TIERS = (
    {"config", "kernels"},
    {"envs"},
    {"replay", "algorithm", "runtime"},
    {"run"},
    {"report"},
    {"train", "evaluate"},
)
TIER = {part: tier for tier, parts in enumerate(TIERS) for part in parts}
LEARNER = ("algorithm.agent", "runtime.acting", "runtime.learner", "replay", "run.checkpoint")
LEARNER_NEEDS = {"torch", "triton", "numpy"}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}  # where they differ from the distribution's
FOLDERS = {"fastdreamer", "kernels", "profiling", "tests", "bench"}

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


def imports(path: Path, nodes: list[ast.stmt] | None = None) -> Iterator[str]:
    """Dotted names that a file imports: anywhere in it, or among some of its statements."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*base, *([origin] if origin else [])])
            # `from fastdreamer import envs` names a module; `from fastdreamer.envs import make` perhaps does not.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def at_import(path: Path) -> list[ast.stmt]:
    """The import statements that run when the module is imported."""
    found, rest = [], list(ast.parse(path.read_text(encoding="utf-8")).body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.Try):
            rest += [*node.body, *node.orelse, *node.finalbody, *(line for h in node.handlers for line in h.body)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            rest += [*node.body, *node.orelse]
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_downwards(path):
    part = part_of(module_of(path))
    if part is None:
        assert not any(part_of(name) for name in imports(path)), "fastdreamer/__init__.py imports nothing of ours"
        return
    assert part in TIER, f"{part} has no place in TIERS: give it the one its imports demand"
    for name in imports(path):
        other = part_of(name)
        if other is not None and other != part:
            assert TIER[other] < TIER[part], f"{relative(path)} imports {name}, which is not below it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sources_import_no_tests_and_keep_optional_packages_inside_functions(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"tests", "bench", "profiling"}
    allowed = {"numpy", "fastdreamer", "fastdreamer_kernels", *sys.stdlib_module_names}
    if part_of(module_of(path)) != "envs":
        allowed |= {"torch", "triton"}
    assert {name.split(".")[0] for name in imports(path, at_import(path))} <= allowed


def test_config_imports_nothing_of_ours():
    assert not [name for name in imports(ROOT / "fastdreamer/config.py") if part_of(name)]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name == "envs"], ids=relative)
def test_environments_name_no_torch(path):
    assert "torch" not in {name.split(".")[0] for name in imports(path)}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


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


def test_the_learner_imports_with_torch_triton_and_numpy_alone():
    assert {"PIL", "yaml", "nvtx", "tyro", "envpool", "av"} <= blocked()
    modules = [f"fastdreamer.{name}" for name in LEARNER]
    modules += [module_of(path) for path in SOURCES if "fastdreamer_kernels" in path.parts]
    done = run(
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked())}))\n"  # None makes an import fail
        f"import {', '.join(modules)}"
    )
    assert done.returncode == 0, done.stderr


def test_the_benchmarks_load_with_pytest_and_its_benchmark_plugin_besides():
    # Installed plugins are loaded by pytest itself.
    rest = sorted(blocked() - {"pytest", "pytest_benchmark", "pytest_timeout", "hypothesis"})
    done = run(
        f"import sys\nsys.modules.update(dict.fromkeys({rest}))\n"
        "import pytest\nsys.exit(pytest.main(['bench', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    )
    assert done.returncode == 0, done.stdout + done.stderr


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


@pytest.mark.parametrize("target", ["setup", "train", "test", "lint", "bench", "bench-gpu", "bench-check"])
def test_make_has_the_commands_that_the_readme_names(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_make_names_the_mend_for_an_old_python(tmp_path):
    """With an interpreter that is too old (one that fails the version check) nothing is made, and one line says why."""
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
