"""The shape of the code: who may import whom, how long a function is, which classes there are, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import median, quantiles

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "lowbit"
PLUGINS = ("methods", "formats", "metrics", "stats")
# Their records speak of methods: options, statistics.
REWRITES = ("transforms", "corrections")

# A unit (top-level module or folder) imports units of a lower layer, and itself. Two units of one layer stay apart.
LAYERS = (
    ("errors", "_native"),
    ("arguments",),
    ("native", "schemes", "plugins", "budget", "rotations", "collector"),
    ("tensors",),
    ("blocks",),
    PLUGINS,
    REWRITES,
    ("stages",),
    ("pipeline", "inspect", "runtime", "advise"),
    ("api", "sweep"),
    ("cli",),
    ("__main__",),
)
LAYER = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
PLAIN_BASES = {"Exception", "Protocol", "NamedTuple", "TypedDict", "ABC", "Enum", "StrEnum", "IntEnum"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(module: str) -> str:
    """`lowbit.formats.gptq` -> `formats`; the package itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of ours that a file imports, anywhere in it, with its line; `import_module("...")` counts."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.startswith("lowbit."))


def breaks_rule(importer: str, target: str) -> bool:
    """Whether a unit may not import another. The package's `__init__` (no unit) may import all, lazily."""
    if importer in ("", target) or target not in LAYER:
        return False
    return LAYER[target] >= LAYER[importer]


def test_every_top_level_module_has_a_layer() -> None:
    units = {unit_of(module_name(path)) for path in sources()} - {""}
    assert units <= LAYER.keys(), f"give these a place in LAYERS: {sorted(units - LAYER.keys())}"


def test_imports_point_downwards() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in sources()
        for name, line in imported(path)
        if breaks_rule(unit_of(module_name(path)), unit_of(name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "target"),
    [("methods", "formats"), ("formats", "stages"), ("stages", "cli"), ("inspect", "pipeline"), ("tensors", "formats")],
)
def test_the_rule_itself_forbids(importer: str, target: str) -> None:
    assert breaks_rule(importer, target)


def functions() -> Iterator[tuple[str, int]]:
    """Name and length in lines, docstring and signature included, of every function in the package."""
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    lengths = dict(functions())
    values = sorted(lengths.values())
    middle, tenth = median(values), quantiles(values, n=10)[-1]
    print(f"{len(values)} functions, median {middle:g} lines, 90% below {tenth:g}, longest {values[-1]}")
    long = [f"{name}: {length} lines" for name, length in lengths.items() if length > 60]
    assert not long, "\n".join(long)
    assert middle <= 12
    assert tenth <= 35


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def bases(node: ast.ClassDef) -> set[str]:
    """Names of the classes that one inherits from; those of other packages dotted, as `click.Group`."""
    return {ast.unparse(base).split("[")[0] for base in node.bases}


def is_abstract(node: ast.ClassDef) -> bool:
    return bool(bases(node) & {"Protocol", "ABC"})


def is_error(name: str) -> bool:
    return name.endswith("Error")


def test_nobody_inherits_from_a_concrete_class() -> None:
    concrete = {node.name for _, node in classes() if not is_abstract(node) and not is_error(node.name)}
    wrong = [f"{where} inherits from {sorted(b)}" for where, node in classes() if (b := bases(node) & concrete)]
    assert not wrong, "\n".join(wrong)


def test_classes_are_frozen_records_abstract_or_final() -> None:
    def fine(node: ast.ClassDef) -> bool:
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        frozen = any(mark.startswith("dataclass") and "frozen=True" in mark for mark in marks)
        melted = any(mark.startswith("dataclass") for mark in marks) and not frozen
        plain = is_abstract(node) or is_error(node.name) or bool(bases(node) & PLAIN_BASES)
        return not melted and (frozen or plain or "final" in marks)

    wrong = [where for where, node in classes() if not fine(node)]
    assert not wrong, "\n".join(wrong)


def test_no_environment_variable_is_an_option() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).split(".")[-1] in ("environ", "getenv")
    ]
    assert not wrong, "\n".join(wrong)


def test_public_names_are_few_sorted_and_there() -> None:
    import lowbit

    assert lowbit.__all__ == sorted(lowbit.__all__)
    assert len(lowbit.__all__) <= 15
    assert {name for name in dir(lowbit) if not name.startswith("_")} == set(lowbit.__all__)
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        lowbit.no_such_name  # noqa: B018


@pytest.mark.parametrize("folder", [folder for folder in (*PLUGINS, *REWRITES) if (PACKAGE / folder).exists()])
def test_a_plug_in_folder_holds_one_record_per_file(folder: str) -> None:
    from lowbit import plugins

    entries = {path.name for path in (PACKAGE / folder).iterdir() if path.name != "__pycache__"}
    assert all(name.endswith(".py") for name in entries), f"{folder} holds plug-ins and nothing else"
    files = {name.removesuffix(".py") for name in entries if not name.startswith("_")}
    assert set(plugins.names(folder)) == files
    records = [type(plugins.load(folder, name)) for name in files]
    assert len(set(records)) <= 1, f"{folder} mixes kinds of records: {records}"


def test_listing_plug_ins_imports_none() -> None:
    code = (
        "import sys; from lowbit import plugins; listed = [plugins.names(f) for f in sys.argv[1:]];"
        "print(sum(map(len, listed)), [m for m in sys.modules for f in sys.argv[1:] if m.startswith(f'lowbit.{f}')])"
    )
    done = subprocess.run([sys.executable, "-c", code, *PLUGINS], capture_output=True, text=True, check=True)
    count, _, loaded = done.stdout.strip().partition(" ")
    assert int(count) == len(list(chain.from_iterable((PACKAGE / f).glob("[!_]*.py") for f in PLUGINS)))
    assert loaded == "[]"


def test_annotated_shapes_are_checked_while_tests_run() -> None:
    import torch
    from jaxtyping import TypeCheckError

    from lowbit.schemes import parse
    from lowbit.tensors import QTensor

    wrong: object = torch.zeros(2, 2)
    with pytest.raises(TypeCheckError):
        QTensor(parse("int4-row"), (2, 2), wrong, torch.ones(2, 1))  # type: ignore[arg-type]  # codes are not uint8
