"""What the pages name is there: files, headings, programs, commands and their options."""

import ast
import functools
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import ragkv
from ragkv.cli.arguments import parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], key=str)
OWNERS = {"ragkv": ragkv, "ragkv.RAG": ragkv.RAG, "RAG": ragkv.RAG, "ragkv.Engine": ragkv.Engine}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:\.venv/bin/)?python (?:-P )?(-m )?([\w./]+)(.*)$")


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands(page: Path) -> list[str]:
    """Lines of code blocks and code in the text that begin as a command does; comments behind them cut off."""
    text = page.read_text()
    lines = [line for block in FENCE.findall(text) for line in re.sub(r"\\\n\s*", "", block).splitlines()[1:-1]]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [re.split(r"\s+# ", line)[0].strip() for line in lines]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(\.venv/bin/)?(python|ragkv|make) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page):
    [top] = [action for action in parser()._actions if action.dest == "command"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        program = PROGRAM.match(line)
        if line.startswith("make "):
            assert line.split()[1] in targets, f"{page.name}: {line}"
        elif program and program[1] and not (ROOT / program[2].split(".")[0]).is_dir():
            continue  # another library's module
        elif program:
            named = Path(program[2].replace(".", "/") + ".py" if program[1] else program[2])
            assert (ROOT / named).exists(), f"{page.name}: {line}"
            known = {
                node.value for node in ast.walk(ast.parse((ROOT / named).read_text())) if isinstance(node, ast.Constant)
            }
            assert set(re.findall(r"(?<=\s)--[\w-]+", program[3])) <= known, f"{page.name}: {line}"
        elif line.startswith("ragkv ") and re.match(r"ragkv [a-z]+( |$)", line):
            _, command, *words = shlex.split(line)
            assert command in top.choices, f"{page.name}: {line}"
            known = top.choices[command]._option_string_actions
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= set(known), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code(page):
    """It can be compiled, and what it takes from ragkv is there. docs/tutorial.md is run as well."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        code = compile(block, page.name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(code):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ragkv"):
                taken = [(import_module(str(node.module)), alias.name) for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in OWNERS:
                taken = [(OWNERS[ast.unparse(node.value)], node.attr)]
            else:
                continue
            for owner, name in taken:
                assert hasattr(owner, name) or find_spec(f"{owner.__name__}.{name}"), f"{owner.__name__}.{name}"


def test_commands_are_found():
    """The two tests above would pass on pages in which they see nothing."""
    seen = [line.split()[:2] for page in PAGES for line in commands(page)]
    assert {tuple(words) for words in seen} >= {("make", "test"), ("ragkv", "add"), ("python", "-m")} and len(seen) > 50


def test_every_page_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in readme]
    assert not missing
