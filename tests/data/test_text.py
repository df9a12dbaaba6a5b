import pyarrow as pa
import pytest

from dynrec_jax.data.sources.text import clean, clean_column, without_surrogates

DIRTY = [
    ("Salt &amp; Pepper", "Salt & Pepper"),
    ("9&amp;quot; pan", '9" pan'),
    ("&amp;amp;lt;3", "<3"),
    ("caf&#233; &#xE9;t&eacute;", "café été"),
    ("AT&T, a=1&copy=2, R&D;", "AT&T, a=1&copy=2, R&D;"),
    ("&nosuchentity;", "&nosuchentity;"),
    ("one<br>two<br/>three<BR />four", "one two three four"),
    ("<p>one</p><p class='x'>two</p>", "one two"),
    ("<ul><li>a</li><li>b</li></ul>c", "a b c"),
    ("so<b>lid</b> <i>oak</i>", "solid oak"),
    ('see <a href="http://x.invalid/?a>b" target=_blank>here</a>', "see here"),
    ('<img src="a.png" alt="1 > 0" />tail', "tail"),
    ("<o:p>office</o:p>", "office"),
    ('<thing data-x="1">kept', "kept"),
    ("a<!-- not\nthis -->b", "ab"),
    ("a<script type='x'>if (a < b) {}</script>b<style>p {}</style>c", "a b c"),
    ("x < 5 and y > 3", "x < 5 and y > 3"),
    ("x &lt; 5 and y &gt; 3", "x < 5 and y > 3"),
    ("a <b and c> d", "a <b and c> d"),
    ("<Untitled> <3 <- ->", "<Untitled> <3 <- ->"),
    ("a<5 b>3", "a<5 b>3"),
    ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
    ("a\x00b\tc\r\n\n d\x9fe", "a b c d e"),
    ("  wide\u00a0\u2003\u3000space\u200b ", "wide space"),
    ("\ufeffmark", "mark"),
    ("keep 👩‍🚀 and e\u0301", "keep 👩‍🚀 and e\u0301"),
    ("<br>", None),
    (" \t", None),
    ("", None),
    (None, None),
    ("plain words, nothing else", "plain words, nothing else"),
]


@pytest.mark.parametrize(("text", "expected"), [pair for pair in DIRTY if pair[0] is not None])
def test_clean(text, expected):
    assert clean(text) == (expected or "")


def test_a_column_is_cleaned_as_its_values_are():
    texts = pa.array([text for text, _ in DIRTY], pa.string())
    assert clean_column(texts).to_pylist() == [expected for _, expected in DIRTY]
    assert clean_column(texts.slice(5, 9)).to_pylist() == [expected for _, expected in DIRTY[5:14]]


def test_every_kind_of_white_space_and_control_is_suspect():
    for number in [*range(0x21), *range(0x7F, 0xA1), 0x1680, *range(0x2000, 0x200C), 0x2028, 0x202F, 0x3000]:
        assert clean_column(pa.array([f"{chr(number)}a", f"a{chr(number)}"])).to_pylist() == ["a", "a"]


def test_halves_of_surrogate_pairs_are_replaced():
    assert without_surrogates("a\ud83db 😀") == "a?b 😀"


def test_whole_surrogate_pairs_are_characters():
    assert without_surrogates("a\ud83d\ude00b") == "a😀b"


def test_text_that_was_escaped_very_often_is_resolved_at_once():
    assert clean("&" + "amp;" * 100_000 + "lt;b&gt;c") == "c"
