"""The layering: an arrow of imports only ever points to an earlier line of the list, and the algebra is pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cloq

ROOT = Path(cloq.__file__).parent

LAYERS = (
    {"errors", "precision"},
    {"types"},
    {"specs"},
    {"linears"},
    {"algebra.linalg", "algebra.packing"},
    {"algebra.lowrank"},
    {"algebra.drift"},
    {"algebra"},
    {"kernels"},
    {"quantizers"},
    {"initializers"},
    {"calibration"},
    {"models"},
    {"streaming.budget", "streaming.cgroups", "streaming.checksum", "streaming.solve"},
    {"streaming.store"},
    {"streaming.memory"},
    {"streaming.device"},
    {"streaming.distributed"},
    {"streaming.capture", "streaming.fisher"},
    {"streaming.survey"},
    {"streaming.layers", "streaming.manifest"},
    {"streaming.pipeline"},
    {"streaming"},
    {"export"},
    {"use.evaluate", "use.frozen", "use.given", "use.several_widths"},
    {"use.experts_apart", "use.pairing"},
    {"use.check", "use.merging"},
    {"use.loading"},
    {"use.generating"},
    {"use"},
    {"report", "plan", "tasks"},
    {"api"},
    {"benchmark", "training"},
    {"cli"},
    {"__main__"},
)
"""From the bottom up: modules, and packages for all of theirs that have no line of their own. What has no line fails the test."""

ALGEBRA = (
    "types",
    "precision",
    "linears",
    "algebra",
    "quantizers",
    "initializers",
    "calibration.gram",
    "calibration.hooks",
)
"""Tensors in, value out: these know torch and nothing else from outside the standard library."""

LIGHT = ("cloq", "cloq.errors", "cloq.specs", "cloq.cli")
"""What the command line imports before it knows that there is work to do."""


def modules() -> dict[str, Path]:
    """Every module by its name below `cloq`; a package by its own."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


MODULES = modules()


class _OnlyForTypes(ast.NodeTransformer):
    """Drops the body of `if TYPE_CHECKING`."""

    def visit_If(self, node: ast.If):
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else node


def imports(name: str, executed: bool = False) -> set[str]:
    """Full names of all that a module imports, anywhere in it: at its top, in functions, under `if TYPE_CHECKING`.

    executed: without the last, which never happen.
    """
    path = MODULES[name]
    package = ["cloq", *(name.split(".") if path.name == "__init__.py" else name.split(".")[:-1])]
    tree, found = ast.parse(path.read_text("utf8")), set()
    for node in ast.walk(_OnlyForTypes().visit(tree) if executed else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from cloq import linalg` imports cloq.algebra.linalg, `from cloq.types import X` imports cloq.types
                inner = f"{source}.{alias.name}"
                found.add(inner if inner.removeprefix("cloq.") in MODULES else source)
    return found


def inside(name: str, executed: bool = False) -> set[str]:
    """The modules of cloq among them."""
    found = {target.removeprefix("cloq.") for target in imports(name, executed) if target.startswith("cloq.")}
    return {target for target in found if target != name}


def layer(name: str) -> int:
    places = {member: number for number, members in enumerate(LAYERS) for member in members}
    for place in (name, name.split(".")[0]):
        if place in places:
            return places[place]
    raise AssertionError(f"cloq.{name} has no place in the layers: give it one in {Path(__file__).name}")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    wrong = {target for target in inside(name) if layer(target) > layer(name)}
    assert not wrong, f"cloq.{name} may not import {', '.join(sorted(wrong))}: see LAYERS"


def test_no_module_imports_itself_through_others():
    """Within a layer too. A package's `__init__` stands above its files, so a file imports its neighbours by name."""
    arrows = {name: inside(name, executed=True) for name in MODULES}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle of imports: {' → '.join([*path[path.index(name) :], name])}"
        if name not in finished:
            for target in sorted(arrows.get(name, ())):
                visit(target, (*path, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [n for n in MODULES if n in ALGEBRA or n.split(".")[0] in ALGEBRA])
def test_the_algebra_is_pure(name):
    outside = {target.split(".")[0] for target in imports(name)} - {"cloq", "torch"} - sys.stdlib_module_names
    assert not outside, f"cloq.{name} imports {', '.join(sorted(outside))}"
    impure = {target.split(".")[0] for target in imports(name)} & {"os", "logging", "warnings", "pathlib", "io", "time", "random"}
    assert not impure, f"cloq.{name} is to know no file, clock, log or environment, but imports {', '.join(sorted(impure))}"


@pytest.mark.parametrize("name", LIGHT)
def test_heavy_libraries_are_not_imported_early(name):
    code = f"import sys, {name}; print([m for m in ('torch', 'transformers', 'numpy', 'datasets', 'peft') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_public_names_are_found_when_they_are_used():
    assert set(cloq.__all__) <= set(dir(cloq)) and cloq.closed_form.__module__ == "cloq.initializers.cloq"
    for name in ("RunSpec", "QuantSpec", "LoraSpec", "CalibSpec", "Rule", "CloqError"):
        assert isinstance(getattr(cloq, name), type)
    with pytest.raises(AttributeError, match="module 'cloq' has no attribute 'quantise'"):
        cloq.quantise  # noqa: B018
