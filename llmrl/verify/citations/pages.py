"""Citations and their evidence: an answer and its conversation in; the pages that it cites and its tools returned out.

Only tool outputs are evidence. A link that no tool output contains, and a citation whose quotation is not on the cited
page, count for nothing. Follows CaRR (arXiv 2601.06021). Everything is linear in the length of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmrl.types import Message
from llmrl.verify.checks.answers import multilingual
from llmrl.verify.judge.verdict import clean_text
from llmrl.verify.thinking import without_thinking

MAX_CITATIONS = 1000
"""Further citations of an answer are not read, which bounds the work that one answer can cause."""
MAX_QUOTES = 100
"""Per citation; a citation with more quotations counts for nothing."""
MIN_QUOTE_TOKENS = 5
"""Shorter passages in quotation marks are names and titles, not quotations of the page."""

# [[4](https://host/page)] or [4](https://host/page), -- the link must be followed by "]" or ",".
_CITATION_OPENS = re.compile(r"\[[0-9]{1,9}\]\((?:view-source:)?(?=https?://)")
_CITATION_CLOSES = re.compile(r"\)[\],]|\s")
# A quotation may not contain an opening mark, so a run of opening marks costs linear time.
_QUOTE = re.compile(
    '"([^"\n]*)"|\u201c([^\u201c\u201d\n]*)\u201d|\u00ab([^\u00ab\u00bb\n]*)\u00bb|\u300c([^\u300c\u300d\n]*)\u300d'
)
_ELLIPSIS = re.compile(r"\[?(?:\.\.\.|\u2026)\]?")
_SEARCH_RESULT = re.compile(r"^\[([0-9]{1,9})\] Title:", re.MULTILINE)
# "read" matches only at the beginning of a word: tools named thread or spreadsheet retrieve nothing.
_RETRIEVAL_TOOL = re.compile(r"search|retriev|open|find|brows|visit|fetch|(?<![a-z])read|crawl|scrap", re.IGNORECASE)
_URL_PREFIXES = ("view-source:", "https://r.jina.ai/", "http://r.jina.ai/")


@dataclass(frozen=True, slots=True)
class Citation:
    """One inline citation."""

    url: str
    """Normalized by `clean_url`."""
    start: int
    """Offset of its first character in the text."""
    end: int
    """Offset after its last character."""


@dataclass(slots=True)
class Page:
    """Everything the tools returned about one address."""

    url: str
    title: str = ""
    published: str = ""
    texts: list[str] = field(default_factory=list)
    """Search snippets, opened contents and find results, in order of appearance."""


@dataclass(slots=True)
class Evidence:
    """The cited pages that count as evidence, and why the other citations do not."""

    pages: list[Page] = field(default_factory=list)
    """In citation order."""
    num_cited: int = 0
    """Distinct addresses cited."""
    unseen: list[str] = field(default_factory=list)
    """Cited addresses that no tool returned."""
    misquoted: list[str] = field(default_factory=list)
    """Cited addresses left out because a quotation next to them is not on the page."""


# --- the answer -------------------------------------------------------------------------------------------------------


def final_response(history: list[Message]) -> str | None:
    """Return the judged text of the last message, or None if it is not the assistant's or no text is left."""
    if not history or history[-1].get("role") != "assistant":
        return None
    return judged_text(str(history[-1].get("content") or "")) or None


def judged_text(text: str) -> str:
    """Return the part of an answer that is judged: without thinking, before the last "## References", stripped.

    NUL and lone surrogates become U+FFFD, because judges' servers may reject them.
    """
    return clean_text(without_thinking(text).rsplit("## References", 1)[0]).strip()


def clean_url(url: str) -> str:
    """Remove reader prefixes (view-source:, r.jina.ai), the fragment and trailing slashes from an address."""
    url = url.strip()
    while url.startswith(_URL_PREFIXES):
        url = url.removeprefix(next(prefix for prefix in _URL_PREFIXES if url.startswith(prefix)))
    return url.partition("#")[0].rstrip("/")


def extract_citations(text: str) -> list[Citation]:
    """Find the inline citations of a text: `[[4](https://host/page)]`, several as `[[0](https://a), [5](https://b)]`.

    The link ends at the first ")" followed by "]" or ",", so addresses may contain parentheses but not white space. A
    bare `[4](https://host)` is not a citation.
    """
    found: list[Citation] = []
    # Openings and closings advance together, so the scan is linear however many openings are never closed.
    closings = _CITATION_CLOSES.finditer(text)
    closing = next(closings, None)
    for opening in _CITATION_OPENS.finditer(text):
        if found and opening.start() < found[-1].end:
            continue
        while closing is not None and closing.start() < opening.end():
            closing = next(closings, None)
        if closing is None or len(found) == MAX_CITATIONS:
            break
        if closing.group()[0] == ")":
            url = clean_url(text[opening.end() : closing.start()])
            found.append(Citation(url, opening.start(), closing.start() + 1))
    return found


