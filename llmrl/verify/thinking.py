"""What a completion says outside its thinking: the one rule that every verifier reads by.

Only the standard library is imported here: programs are checked by a bare Python too.
"""

from __future__ import annotations


def without_thinking(text: str) -> str:
    """Return the part of a completion that answers: everything outside its `<think> ... </think>` blocks.

    Every verifier reads a completion through this function, so all of them judge the same text:

    - A closed block is removed wherever it stands. Blocks do not nest: the first `</think>` closes.
    - A block that is never closed is thinking without an answer; it is removed to the end.
    - Text before a first `</think>` that nothing opened is thinking too: many chat templates put `<think>` at the end
      of the prompt. Such thinking that is cut off before its `</think>` would look like an answer, so rewards put what
      the prompt holds of the message (their argument `prefilled`) in front of the completion.
    - Any other `</think>` closes nothing; the tag alone is removed.

    What remains of several parts is joined by line breaks, so that removing a block never makes a new word or tag.
    The result holds no thinking tag: applying the function twice changes nothing. Time is linear in the length.

    Example:
        >>> without_thinking("<think>a</think>b<think>c")
        'b'
    """
    first, *later = text.split("</think>")
    if later and "<think>" not in first:
        first = ""
    # Each part ends where a `</think>` stood or the text ended, so thinking runs from its first `<think>` to its end.
    answers = (part.partition("<think>")[0] for part in (first, *later))
    return "\n".join(answer for answer in answers if answer)
