"""Where the binds are in a query: not in its texts, quoted names and comments, and `::` is PostgreSQL's cast."""

import re

_TOKEN = re.compile(
    r"'(?:[^'\\]|''|\\.)*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|--[^\n]*|/\*.*?\*/|::|:(key|sha256)\b", re.DOTALL
)


def has_binds(query: str) -> bool:
    return any(match[1] for match in _TOKEN.finditer(query))


def with_percents(query: str) -> str:
    """:sha256 -> %(sha256)s, as the drivers of PostgreSQL and MySQL have it; a % of the query's own is doubled."""
    pieces, end = [], 0
    for match in _TOKEN.finditer(query):
        text = query[end : match.start()] + ("" if match[1] else match[0])
        pieces += [text.replace("%", "%%"), f"%({match[1]})s" if match[1] else ""]
        end = match.end()
    return "".join([*pieces, query[end:].replace("%", "%%")])
