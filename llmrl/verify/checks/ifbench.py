"""Instructions of IFBench (arXiv 2507.02833) that text alone decides: no tagger, syllables, city lists or fixed tasks.

Written from the published definitions, as `instructions` is.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable

from llmrl.verify.checks.text_parts import sentences

Check = Callable[..., bool]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONJUNCTIONS = frozenset({"and", "but", "for", "nor", "or", "so", "yet"})
_PRONOUNS = frozenset(
    {"i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves", "you", "your", "yours", "yourself"}
    | {"yourselves", "he", "him", "his", "himself", "she", "her", "hers", "herself", "it", "its", "itself", "they"}
    | {"them", "their", "theirs", "themselves"}
)
_VOWELS = frozenset("aeiou")
_CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
_CLOSING = {")": "(", "]": "[", "}": "{"}


def plain_words(text: str) -> list[str]:
    """Return the words of a text in lower case, between white space, without ASCII punctuation."""
    return text.lower().translate(_NO_PUNCTUATION).split()


def _unique_words(text: str, N: int) -> bool:
    return len({word.strip(string.punctuation) for word in text.lower().split()}) >= N


def _palindromes(text: str) -> bool:
    return sum(len(word) >= 5 and word == word[::-1] for word in plain_words(text)) >= 10


def _punctuation(text: str) -> bool:
    interrobang = re.search(r"\?!|!\?|\u203d", text)
    return interrobang is not None and set(".,!?;:") <= set(text.replace(interrobang.group(), "", 1))


def _nested_brackets(text: str) -> bool:
    open_ones: list[str] = []
    deepest = 0
    for character in text:
        if character in "([{":
            open_ones.append(character)
            deepest = max(deepest, len(open_ones))
        elif character in _CLOSING:
            if open_ones and open_ones[-1] == _CLOSING[character]:
                open_ones.pop()
                if deepest >= 5:
                    return True
            else:
                open_ones, deepest = [], 0
    return False


def _nested_quotes(text: str) -> bool:
    open_ones: list[str] = []
    deepest = 0
    for character in text:
        if open_ones and character == open_ones[-1]:
            open_ones.pop()
            if deepest - len(open_ones) >= 3:
                return True
        elif character in "\"'":
            open_ones.append(character)
            deepest = max(deepest, len(open_ones))
    return False


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _prime_lengths(text: str) -> bool:
    return all(_is_prime(len(word)) for word in plain_words(text))


def _word_per_line(text: str) -> bool:
    text = text.translate(_NO_PUNCTUATION).strip()
    return len([line for line in text.split("\n") if line]) == len(text.split())


def _keyword_in_sentence(text: str, word: str, N: int) -> bool:
    found = sentences(text)
    return 1 <= N <= len(found) and word.lower() in found[N - 1].lower()


def _last_first(text: str) -> bool:
    edges = [[word for word in plain_words(sentence)] for sentence in sentences(text)]
    return all(a and b and a[-1] == b[0] for a, b in itertools.pairwise(edges))


def _increment(text: str, small_n: int) -> bool:
    counts = [len(plain_words(sentence)) for sentence in sentences(text)]
    return bool(counts) and all(b == a + small_n for a, b in itertools.pairwise(counts))


def _no_consecutive(text: str) -> bool:
    return all(a[0] != b[0] for a, b in itertools.pairwise(plain_words(text)))


def _explained_quotes(text: str) -> bool:
    text = "".join(text.replace("\u201c", '"').replace("\u201d", '"').replace("'\"'", "").split())
    end = text.strip(string.digits + string.punctuation.replace('"', ""))
    return '""' not in text and not end.endswith('"')


def _alphabet(text: str) -> bool:
    first = [word[0] for word in plain_words(text)]
    letters = string.ascii_lowercase
    if not first or any(letter not in letters for letter in first):
        return False
    return all((letters.index(a) + 1) % 26 == letters.index(b) for a, b in itertools.pairwise(first))


def _few_vowels(text: str) -> bool:
    return "\n" not in text.strip() and len(_VOWELS & set(text.lower())) <= 3


def _same_ends(text: str) -> bool:
    paragraphs = [line.strip().lower().strip(string.punctuation + " ").split() for line in text.split("\n")]
    return all(not words or words[0] == words[-1] for words in paragraphs)


def _keyword_counts(text: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    wanted = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(text.lower().count(keyword.lower()) == count for keyword, count in wanted)


def _one_of(text: str, options: list[str] | str) -> bool:
    if isinstance(options, str):
        options = re.split(r"\s*[/,]\s*|\s+or\s+", options)
    bare = string.punctuation + string.whitespace
    return text.strip(bare).lower() in {option.strip(bare).lower() for option in options}


def _thesis(text: str) -> bool:
    match = re.search(r"<(i|em)>(.*?)</\1>(.*)", text, re.DOTALL)
    return match is not None and bool(match.group(2).strip()) and bool(match.group(3).strip())


def _template(text: str) -> bool:
    return all(part in text for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


IFBENCH_CHECKS: dict[str, Check] = {
    "count:word_count_range": lambda text, min_words, max_words: (
        min_words <= len(re.findall(r"\w+", text)) <= max_words
    ),
    "count:unique_word_count": _unique_words,
    "count:numbers": lambda text, N: len(re.findall(r"\d+", text.translate(_NO_PUNCTUATION))) == N,
    "count:punctuation": _punctuation,
    "count:conjunctions": lambda text, small_n: (
        len(_CONJUNCTIONS & {word.strip(string.punctuation).lower() for word in text.split()}) >= small_n
    ),
    "count:pronouns": lambda text, N: sum(word in _PRONOUNS for word in plain_words(text.replace("/", " "))) >= N,
    "count:keywords_multiple": _keyword_counts,
    "words:palindrome": _palindromes,
    "words:prime_lengths": _prime_lengths,
    "words:repeats": lambda text, small_n: all(count <= small_n for count in Counter(plain_words(text)).values()),
    "words:last_first": _last_first,
    "words:no_consecutive": _no_consecutive,
    "words:alphabet": _alphabet,
    "words:vowel": _few_vowels,
    "words:consonants": lambda text: all(_CLUSTER.search(word) for word in text.lower().split()),
    "words:paragraph_last_first": _same_ends,
    "sentence:keyword": _keyword_in_sentence,
    "sentence:increment": _increment,
    "format:parentheses": _nested_brackets,
    "format:quotes": _nested_quotes,
    "format:quote_unquote": _explained_quotes,
    "format:newline": _word_per_line,
    "format:list": lambda text, sep: text.count(sep) >= 2,
    "format:no_whitespace": lambda text: not re.search(r"\s", text),
    "format:output_template": _template,
    "format:options": _one_of,
    "format:thesis": _thesis,
}
"""IFBench's instruction ids, 27 of its 58."""
