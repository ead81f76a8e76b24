"""Text of any origin as HTML: nothing is markup, nothing is hidden, and what is plain stays."""

import html
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from retro_jax.report.escapes import escape, visible

HOSTILE = "</script><b>\"'&\x00\x1b[2J\r\x7f\x85\u202e\u2066\u200f\u200b\ufeff\u2028\udc80"


def test_hostile_text_is_shown_and_not_obeyed():
    assert visible(HOSTILE) == (
        "</script><b>\"'&⟨U+0000⟩⟨U+001B⟩[2J⟨U+000D⟩⟨U+007F⟩⟨U+0085⟩⟨U+202E⟩⟨U+2066⟩⟨U+200F⟩⟨U+200B⟩"
        "⟨U+FEFF⟩⟨U+2028⟩⟨U+DC80⟩"
    )
    assert escape(HOSTILE).startswith("&lt;/script&gt;&lt;b&gt;&quot;&#x27;&amp;⟨U")


def test_ordinary_text_stays():
    text = "a\tb\n  é e\u0301 ﬁ 日本 עברית العربية \u0645\u06cc\u200c\u062e 👩\u200d🔬 \U0001f99e € \xa0"
    assert visible(text) == text


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_any_text_reads_back_as_what_is_visible(text: str):
    made = escape(text)
    made.encode()
    assert html.unescape(made) == visible(text)
    assert not set("<>\"'") & set(made)
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    left = {c for c in made if unicodedata.category(c) in hidden}
    assert left <= set("\n\t\u200c\u200d")
