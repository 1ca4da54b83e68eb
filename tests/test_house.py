"""The house rules that a reader counts on: the core fits one sitting, functions fit a screen, nothing runs text.

pytest tests/test_house.py -s     # prints the lines of code of each module
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASIDE = {"benchmark.py", "evaluate.py", "make_tiny.py", "plot.py"}  # training needs none of them
ALGORITHM = {"train.py", "rollout.py", "grpo.py", "qwen2_model.py"}  # and the reward
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def code_lines(text: str) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({token.start[0] for token in tokens if token.type not in LAYOUT} - docstrings)


def test_the_core_fits_one_sitting():
    lines = {path.name: code_lines(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
    task = (ROOT / "countdown_task.py").read_text()
    lines["countdown_task.py"] = code_lines(task.partition("# ---- For evaluate.py")[0])
    own = {name for name in lines if name.endswith("_task.py") and name != "countdown_task.py"}
    core = sum(count for name, count in lines.items() if name not in ASIDE | own)
    reward = code_lines(task.partition("# ---- Problems from parquet")[0])
    algorithm = sum(lines[name] for name in ALGORITHM) + reward
    tests = sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py"))
    print("\n" + "\n".join(f"{name:22s} {count:5d}" for name, count in lines.items()))
    print(f"core {core}, of it the algorithm {algorithm}; tests {tests} lines, blanks and comments included")
    assert core <= 2290  # the aim is 1,500 and 120 for robustness and many GPUs: LOG.md says what stands in its way
    assert algorithm <= 675  # likewise 600
    assert lines["benchmark.py"] <= 550
    assert tests <= 5520


def test_functions_fit_a_screen_modules_say_what_they_do_and_nothing_runs_text():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, DEFINITIONS[:2]):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is too long"
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called not in ("eval", "exec"), f"{path.name}, line {node.lineno}: {called}"


def test_no_module_imports_one_that_imports_it():
    modules = {path.stem for path in ROOT.glob("*.py")}
    imports = {}
    for name in modules:
        nodes = [
            n
            for n in ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        named = {n.module if isinstance(n, ast.ImportFrom) else alias.name for n in nodes for alias in n.names}
        imports[name] = named & modules
    while leaves := [name for name, needs in imports.items() if not needs & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, f"these import each other in a circle: {sorted(imports)}"
