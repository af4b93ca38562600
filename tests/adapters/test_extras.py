"""Frameworks are extras: nothing of them is loaded before it is asked for, and a missing one is named."""

import pytest

from tests.fresh import fresh

FRAMEWORKS = {"haystack": "haystack", "llamaindex": "llama_index", "langchain": "langchain_core"}


def test_nothing_is_loaded_before_it_is_asked_for(warm):
    code = (
        "import sys, ragkv, ragkv.adapters, ragkv.adapters.passages, ragkv.adapters.parts\n"
        f"print(sorted(set({list(FRAMEWORKS.values())}) & set(sys.modules)))"
    )
    assert fresh(code, python=warm) == "[]"


@pytest.mark.parametrize("extra", ["langchain", "llamaindex", "haystack"])
def test_a_missing_one_is_named(warm, extra):
    code = (
        f"import sys; sys.modules[{FRAMEWORKS[extra]!r}] = None\n"
        "from ragkv import MissingPackageError\n"
        f"try:\n    import ragkv.adapters.{extra}\n"
        "except MissingPackageError as error:\n    print(error)\n"
    )
    assert f"pip install 'ragkv[{extra}]'" in fresh(code, python=warm)


@pytest.mark.parametrize("extra", ["langchain", "llamaindex", "haystack"])
def test_one_does_without_the_others(warm, extra):
    others = [name for key, name in FRAMEWORKS.items() if key != extra]
    code = (
        f"import sys\nfor name in {others}: sys.modules[name] = None\n"
        f"import ragkv.adapters.{extra} as adapter\n"
        "print(all(hasattr(adapter, name) for name in adapter.__all__))"
    )
    assert fresh(code, python=warm) == "True"
