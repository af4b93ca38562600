"""What adding documents did, and bringing a folder in step with the disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from ragkv.retrieval import Change, SkippedFile


@dataclass
class Files:
    """Documents by what becomes of them.

    Attributes:
        added, changed, unchanged: sources of those that are there.
        moved: by the new source, what the document was called before, where its file was moved.
        skipped: files that cannot be read, with the reason; documents of theirs stay as they are.
        hidden: how many hidden files and folders are passed over.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    skipped: list[SkippedFile] = field(default_factory=list)
    hidden: int = 0


@dataclass
class Added(Files):
    """What adding documents did; and as :class:`Files`, of texts too.

    Attributes:
        changes: what changed in the catalogue, a document each, in the order given.
        tokens_read: tokens that the model had to read; 0 where everything was known.
        kv_bytes: what the KV of these documents take now, by tier.
    """

    changes: list[Change] = field(default_factory=list)
    tokens_read: int = 0
    kv_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Planned(Files):
    """What adding files would do and take; and as :class:`Files`.

    Attributes:
        passages: of all files.
        tokens: of all passages.
        stored_tokens: of those whose KV are there already.
        tokens_to_read: that the model would run, some for the text in front of what is missing.
        seconds: that it would compute, by its measured rate.
        kv_bytes: what the missing KV would take, by codec.
        codec: that the store uses.
    """

    passages: int = 0
    tokens: int = 0
    stored_tokens: int = 0
    tokens_to_read: int = 0
    seconds: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    codec: str = ""


@dataclass
class Synced(Files):
    """What bringing the documents of a folder in step with the disk did, or would do; and as :class:`Files`.

    Attributes:
        removed: documents whose files are gone.
        tokens: that were read, or would have to be.
        kv_bytes: what the KV of the files that are there take, by tier.
    """

    removed: list[str] = field(default_factory=list)
    tokens: int = 0
    kv_bytes: dict[str, int] = field(default_factory=dict)
