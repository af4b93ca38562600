"""The API pages, one for each public module: what its ``__all__`` names, from the docstrings."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import griffe
from mkdocs.structure.files import File

MODULES = ("ragkv", "ragkv.methods", "ragkv.retrieval", "ragkv.store", "ragkv.store.codecs", "ragkv.store.policy")
MODULES += ("ragkv.kernels", "ragkv.evaluation", "ragkv.bundled", "ragkv.adapters")

# The docs come in the order of the README's table; what it does not name comes behind, by name.
ROWS = re.findall(r"^\|.*", (Path(__file__).parents[2] / "README.md").read_text(), re.MULTILINE)
ORDER = re.findall(r"\]\((docs/[\w-]+\.md)\)", "".join(ROWS))

# What the public face hands out, and nobody makes.
RESULTS = ("rag.SourcedAnswer", "report.AnswerReport", "session.Session", "streaming.AsyncAnswerStream")
RESULTS += ("library.done.Files", "library.intake.Added", "library.intake.Synced", "library.listing.ListedDocument")
RESULTS += ("store.stats.StoreStats",)

# Classes that have a part of their methods from a base that is not public itself.
DERIVED = ("Engine", "RAG")


def modules() -> list[str]:
    """The public modules that there are; of a package without an ``__all__`` those in it that have one."""
    found: list[str] = []
    for name in MODULES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            below = (f"{name}.{module.name}" for module in iter_modules(spec.submodule_search_locations))
            found += [name] if _public(name) else filter(_public, below)
    return found


def _public(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and "__all__" in Path(str(spec.origin)).read_text(encoding="utf-8")


def page(module: str) -> str:
    """The Markdown that mkdocstrings fills."""
    names = sorted(import_module(module).__all__, key=lambda name: name.endswith("Error"))  # errors last
    own = [f"::: {module}", "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}", ""]
    whole = dict.fromkeys(DERIVED, "    options: {inherited_members: true}\n")
    return "\n".join([f"# {module}", "", *own, *(f"::: {module}.{name}\n{whole.get(name, '')}" for name in names)])


def on_files(files, config):
    """Called by MkDocs: adds the pages to the files that it found, and orders all."""
    for module in modules():
        files.append(File.generated(config, f"reference/{module}.md", content=page(module)))
    results = "\n".join(["# What calls return", "", *(f"::: ragkv.{name}\n" for name in RESULTS)])
    files.append(File.generated(config, "reference/results.md", content=results))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def navigation(pages):
    """What is shown on the left: by folder, the docs in their order."""
    docs = sorted((page for page in pages if page.startswith("docs/")), key=_place)
    reference = [page for page in pages if page.startswith("reference/")]
    project = sorted({*pages} - {*docs, *reference, "README.md"})
    return ["README.md", {"Docs": docs}, {"Reference": reference}, {"Project": project}]


def _place(page):
    return ORDER.index(page) if page in ORDER else len(ORDER), page


class PlainRoles(griffe.Extension):
    """Shows ``:meth:`Engine.add``` as what it names."""

    def on_object(self, *, obj, **_):
        """Called by griffe for whatever has a docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
