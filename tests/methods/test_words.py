"""Methods as words are read off their classes; tests/cli/test_usage.py has the command line's side."""

import pytest

from ragkv import LegoLink, Method, MethodError, Reuse
from ragkv.methods.words import knobs_of, known_methods, parse_method


def test_every_method_with_defaults_has_a_word():
    known = known_methods()
    assert {"auto", "reuse", "lego-link", "cache-blend", "sensitive-tokens", "full-prefill"} <= known.keys()
    for name, kind in known.items():
        assert parse_method(name) == kind()
    with pytest.raises(MethodError, match="no method 'union'"):
        parse_method("union")


def test_settings_are_a_dataclass_fields():
    class Plain(Method):
        def select(self, view):
            return view.layout.inexact

    assert list(knobs_of(LegoLink)) == ["k"]
    assert knobs_of(Reuse) == knobs_of(Plain) == {}