# --- the history ------------------------------------------------------------------------------------------------------


def collect_pages(history: list[Message]) -> dict[str, Page]:
    """Collect every page that the tools of a conversation returned, by address (`clean_url`).

    Tool outputs are messages of role tool (OpenAI's form, or CaRR's list of {tool_call_id, output}) and
    <tool_response> blocks of user messages. These forms are read:
    - search results: blocks of `[i] Title:`, `[i] URL Source:`, `[i] Description:`, optionally `[i] Date:`;
    - an opened page: `Title:`, `URL Source:`, `Published Time:`, then `Markdown Content:`;
    - find results: `[Match i]` blocks, which belong to the last opened page;
    - JSON with objects that have a `url` (or `link`): all other text in the object belongs to the page.
    Nothing else is evidence: neither text that the policy wrote itself, nor the output of a tool whose name does not
    indicate retrieval (search, open, find, browse, visit, fetch, read ...), because code can print a forged page.
    """
    pages: dict[str, Page] = {}
    current: Page | None = None
    for output in _retrieved(history):
        if output.startswith("[Match "):
            if current is not None:
                current.texts.append(output)
            continue
        for page in _json_pages(output) or _search_results(output) or _opened_page(output):
            known = pages.setdefault(page.url, Page(page.url))
            known.title = known.title or page.title
            known.published = known.published or page.published
            known.texts += page.texts
            if not output.startswith("["):  # an opened page rather than a list of results
                current = known
    return pages


def _retrieved(history: list[Message]) -> Iterator[str]:
    """Yield the outputs of retrieval tools, stripped, in order."""
    for name, output in _tool_outputs(history):
        if not name or _RETRIEVAL_TOOL.search(name):
            yield output.strip()


def _tool_outputs(history: list[Message]) -> Iterator[tuple[str, str]]:
    """Yield (name of the tool or "" if unknown, output), in order."""
    names: dict[str, str] = {}
    last_names: list[str] = []
    for message in history:
        content = message.get("content")
        if message.get("role") == "assistant":
            calls = _calls(message)
            names.update((identifier, name) for identifier, name in calls if identifier)
            last_names = [name for _, name in calls]
        elif message.get("role") == "tool":
            name = names.get(str(message.get("tool_call_id")), str(message.get("name") or ""))
            for part in content if isinstance(content, list) else [{"text": content or ""}]:
                yield names.get(str(part.get("tool_call_id")), name), str(part.get("output") or part.get("text") or "")
        elif message.get("role") == "user" and isinstance(content, str):
            blocks = content.split("<tool_response>")[1:]
            if len(blocks) != len(last_names):
                # Some output contains the tags itself, so it is unknown which tool a block is from. If any of the
                # tools does not retrieve, assume the worst: all blocks are its output.
                foreign = (name for name in last_names if name and not _RETRIEVAL_TOOL.search(name))
                last_names = [next(foreign, "")] * len(blocks)
            for name, block in zip(last_names, blocks, strict=True):
                yield name, block.partition("</tool_response>")[0]


def _calls(message: Message) -> list[tuple[str, str]]:
    """Return (identifier, name of the tool) of each call in an assistant message; "" if unknown."""
    calls = list(message.get("tool_calls") or [])
    if not calls:
        # A call inside the thinking is not executed; counting it would assign outputs to the wrong tools.
        for block in without_thinking(str(message.get("content") or "")).split("<tool_call>")[1:]:
            try:
                calls.append(json.loads(block.partition("</tool_call>")[0]))
            except (ValueError, RecursionError):
                calls.append({})
    found = []
    for call in calls:
        call = call if isinstance(call, dict) else {}
        name = call.get("name") or (call.get("function") or {}).get("name") or ""
        found.append((str(call.get("tool_call_id") or call.get("id") or ""), str(name)))
    return found


def _search_results(output: str) -> list[Page]:
    if not _SEARCH_RESULT.match(output):
        return []
    starts = list(_SEARCH_RESULT.finditer(output))
    ends = [start.start() for start in starts[1:]] + [len(output)]
    pages = []
    for start, end in zip(starts, ends, strict=True):
        mark = f"\n[{start.group(1)}] "
        title, found, rest = output[start.end() : end].partition(mark + "URL Source:")
        url, described, description = rest.partition(mark + "Description:")
        if found and described:
            snippet, _, date = description.partition(mark + "Date:")
            pages.append(Page(clean_url(url), title.strip(), date.strip(), _non_blank(snippet)))
    return pages


