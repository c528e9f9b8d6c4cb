import ast
import subprocess
import sys
from importlib import resources

import pytest

import guardlens as gl


def type_checking_names():
    tree = ast.parse((resources.files("guardlens") / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.asname or alias.name: (node.module, alias.name) for node in block.body for alias in node.names}


def is_module(name):
    return gl._HOMES[name].rpartition(".")[2] == name


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_lists_of_public_names_agree():
    declared = type_checking_names()
    assert gl.__all__ == sorted(gl.__all__) and len(set(gl.__all__)) == len(gl.__all__)
    assert set(gl.__all__) == set(gl._HOMES) == set(declared)
    assert set(gl.__all__) <= set(dir(gl)) and dir(gl) == sorted(set(dir(gl)))
    for name, home in gl._HOMES.items():
        package = home.rpartition(".")[0]
        expected = ("guardlens" + (f".{package}" if package else "")) if is_module(name) else f"guardlens.{home}"
        assert declared[name] == (expected, name)


@pytest.mark.parametrize("name", gl.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(gl, name)
    assert value.__doc__ and value.__doc__.strip()
    if is_module(name):
        assert value.__name__ == f"guardlens.{gl._HOMES[name]}"
    else:
        assert value.__name__.rpartition(".")[2] == name and f"`{name}`" in gl.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"module 'guardlens' has no attribute 'colect'"):
        getattr(gl, "colect")  # noqa: B009


def test_importing_submodules_never_shadows_a_public_name():
    """`import guardlens.x` sets the attribute x of the package."""
    code = (
        "import importlib, pkgutil, guardlens as gl\n"
        "names = [m.name for m in pkgutil.iter_modules(gl.__path__) if m.name != '__main__']\n"
        "[importlib.import_module('guardlens.' + name) for name in names]\n"
        "print([name for name in ('load', 'collect', 'compare', 'sweep', 'evaluate', 'read_queries') if not callable(getattr(gl, name))],"
        " {name for name in set(names) & set(gl._HOMES) if gl._HOMES[name] != name})"
    )
    assert python(code) == "[] set()"


def test_pure_modules_stay_light():
    pure = """
        errors hooks data.queries results.files models.engine.batch data.activations results.tables directions interventions
        models.engine.compiler evaluation.judges experiments.scores results.progress
    """.split()
    heavy = ("nnsight", "transformers", "PIL", "pandas", "matplotlib", "sklearn")
    code = f"import sys\nfor name in {pure}: __import__('guardlens.' + name)\nprint([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"
    assert python("import sys, guardlens; print('torch' in sys.modules)") == "False"


def test_typed_and_versioned():
    from importlib.metadata import version

    assert (resources.files("guardlens") / "py.typed").is_file() and gl.__version__ == version("guardlens")
