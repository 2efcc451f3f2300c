"""While tests run, every call in `lowbit` is checked against its annotations, shapes included.

beartype's own hook knows no shapes that agree between arguments; jaxtyping's has them agree, but binds the arguments of
every call anew and checks them twice, which took more than half of the time of all tests. This one does that only where
an annotation has a shape.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from inspect import isclass, isgeneratorfunction
from types import CodeType, FunctionType, ModuleType
from typing import Any, cast, final, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

_NAME = "__checked__"
# What it raises is a `TypeError`, as Python raises where types are wrong.
_CHECK = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def _hint(text: object, names: dict[str, Any]) -> Any:
    """What an annotation says; anything where its names are imported for mypy alone."""
    try:
        return eval(text, names) if isinstance(text, str) else text
    except NameError:
        return Any


def _has_shape(hint: object) -> bool:
    parts = hint if isinstance(hint, list) else get_args(hint)
    return (isclass(hint) and issubclass(hint, AbstractArray)) or any(map(_has_shape, parts))


def _started(generator: Callable[..., Any]) -> Callable[..., Any]:
    """It as a plain function, whose arguments are checked when it is called, and not when the first value is asked."""

    @wraps(generator)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return generator(*args, **kwargs)

    return plain


def _function(function: Callable[..., Any]) -> Callable[..., Any]:
    names = cast(FunctionType, function).__globals__
    hints = {name: _hint(text, names) for name, text in function.__annotations__.items()}
    if isgeneratorfunction(function):
        function = _started(function)
        hints.pop("return", None)
    function.__annotations__ = hints
    made: Callable[..., Any] = _CHECK(function)
    if not any(map(_has_shape, hints.values())):
        return made

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return made(*args, **kwargs)

    return inside


def _checked(made: Any) -> Any:
    """A function that checks its calls, or a dataclass whose `__init__` does."""
    if isclass(made):
        if "__dataclass_fields__" in vars(made):
            setattr(made, "__init__", _function(vars(made)["__init__"]))  # noqa: B010 - mypy knows no such assignment
        return made
    return _function(made)


@final
class _Decorate(ast.NodeTransformer):
    """Checks come first on functions, and last on classes: `dataclass` has made their `__init__` by then."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(ast.copy_location(ast.Name(_NAME, ast.Load()), node))
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, ast.copy_location(ast.Name(_NAME, ast.Load()), node))
        return self.generic_visit(node)


@final
class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compiled each time: what lies in `__pycache__` is for runs without checks."""
        tree = _Decorate().visit(ast.parse(self.get_data(self.path)))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_NAME] = _checked
        super().exec_module(module)


@final
class _Finder:
    """Modules of one package, found where they would be."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check(package: str) -> None:
    """From now on, in modules that are imported."""
    assert package not in sys.modules, f"{package} is imported already"
    sys.meta_path.insert(0, cast(Any, _Finder(package)))
