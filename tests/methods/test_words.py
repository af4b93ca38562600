"""Methods as words are read off their classes; tests/cli/test_usage.py has the command line's side."""

import pytest

from ragkv import Auto, CacheBlend, LegoLink, Method, MethodError, Reuse, Union
from ragkv.methods.words import knobs_of, known_methods, parse_method, words_of


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("relevant-tokens:keep_document=ture", "keep_document must be of type bool, got 'ture'"),
        ("relevant-tokens:ratio=0.1,ratio=0.2", "ratio is given twice"),
    ],
)
def test_a_setting_that_is_misspelt_is_not_another(text, said):
    with pytest.raises(MethodError, match=said):
        parse_method(text)


def test_methods_give_their_words():
    for method, text in (
        (Reuse(), "reuse"),
        (LegoLink(k=32), "lego-link:k=32"),
        (CacheBlend(gradual=(0.3, 0.2, 0.1), signal="key"), "cache-blend:signal=key,gradual=0.3/0.2/0.1"),
        (Auto(), "auto"),
    ):
        said = words_of(method)
        assert said is not None and parse_method(said) == method
        assert sorted(said.replace(":", ",").split(",")) == sorted(text.replace(":", ",").split(","))

    class Own(Reuse):
        pass

    assert words_of(Union(Reuse(), LegoLink())) is words_of(Own()) is words_of(Auto(repair=Reuse())) is None