def _opened_page(output: str) -> list[Page]:
    if not output.startswith(("Title:", "URL Source:")):
        return []
    header, _, content = output.partition("Markdown Content:")
    fields: dict[str, str] = {}
    for line in header.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if not fields.get("URL Source"):
        return []
    url = clean_url(fields["URL Source"])
    return [Page(url, fields.get("Title", ""), fields.get("Published Time", ""), _non_blank(content))]


def _json_pages(output: str) -> list[Page]:
    if not output.lstrip().startswith(("{", "[")):
        return []
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        return []
    pages: list[Page] = []
    # Pairs of (value, page that its text belongs to). A stack, because web data may nest deeper than Python recurses.
    pending: list[tuple[Any, Page | None]] = [(value, None)]
    while pending:
        item, page = pending.pop()
        if isinstance(item, dict):
            url = item.get("url") or item.get("link")
            if isinstance(url, str) and not item.get("error"):
                page = Page(clean_url(url), str(item.get("title") or ""), str(item.get("date") or ""))
                pages.append(page)
            rest = [child for key, child in item.items() if key not in ("url", "link", "title", "date")]
            pending += [(child, page) for child in reversed(rest)]
        elif isinstance(item, list):
            pending += [(child, page) for child in reversed(item)]
        elif isinstance(item, str) and page is not None:
            page.texts += _non_blank(item)
    return pages


def _non_blank(text: str) -> list[str]:
    return [text.strip()] if text.strip() else []


# --- both together ----------------------------------------------------------------------------------------------------


def gather_evidence(
    response: str, history: list[Message], *, max_pages: int = 20, check_quotes: bool = True
) -> Evidence:
    """Collect the pages that a response cites and its tools returned, in citation order, at most `max_pages`.

    A text shared by several pages is kept only on the first of them.

    Args:
        response: the answer, from `judged_text`.
        history: the conversation, including tool outputs.
        max_pages: leave out further cited pages.
        check_quotes: leave out citations next to a quotation that none of the pages cited there contains. A quotation
            is a passage in quotation marks, of at least MIN_QUOTE_TOKENS words besides articles, between the previous
            citation (or the start of the line) and this one; case, punctuation and omissions ("...") do not matter.
    """
    seen = collect_pages(history)
    evidence = Evidence()
    cited: dict[str, bool] = {}
    searchable: dict[str, str] = {}
    for passage, urls in _citation_groups(response, extract_citations(response)):
        known = [url for url in dict.fromkeys(urls) if url in seen]
        fragments = _quoted_fragments(passage) if check_quotes and known else []
        for url in known if fragments else ():
            if url not in searchable:
                searchable[url] = _searchable(seen[url])
        honest = len(fragments) <= MAX_QUOTES and all(
            any(fragment in searchable[url] for url in known) for fragment in fragments
        )
        for url in urls:
            cited[url] = cited.get(url, False) or (url in seen and honest)
    evidence.num_cited = len(cited)
    evidence.unseen = [url for url in cited if url not in seen]
    evidence.misquoted = [url for url, good in cited.items() if url in seen and not good]
    shown: set[str] = set()
    for url in [url for url, good in cited.items() if good][:max_pages]:
        page = seen[url]
        texts = [text for text in dict.fromkeys(page.texts) if text not in shown]
        shown.update(texts)
        evidence.pages.append(Page(url, page.title, page.published, texts))
    return evidence


def _citation_groups(text: str, citations: list[Citation]) -> list[tuple[str, list[str]]]:
    """Group adjacent citations: (the text before them, their addresses)."""
    groups: list[tuple[str, list[str]]] = []
    end = 0
    for citation in citations:
        between = text[end : citation.start]
        if groups and not between.strip(" ,;[]"):
            groups[-1][1].append(citation.url)
        else:
            groups.append((between.rpartition("\n")[2], [citation.url]))
        end = citation.end
    return groups


def _quoted_fragments(passage: str) -> list[str]:
    fragments = []
    for match in _QUOTE.finditer(passage):
        quote = match.group(match.lastindex or 0)
        if len(multilingual(quote).split()) >= MIN_QUOTE_TOKENS:
            fragments += [f" {part} " for part in map(multilingual, _ELLIPSIS.split(quote)) if part]
    return fragments


def _searchable(page: Page) -> str:
    # Normalized text has no line breaks, so no quotation can match across two texts.
    return "\n".join(f" {multilingual(text)} " for text in [page.title, *page.texts])
