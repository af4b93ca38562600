"""Everything that ragkv raises on purpose derives from :class:`RagKVError`."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from types import UnionType
from typing import Any, ClassVar, NoReturn, Self, get_args

#: What a :class:`RagKVError` says of a question that comes too late.
CLOSED = "nothing is answered any more: it is closed"


class RagKVError(Exception):
    """Base of all errors that ragkv raises on purpose."""


class UnsupportedModelError(RagKVError):
    """The model cannot be driven exactly: the message names the reason and what to do."""


class ModelNotFoundError(RagKVError, OSError):
    """A model, or a tokenizer, is not where it was asked for, or cannot be read there."""


class ModelChangedError(RagKVError):
    """The model's weights, adapter or attention changed in the middle of something. Do it again with the model as it is now."""


class PromptError(RagKVError, ValueError):
    """A prompt cannot be built: empty question, empty chunk, ids out of the vocabulary, bad template, bad chat messages."""


class PromptTooLongError(PromptError):
    """The prompt (and the room for its answer) exceeds the model's positions."""


class ArgumentError(RagKVError, ValueError):
    """An argument that the engine was given is out of range, or cannot be honoured."""


class ConversationError(RagKVError, RuntimeError):
    """An earlier turn cannot be gone on from: another answer is being made behind it, or was made in its place."""


class OverloadedError(RagKVError, RuntimeError):
    """A request was not begun: there is no room for it, or its turn did not come in time. Ask again later, or for less."""


class DeadlineError(RagKVError, TimeoutError):
    """A request was not answered at its deadline."""


class UnknownArgumentError(RagKVError, TypeError):
    """An argument of a name that nobody knows."""


class IncompleteAnswerError(RagKVError, ValueError):
    """An answer ended before it fitted its schema.

    Attributes:
        text: as far as it came.
    """

    def __init__(self, text: str):
        self.text = text
        super().__init__(
            f"the answer ended before it was whole JSON: allow more max_new_tokens, and no stop text inside; it is {text!r:.200}"
        )

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.text,)  # from process to process: an error is made of its message by default


class NonFiniteError(RagKVError, ArithmeticError):
    """The model computed NaN or infinite logits: most often it overflows in its dtype."""


class ArgumentTypeError(RagKVError, TypeError):
    """An argument is of another type than it must be."""


class MethodError(RagKVError, ValueError):
    """A method's knob is out of range, or a method asked fusion for something impossible."""


class CalibrationError(MethodError):
    """There is no calibration, or none can be made of what was given."""


class StoreError(RagKVError):
    """The KV store, or a folder on disk, cannot do what was asked. What was stored before is still readable."""


class StoreFullError(StoreError):
    """An entry cannot be stored: larger than the budget, or the disk or the map is full."""


class UploadError(StoreError, TimeoutError):
    """Not all that is to be sent to a shared pool has come there in time. It is noted, and sent later."""


class PublicationError(StoreError):
    """A published catalogue cannot be had, or made: there is none, it is of another model or embedder, or the pool takes less."""


class RecordError(StoreError):
    """A stored record is damaged or of a format that this version does not read."""


class IncompatibleFolderError(RagKVError):
    """A folder was made with another embedder than the one given."""


class DocumentError(RagKVError):
    """A file or document cannot be read as text."""


class RetrievalError(RagKVError, ValueError):
    """The chunker, embedder, index, catalogue or retriever was asked for something impossible."""


class MissingPackageError(RagKVError, ImportError):
    """An optional package is not installed: the message names the command that installs it."""


class OfOneProcess:
    """What holds threads, locks or open files, which no copy and no other process can have.

    Args:
        instead: of the class: what to do where one is needed elsewhere.
    """

    _instead: ClassVar[str] = ""

    def __init_subclass__(cls, instead: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._instead = instead or cls._instead

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArgumentTypeError(
            f"{type(self).__name__} cannot be pickled or deep-copied, for it holds what belongs to this process: {self._instead}"
        )


def in_one_line(error: Exception) -> str:
    """All that an error says."""
    return " ".join(str(error).split())


def first_line(error: Exception) -> str:
    """What an error says first, or what it is called where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def instance(name: str, value: Any, kinds: type | UnionType, must: str) -> None:
    """Check that an argument is of some type; ``True`` and ``False`` are no numbers.

    Raises:
        ArgumentTypeError: it is not; the message says what it must be.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in (get_args(kinds) or (kinds,))):
        raise ArgumentTypeError(f"{name} must be {must}, got {value!r:.80}")


def listable(value: Any) -> bool:
    """Whether something can be gone through, one by one: not one text, which would be a list of its characters."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def half_a_pair(text: str) -> bool:
    """Whether half of a surrogate pair is in a text, as in a file's name that is no UTF-8: no encoder takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def checked_namespace(namespace: str) -> str:
    """A namespace as it may be kept.

    Raises:
        ArgumentTypeError: it is no text.
        ArgumentError: it is not valid Unicode.
    """
    instance("namespace", namespace, str, "a str")
    if half_a_pair(namespace):
        raise ArgumentError(f"namespace must be valid Unicode, got half a surrogate pair: {namespace!a:.80}")
    return namespace


def no_question(value: Any) -> str:
    """What is wrong with something that was asked instead of a question."""
    parts = value if isinstance(value, list | tuple) else [value]
    if parts and all(isinstance(part, Mapping) and "role" in part for part in parts):
        return (
            f"a question is text, not chat messages: give these as a list, RAG.ask(messages=[...]); got {value!r:.80}"
        )
    if len(parts) > 1 and all(isinstance(part, str) for part in parts):
        return f"there is one question at a time: ask these {len(parts)} one by one"
    return f"the question must be a str that is not blank, got {value!r:.80}"


def is_number(value: object) -> bool:
    """Whether it is a real number that a float can be, which infinity is; neither NaN nor a truth value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def whole_number(name: str, value: int, least: int = 0) -> int:
    """A whole number that an argument must be, at least ``least``.

    Raises:
        ArgumentError: it is smaller.
        ArgumentTypeError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ArgumentError(f"{name} must be >= {least}, got {value}")
    return value
