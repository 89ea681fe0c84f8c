"""Citations and their evidence: an answer and the conversation in; the pages it cites and that its tools returned out.

Only what a tool said is evidence. A link that no tool output contained, and a citation whose quotation is not on the
cited page, count for nothing. Follows CaRR (arXiv 2601.06021); everything is linear in the length of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmrl.types import Message
from llmrl.verify.checks.answers import multilingual
from llmrl.verify.checks.text import without_thinking
from llmrl.verify.judge.verdict import clean_text

MAX_CITATIONS = 1000
"""An answer with more is not read further: it bounds the work that one answer can cause."""
MAX_QUOTES = 100
"""Beside one citation; with more, the citation counts for nothing."""
MIN_QUOTE_TOKENS = 5
"""Shorter passages in quotation marks are names and titles, not quotations of the page."""

# [[4](https://host/page)] or [4](https://host/page), : the link must be followed by "]" or ",".
_CITATION_OPENS = re.compile(r"\[[0-9]{1,9}\]\((?:view-source:)?(?=https?://)")
_CITATION_CLOSES = re.compile(r"\)[\],]|\s")
# An opening mark inside ends the search for the closing one, so that a run of opening marks costs linear time.
_QUOTE = re.compile(
    '"([^"\n]*)"|\u201c([^\u201c\u201d\n]*)\u201d|\u00ab([^\u00ab\u00bb\n]*)\u00bb|\u300c([^\u300c\u300d\n]*)\u300d'
)
_ELLIPSIS = re.compile(r"\[?(?:\.\.\.|\u2026)\]?")
_SEARCH_RESULT = re.compile(r"^\[([0-9]{1,9})\] Title:", re.MULTILINE)
# "read" only where a word begins: threads and spreadsheets retrieve nothing.
_RETRIEVAL_TOOL = re.compile(r"search|retriev|open|find|brows|visit|fetch|(?<![a-z])read|crawl|scrap", re.IGNORECASE)
_URL_PREFIXES = ("view-source:", "https://r.jina.ai/", "http://r.jina.ai/")


@dataclass(frozen=True, slots=True)
class Citation:
    """One inline citation."""

    url: str
    """As `clean_url` gives it."""
    start: int
    """Where it begins in the text."""
    end: int


@dataclass(slots=True)
class Page:
    """What the tools returned about one address."""

    url: str
    title: str = ""
    published: str = ""
    texts: list[str] = field(default_factory=list)
    """Search snippets, opened contents and find results, in order of appearance."""


@dataclass(slots=True)
class Evidence:
    """The cited pages that were seen, and what happened to the other citations."""

    pages: list[Page] = field(default_factory=list)
    """In citation order."""
    num_cited: int = 0
    """Distinct addresses cited."""
    unseen: list[str] = field(default_factory=list)
    """Cited addresses that no tool returned."""
    misquoted: list[str] = field(default_factory=list)
    """Cited addresses left out because a quotation beside them is not on the page."""


# --- the answer -------------------------------------------------------------------------------------------------------


def final_response(history: list[Message]) -> str | None:
    """Text of the last message, without thinking and without the References section; None when it is no answer.

    None when the last message is not the assistant's or has no content left.
    """
    if not history or history[-1].get("role") != "assistant":
        return None
    return judged_text(str(history[-1].get("content") or "")) or None


def judged_text(text: str) -> str:
    """The part of an answer that is judged: without its thinking, before the last "## References", stripped.

    NUL and lone surrogates become U+FFFD, so that the text can be sent anywhere.
    """
    return clean_text(without_thinking(text).rsplit("## References", 1)[0]).strip()


def clean_url(url: str) -> str:
    """The address without reader prefixes (view-source:, r.jina.ai), fragment and trailing slash."""
    url = url.strip()
    while url.startswith(_URL_PREFIXES):
        url = url.removeprefix(next(prefix for prefix in _URL_PREFIXES if url.startswith(prefix)))
    return url.partition("#")[0].rstrip("/")


def extract_citations(text: str) -> list[Citation]:
    """The inline citations of a text: `[[4](https://host/page)]`, several as `[[0](https://a), [5](https://b)]`.

    The link ends at the first ")" that "]" or "," follows, so addresses may hold parentheses but no white space; a
    bare `[4](https://host)` is no citation.
    """
    found: list[Citation] = []
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
    """Every page that the tools of a conversation returned, by address (`clean_url`).

    Tool outputs are messages of role tool (OpenAI's form, or CaRR's list of {tool_call_id, output}) and
    <tool_response> blocks of user messages. Understood are:
    - search results: blocks of `[i] Title:`, `[i] URL Source:`, `[i] Description:`, optionally `[i] Date:`;
    - an opened page: `Title:`, `URL Source:`, `Published Time:`, then `Markdown Content:`;
    - find results: `[Match i]` blocks, which belong to the page opened last;
    - JSON with objects that have a `url` (or `link`): all other text in the object is the page's.
    Anything else is no evidence: not what the policy wrote itself, and not the output of a tool whose name does not say
    that it retrieves (search, open, find, browse, visit, fetch, read ...), since code can print a forged page.
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
            if not output.startswith("["):  # a page, not a list of results
                current = known
    return pages


def _retrieved(history: list[Message]) -> Iterator[str]:
    """The outputs of retrieval tools, stripped, in order."""
    for name, output in _tool_outputs(history):
        if not name or _RETRIEVAL_TOOL.search(name):
            yield output.strip()


def _tool_outputs(history: list[Message]) -> Iterator[tuple[str, str]]:
    """(name of the tool, "" where it cannot be known; output), in order."""
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
                # An output that contains the marks itself: nobody can say any more which tool a block is from.
                foreign = (name for name in last_names if name and not _RETRIEVAL_TOOL.search(name))
                last_names = [next(foreign, "")] * len(blocks)
            for name, block in zip(last_names, blocks, strict=True):
                yield name, block.partition("</tool_response>")[0]


def _calls(message: Message) -> list[tuple[str, str]]:
    """(identifier, name of the tool) of each call in an assistant message, "" where unknown."""
    calls = list(message.get("tool_calls") or [])
    if not calls:
        # A call that is only thought about is not executed, so it would name the output of another one.
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
    # (value, page its text belongs to); a stack, since web data may be nested deeper than Python recurses.
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
    """The pages a response cites and its tools returned, in citation order, at most `max_pages`.

    A text that several pages share is kept on the first of them.

    Args:
        response: what `judged_text` gives.
        history: the conversation, tool outputs included.
        max_pages: further cited pages are left out.
        check_quotes: leave out citations beside a quotation that none of the pages cited there contains. A quotation
            is a passage in quotation marks, of at least MIN_QUOTE_TOKENS words besides articles, between the previous
            citation (or the start of the line) and this one; case, punctuation and left-out parts ("...") do not
            matter.
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
    """(text that precedes, addresses) of citations that stand side by side."""
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
    # The separator is no token, so that no quotation runs over from one text into the next.
    return "".join(f" {multilingual(text)} |" for text in [page.title, *page.texts])
