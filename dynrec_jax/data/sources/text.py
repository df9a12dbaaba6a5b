"""Text as people wrote it: entities resolved, tags taken out, white space in order."""

import html
import re

import pyarrow as pa
import pyarrow.compute as pc

SPACE = r"\x00-\x20\x7f-\xa0\x{1680}\x{2000}-\x{200b}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
# What may have to be mended, for the engine that looks at whole columns (RE2); all else is clean already.
SUSPECT = rf"[&<]|^ | $|  |[{SPACE.replace('x20', 'x1f')}]"
SPACES = re.compile("[" + re.sub(r"\\x\{(\w+)\}", r"\\u\1", SPACE) + "]+")
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
AMPERSANDS = re.compile("&(?:amp;)+")
# With its semicolon: without, `a=1&copy=2` would lose a word.
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Only names of HTML make a tag, and only `name=value` or a few bare words an attribute: `x < 5 and y > 3`,
# `a <b and c> d` and `<Untitled>` are text.
BLOCKS = (
    "address article aside blockquote body br caption center dd details div dl dt fieldset figcaption figure footer "
    "form h1 h2 h3 h4 h5 h6 head header hr html iframe legend li main menu nav noscript ol optgroup option p pre "
    "section select summary table tbody td textarea tfoot th thead title tr ul video audio"
)
INLINE = (
    "a abbr acronym b bdi bdo big button cite code col colgroup data del dfn em embed font i img input ins kbd "
    "label link map area mark meta nobr object param picture q s samp small source span strike strong sub sup svg "
    "time track tt u var wbr"
)
VALUE = r"""\s+[^\s"'<>/=]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
BARE = r"\s+(?:checked|compact|controls|disabled|hidden|noshade|nowrap|selected)(?=[\s/>])"
TAG = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<!doctype[^<>]*>|<!\[CDATA\[|\]\]>"
    r"|<(script|style)\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>"
    rf"|</?({BLOCKS.replace(' ', '|')})(?:{VALUE}|{BARE})*\s*/?>"
    rf"|</?(?:{INLINE.replace(' ', '|')}|[a-z]\w*:\w+)(?:{VALUE}|{BARE})*\s*/?>"
    rf"|<[a-z][\w-]*(?:{VALUE})+\s*/?>",
    re.IGNORECASE | re.DOTALL,
)


def clean(text: str) -> str:
    """Text without entities, tags and control characters, with single spaces inside and none around it.

    Entities that were escaped twice (`&amp;quot;`) are resolved to the end. Tags that begin or end a block become a
    space, all others nothing; scripts and styles go with what is in them.
    """
    text = AMPERSANDS.sub("&", text)  # at once: one level a turn would take as long as the text is, squared
    while (resolved := ENTITY.sub(lambda found: html.unescape(found[0]), text)) != text:
        text = resolved
    if "<" in text:
        text = TAG.sub(lambda found: " " if found[1] or found[2] else "", text)
    return SPACES.sub(" ", text).strip()


def clean_column(texts: pa.Array) -> pa.Array:
    """`clean` for a column of strings; null where nothing is left.

    A column is looked at as a whole, and only what may have to be mended goes through Python.
    """
    suspect = pc.fill_null(pc.match_substring_regex(texts, SUSPECT), False)
    if pc.any(suspect).as_py():
        mended = pa.array([clean(text) for text in texts.filter(suspect).to_pylist()], texts.type)
        texts = pc.replace_with_mask(texts, suspect, mended)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)


def without_surrogates(text: str) -> str:
    """Text whose surrogate pairs are characters, and whose halves of such, which cannot be stored, question marks."""
    whole = PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    return whole.encode("utf-8", "replace").decode()
