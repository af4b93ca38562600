"""What a scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Service:
    """What one namespace asked for and got.

    Attributes:
        waiting: requests that wait.
        running: those whose prompt is computed, or whose answer is decoded.
        done: those that were let in and are over.
        refused: those that were not let in: at a deadline, for want of room, or because nobody wanted them any more.
        waited_s: in the line, all together.
        served_s: from their beginning to their end, all together.
        reused_tokens: of their prompts, those that were stored.
        computed_tokens: those that were not.
        output_tokens: of their answers.
    """

    waiting: int = 0
    running: int = 0
    done: int = 0
    refused: int = 0
    waited_s: float = 0.0
    served_s: float = 0.0
    reused_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class SchedulerStats:
    """A scheduler's figures since it was made.

    Attributes:
        waiting: requests that wait now.
        running: those that are computed or decoded now.
        bytes: what prompts and answers take that are computed or decoded now, with all the room that they asked for.
        namespaces: by namespace, of the last 1,000 that asked for something.
    """

    waiting: int
    running: int
    bytes: int
    namespaces: dict[str, Service] = field(default_factory=dict)
