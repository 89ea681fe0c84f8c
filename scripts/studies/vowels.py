"""A reward that every model gets something of, so that there are updates to push: the share of vowels."""

from __future__ import annotations


def vowels(completion: str) -> float:
    """Return the share of the letters that are vowels."""
    letters = [letter for letter in completion.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))
