"""The house rules that a reader counts on; `pytest tests/test_house.py -s` prints the lines of code of each module."""

import ast
import io
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"": ROOT, "plumbing.": ROOT / "plumbing", "tools.": ROOT / "tools", "examples.": ROOT / "examples"}
MODULES = {place + path.stem: path for place, folder in PLACES.items() for path in sorted(folder.glob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
ALGORITHM = {"train", "grpo", "rollout", "qwen2_model", "countdown_task", "optimizer", "tokenizer", "data_types"}
BELOW_PLUMBING = {"data_types", "qwen2_model", "optimizer", "tokenizer"}
EXCEPTIONS = {("plumbing.run", "rollout")}  # the sampler, which is set up for training and for evaluate.py alike
TOP_LEVEL = """README.md LICENSE requirements.txt requirements-dev.txt pyproject.toml config.yml config_tiny.yml
    train.py grpo.py rollout.py qwen2_model.py countdown_task.py optimizer.py tokenizer.py data_types.py evaluate.py
    plot.py plumbing tools examples docs tests tiny .ci .gitignore benchmarks"""
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(name: str) -> list[str]:
    """The lines of a module that hold code: no blanks, no comments, no docstrings."""
    text, numbers = MODULES[name].read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        numbers.update(range(token.start[0], token.end[0] + 1) if token.type not in LAYOUT else ())
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            numbers.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [text.splitlines()[number - 1] for number in sorted(numbers)]


def imports(name: str) -> set[str]:
    """The modules of the repository that a module imports, anywhere in it; examples/ is on the path."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found | {f"examples.{module}" for module in found}) & MODULES.keys()


def test_the_core_fits_one_sitting():
    lines = {name: code_lines(name) for name in MODULES}
    core = [(len(line), name, line) for name in ALGORITHM for line in lines[name]]
    plumbing = sum(len(lines[name]) for name in MODULES if name.startswith("plumbing."))
    tests = sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py"))
    print(*(f"\n{name:24s} {len(lines[name]):5d}" for name in MODULES))
    print(f"algorithm {len(core)}, plumbing {plumbing}; tests {tests} lines, blanks and comments included")
    assert [line for line in core if line[0] > 110] == []
    assert sum(length > 100 for length, _, _ in core) <= 0.05 * len(core)
    assert len(core) <= 940
    assert plumbing <= 1100
    assert tests <= 4692


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_does_in_functions_that_fit_a_screen_and_runs_no_text(name):
    assert ast.get_docstring(TREES[name])
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, FUNCTIONS) or node.end_lineno - node.lineno < 50, node.name
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        assert called not in ("eval", "exec"), f"line {node.lineno}"


def may_import(importer: str, imported: str) -> bool:
    of, to = importer.rpartition(".")[0], imported.rpartition(".")[0]  # tools, examples, plumbing, or nothing: the root
    if of == "tools" or (importer, imported) in {("evaluate", "train"), *EXCEPTIONS}:
        return True
    if to == "tools" or imported in ("train", "evaluate"):
        return False
    return {"plumbing": to == "plumbing" or imported in BELOW_PLUMBING, "": to != "examples"}.get(of, True)


def test_imports_point_downwards():
    pairs = [(name, needed) for name in MODULES for needed in imports(name)]
    assert [pair for pair in pairs if not may_import(*pair)] == []


def test_no_module_imports_one_that_imports_it():
    left = {name: imports(name) for name in MODULES}
    while leaves := [name for name, needs in left.items() if not needs & left.keys()]:
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_the_top_level_holds_what_the_readme_lists():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {path.partition("/")[0] for path in tracked.splitlines()} == {*TOP_LEVEL.split()}
