"""What people mean by a document's name, and when a document's file is gone."""

import os

import pytest

from ragkv.errors import DocumentError
from ragkv.retrieval.naming import gone, matching, nearest, only, unknown


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["docs/a.md", "docs/deep/b.txt", "docs2/a.md", "c[1].md"]
    return ["text:1234", "folder", *(str(tmp_path / name) for name in names)]


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("text:1234", ["text:1234"]),
        ("folder", ["folder"]),
        ("docs/a.md", ["docs/a.md"]),
        ("./docs/../docs/a.md", ["docs/a.md"]),
        ("docs", ["docs/a.md", "docs/deep/b.txt"]),
        ("docs/", ["docs/a.md", "docs/deep/b.txt"]),
        (".", ["docs/a.md", "docs/deep/b.txt", "docs2/a.md", "c[1].md"]),
        ("docs/*.txt", ["docs/deep/b.txt"]),
        ("*/a.md", ["docs/a.md", "docs2/a.md"]),
        ("text:*", ["text:1234"]),
        ("c[1].md", ["c[1].md"]),
        ("b.txt", []),
        ("doc", []),
        ("", []),
        (" ", []),
    ],
)
def test_what_is_meant(sources, tmp_path, target, meant):
    assert [os.path.relpath(name) if os.path.isabs(name) else name for name in matching(sources, target)] == meant


def test_paths_from_anywhere(sources, tmp_path, monkeypatch):
    assert matching(sources, tmp_path / "docs" / "a.md") == [str(tmp_path / "docs/a.md")]
    monkeypatch.chdir("/")
    assert matching(sources, str(tmp_path / "docs*")) == [name for name in sources if "/docs" in name]
    with pytest.raises(DocumentError, match="a str or a path, got 3"):
        matching(sources, 3)


def test_a_link_means_what_it_points_to(sources, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").touch()
    (tmp_path / "short").symlink_to("docs/a.md")
    (tmp_path / "all").symlink_to("docs")
    assert matching(sources, "short") == [str(tmp_path / "docs/a.md")]
    assert len(matching(sources, "all")) == 2


def test_what_is_near(sources, tmp_path):
    assert nearest(sources, "elsewhere/B.TXT")[0] == str(tmp_path / "docs/deep/b.txt")
    assert nearest(sources, "text:1235") == ["text:1234"]
    assert nearest(sources, "quite different") == []
    assert unknown(sources, "b.txt", "'ragkv docs'") == (
        f"no document is called 'b.txt': did you mean '{tmp_path}/docs/deep/b.txt'? 'ragkv docs' lists them"
    )
    assert only(sources, "docs/a.md", "") == str(tmp_path / "docs/a.md")
    with pytest.raises(DocumentError, match="no document is called 'docs'"):
        only(sources, "docs", "")


def test_gone(tmp_path, monkeypatch):
    file, link = tmp_path / "a", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    assert not gone(str(file)) and not gone("a name") and not gone("text:12")
    assert gone(str(link)), "its document stands under the path that it points to"
    assert gone(str(tmp_path)), "a folder is no file"
    assert gone(str(file / "below")) and gone(str(tmp_path / "b"))

    def broken(path):
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "stat", broken)
    assert not gone(str(tmp_path / "b")), "a file that cannot be looked at may be there"
