"""How the house is built: which floor may import which, no cycles, no dumping grounds, no types fixed in the network."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "andesvl_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# part -> floor; a part may import from floors below and from its own
FLOORS = {
    "errors": 0, "config": 0, "kernels": 0, "weights": 1, "cache": 1, "inputs": 1, "model": 2, "data": 3, "checkpoints": 3,
    "decoding": 4, "training": 5, "compression": 5, "evaluation": 5, "export": 5, "prepare": 5, "aot": 6, "demo": 6, "cli": 6,
}  # fmt: skip


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        found |= {name for name in names if name and name.split(".")[0] == "andesvl_jax"}
    return found


def part(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_floors(module):
    if part(module) is None:
        return  # the public surface
    assert part(module) in FLOORS, f"{module}: a part without a floor"
    for target in imports(MODULES[module]):
        if part(target) is None:  # the public surface is there for the commands
            assert FLOORS[part(module)] == max(FLOORS.values()), f"{module} imports the public surface"
            continue
        assert FLOORS[part(target)] <= FLOORS[part(module)], f"{module} imports {target}, which stands above it"


@pytest.mark.parametrize("name", ["weights", "cache"])
def test_the_ground_floor_knows_no_network(name):
    others = {part(t) for module, file in MODULES.items() if part(module) == name for t in imports(file)} - {name}
    assert others <= {"config", "errors", "kernels"}


def test_kernels_import_nothing_of_the_package():
    others = {part(t) for module, file in MODULES.items() if part(module) == "kernels" for t in imports(file)} - {"kernels"}
    assert not others


def test_no_imports_in_a_circle():
    graph = {module: imports(file) - {module} for module, file in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in finished:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    assert finished == set(MODULES) | (set().union(*graph.values()) - set(MODULES))


def test_no_file_is_a_dumping_ground():
    sources = [f for top in ("andesvl_jax", "tests", "experiments", "benchmarks", "configs") for f in (ROOT / top).rglob("*.py")]
    assert not [f for f in sources if f.stem in ("utils", "util", "helpers", "misc")]
    long = {str(f.relative_to(ROOT)): n for f in sources if (n := len(f.read_text().splitlines())) > 500}
    assert not long


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name in ("model", "weights", "cache")], ids=lambda f: f.name)
def test_the_network_fixes_no_type(file):
    """Compute types come from the config; float32 is named only where precision is promised: casts, accumulators, angles."""
    tree, promised = ast.parse(file.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("astype", "dense", "arange", "finfo"):
                promised |= {id(child) for child in ast.walk(node)}
            promised |= {id(k.value) for k in node.keywords if k.arg == "preferred_element_type"}
    for node in ast.walk(tree):
        found = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
        if found in ("bfloat16", "float16", "float32", "float64"):
            assert found == "float32" and id(node) in promised, f"{file.name}:{node.lineno} fixes {found}"


def test_test_files_have_names_of_their_own():
    """pytest imports them by name alone: of two with one name it collects the first."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
