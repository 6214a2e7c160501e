"""What markdown.js makes of answers: GitHub's dialect and formulas; nothing runs, loads or freezes."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import HOSTILE, LONG
from page_helpers import (
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    Served,
    ask,
    browser as browser,
    needs_browser,
    open_page,
    served as served,
    until,
)

VENDOR = Path(__file__).resolve().parent.parent / "nanochat" / "page" / "vendor"


def test_the_libraries_are_the_published_ones() -> None:
    listed = json.loads((VENDOR / "VERSIONS.json").read_text())
    files = {"VERSIONS.json"}
    for library in listed.values():
        assert library["version"] in library["url"] and library["integrity"].startswith("sha512-")
        for one in [library, *library.get("bundles", {}).values()]:
            assert one["licence"] and len((VENDOR / one["licence_file"]).read_text()) > 500
        for name, file in library["files"].items():
            content = (VENDOR / name).read_bytes()
            files.add(name)
            # A browser's tools would look for a map that is not there.
            assert b"sourceMappingURL" not in content
            assert hashlib.sha256(content + file["cut_end"].encode()).hexdigest() == file["sha256"], name
    assert files == {path.name for path in VENDOR.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def loaded(browser: Any, served: Served) -> Iterator[Any]:
    """A page with an answer, in whose place `draw(text)` draws, after the libraries are loaded."""
    context = browser.new_context()
    page = context.new_page()
    page.wrong, page.urls = [], []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (page.wrong.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: page.urls.append(request.url))
    open_page(page, served)
    page.evaluate("""async () => {
        const { drawMarkdown } = await import('/page/markdown.js');
        window.draw = (text, complete = true) => {
          window.box?.remove();
          window.box = document.createElement('div');
          box.className = 'text';
          document.querySelector('#log').append(box);
          drawMarkdown(box, text, complete);
          return box;
        };
        window.drawMarkdown = drawMarkdown;
        draw('$x$\\n\\n```js\\nlet x\\n```');
    }""")
    until(page, "document.querySelector('math') && document.querySelector('.hljs-keyword')")
    yield page
    context.close()


CASES = [
    ("**a** *b* ~~c~~ `d`", "p", ["a b c d"]),
    ("```python title='x y'\na\n```", "code.language-python", ["a"]),
    ("`````\n```\nin\n```\n`````", "pre", ["```\nin\n```"]),
    ("~~~~ js\na ``` b\n~~~\n~~~~", "pre", ["a ``` b\n~~~"]),
    ("```\nnot closed", "pre", ["not closed"]),
    ("1. a\n\n   b\n   - c\n     - d\n2. e", "ol > li > ul > li > ul > li", ["d"]),
    ("1. a\n\n   b\n\n2. e", "ol > li > p", ["a", "b", "e"]),
    ("7. a\n8. b", "ol[start='7'] > li", ["a", "b"]),
    ("- [ ] open\n- [x] done\n- [y] no", "li", ["☐ open", "☑ done", "[y] no"]),
    ("|a|b|\n|:-:|--:|\n|1|`x\\|y`|", "td", ["1", "x|y"]),
    ("|a|b|\n|:-:|--:|\n|1|2|", "td[align=right]", ["2"]),
    ("|a|\n|-|\n|1<br>2<sup>3</sup>|", "td > sup", ["3"]),
    ("[a [b] (c)](https://e.example/x_(y)?z=[1])", "a[href='https://e.example/x_(y)?z=%5B1%5D']", ["a [b] (c)"]),
    ("[a][r]\n\n[r]: https://e.example 'title'", "a[href='https://e.example']", ["a"]),
    ("see https://e.example/a_b_(c), ok", "a", ["https://e.example/a_b_(c)"]),
    ("(www.e.example/x?y=1). nanochat.py a@b.example", "a", ["www.e.example/x?y=1"]),
    ("<https://e.example>", "a", ["https://e.example"]),
    ("[a](mailto:a@b.example)", "a[href^='mailto:']", ["a"]),
    ("![picture](https://e.example/i.png)", "a[href='https://e.example/i.png']", ["picture"]),
    ("> a\n> > b", "blockquote blockquote", ["b"]),
    ("# a\n###### b", "h2, h6", ["a", "b"]),
    ("a\nb", "p br", [""]),
    ("a <div> & b", "p", ["a <div> & b"]),
    ("__init__ snake_case_name", "p", ["init snake_case_name"]),
]
FORMULAS = ["$x$", "$2^n$", "$5$", "$2x + 3$", r"\(a\)", "$$a$$", r"\[a\]", "$$\na\n- b\n= c\n$$", "- $$\n  a\n  $$"]
FORMULAS += [r"$\text{a b}$", "so $a$, $b$-c", "\\[\na\n\\]", "|a|\n|-|\n|$x_1$|", "$A$ and $B$"]
NO_FORMULAS = ["$5 and $10", "US$30-$40", "$5, $6.50, $7", "$HOME/$USER", "$5 or 5$", "a $ b $ c", "`$x$`", "\\$x\\$"]
NO_FORMULAS += ["$1,000 (of $2,000)", "$$", "$$$$", r"\[\]", "$a\nb$", "cost: 5$ or $6", r"\\(a\\)", "$PATH:$HOME"]


@needs_browser
def test_github_markdown(loaded: Any) -> None:
    read = "([text, selector]) => [...draw(text).querySelectorAll(selector)].map((node) => node.textContent.trim())"
    found = [(text, selector, loaded.evaluate(read, [text, selector])) for text, selector, _ in CASES]
    assert found == CASES
    assert loaded.evaluate("draw('```js\\nlet x = 1\\n```').querySelectorAll('.hljs-keyword').length") == 1


@needs_browser
def test_formulas_and_amounts_of_money(loaded: Any) -> None:
    count = "(text) => draw(text).querySelectorAll('math').length"
    assert {text: loaded.evaluate(count, text) >= 1 for text in FORMULAS} == dict.fromkeys(FORMULAS, True)
    assert {text: loaded.evaluate(count, text) for text in NO_FORMULAS} == dict.fromkeys(NO_FORMULAS, 0)
    # What is no formula after all stays as it was written; alignment and colour need the library's style sheet.
    assert loaded.evaluate("draw('$\\\\nonsense{$').textContent").strip() == "\\nonsense{"
    align = "getComputedStyle(draw('$$\\\\begin{aligned}a&=b\\\\end{aligned}$$').querySelector('mtd')).textAlign"
    assert loaded.evaluate(align).endswith("right")


TAGS = "DIV P BR STRONG EM S SUB SUP KBD CODE PRE BLOCKQUOTE UL OL LI H2 H3 H4 H5 H6 HR A TABLE THEAD TBODY TR TH TD"
OWN_TAGS = "SPAN BUTTON"  # markdown.js's own
ATTRIBUTES = "href rel target dir start class align style tabindex role aria-label type title"
CLASSES = r"(language-.*|block|formula|formula-block|code|bar|table|task|hljs-[\w-]+|\w+_+)$"
EXAMINE = """async (texts) => {
  const found = [], different = (list) => [...new Set(list)];
  for (const text of texts) {
    let box, took = Infinity;
    for (let i = 0; i < 5 && took > 250; i++) {  // other programs can only make a drawing slower
      const before = performance.now();
      box = draw(text);
      took = Math.min(took, performance.now() - before);
    }
    await new Promise((resolve) => setTimeout(resolve));
    const nodes = [...box.querySelectorAll('*')];
    const html = nodes.filter((n) => !n.closest('math')), math = nodes.filter((n) => n.closest('math'));
    found.push({
      took, tags: different(html.map((n) => n.tagName)), classes: different(html.flatMap((n) => [...n.classList])),
      attributes: different(html.flatMap((n) => n.getAttributeNames())),
      mathTags: different(math.map((n) => n.localName)), namespaces: different(math.map((n) => n.namespaceURI)),
      mathAttributes: different(math.flatMap((n) => n.getAttributeNames())),
      styles: nodes.map((n) => n.getAttribute('style') ?? '').join(';'),
      links: [...box.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.rel, a.target]),
    });
  }
  return found;
}"""


@needs_browser
def test_hostile_texts_run_nothing_and_load_nothing(loaded: Any, served: Served) -> None:
    assert len(set(HOSTILE)) >= 220
    for text, found in zip(HOSTILE, loaded.evaluate(EXAMINE, HOSTILE), strict=True):
        assert found["took"] < 500, (found["took"], text[:80])  # measured: 100 ms for the largest formula
        assert set(found["tags"]) <= set((TAGS + " " + OWN_TAGS).split()), text
        assert set(found["attributes"]) <= set(ATTRIBUTES.split()), text
        assert set(found["namespaces"]) <= {"http://www.w3.org/1998/Math/MathML"}, text
        assert all(tag.startswith("m") for tag in found["mathTags"]), text
        assert not [
            name for name in found["mathAttributes"] if re.match(r"on|href|xlink|src|id$|name$|action", name)
        ], text
        for href, rel, target in found["links"]:
            assert re.match(r"(https?://|https:|mailto:)", href) and "noopener" in rel and target == "_blank", text
        assert [name for name in found["classes"] if not re.match(CLASSES, name)] == [], text
        assert not re.search(r"url|position|image|expression|import|behavior", found["styles"]), (text, found["styles"])
    assert loaded.evaluate("[window.hacked, document.title, document.querySelectorAll('#log').length]") == [
        None,
        "nanochat",
        1,
    ]
    assert loaded.wrong == []
    assert {url for url in loaded.urls if not url.startswith((f"http://127.0.0.1:{served.port}/", "data:,"))} == set()


@needs_browser
def test_long_texts_do_not_freeze(loaded: Any) -> None:
    times = """(texts) => texts.map((text) => {
        const before = performance.now();
        draw(text);
        return performance.now() - before;
    })"""
    for text, took in zip(LONG, loaded.evaluate(times, LONG), strict=True):
        assert took < 6000, (took, text[:30])  # they took 9 s and more; a slow core takes 2.3
    assert loaded.wrong == []


@needs_browser
def test_hostile_answers_titles_and_files(loaded: Any, served: Served) -> None:
    served.pool.__init__()  # type: ignore[misc]
    text = "<img src=x onerror=window.hacked=1>\u202e<script>window.hacked=1</script>"
    served.pool.script = lambda sent: [
        *text.encode(),
        PYTHON,
        *text.encode(),
        PYTHON_END,
        OUTPUT,
        *text.encode(),
        OUTPUT_END,
    ]
    ask(loaded, text)
    bad = json.dumps(
        {"id": text, "title": text, "messages": {"a": {"id": text, "parent": None, "role": "user", "text": text}}}
    )
    files = [
        ("<img src=x onerror=hacked=1>.json", "{"),
        ("kept.json", bad),
        ('"><b>.json', f'[{{"role": "user", "content": {json.dumps(text)}}}]'),
    ]
    loaded.set_input_files(
        "#import-file",
        [{"name": name, "mimeType": "application/json", "buffer": body.encode()} for name, body in files],
    )
    until(
        loaded,
        "document.querySelectorAll('nav .open').length === 3 && document.querySelectorAll('.notice').length >= 2",
    )
    for one in loaded.locator("nav .open").all():
        one.click()
        assert loaded.locator("#log :is(script, img), nav :is(script, img), #notices :is(script, img, b)").count() == 0
        shown = loaded.locator("body").evaluate("node => node.textContent")
        assert "\u202e" not in shown and "<img src=x" in shown
    assert loaded.evaluate("window.hacked") is None
    loaded.locator("nav .open").nth(0).click()


@needs_browser
def test_directions(loaded: Any) -> None:
    """A list has its text's direction, a line its own, and nothing turns what is around it."""
    direction = "([text, selector]) => getComputedStyle(draw(text).querySelector(selector)).direction"
    assert loaded.evaluate(direction, ["- \u05e9\u05dc\u05d5\u05dd\n- b", "ul"]) == "rtl"
    assert loaded.evaluate(direction, ["> \u0645\u0631\u062d\u0628\u0627", "blockquote"]) == "rtl"
    assert loaded.evaluate(direction, ["- b\n- \u05e9\u05dc\u05d5\u05dd", "ul"]) == "ltr"
    at_right = """(text) => {
        const range = new Range(), own = draw(text).getBoundingClientRect();
        range.selectNodeContents(box.querySelector('p'));
        const line = range.getClientRects()[0];
        return own.right - line.right < line.left - own.left;
    }"""
    assert loaded.evaluate(at_right, "\u0645\u0631\u062d\u0628\u0627 abc")
    assert not loaded.evaluate(at_right, "abc \u0645\u0631\u062d\u0628\u0627")
    shown = loaded.evaluate("draw('a \\u202e b\\n\\n```\\n\\u2067\\u2067x\\n```').textContent")
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", shown) and "U+202E" in shown


@needs_browser
def test_what_is_drawn_stays_while_text_is_added(loaded: Any) -> None:
    """A selection, a scroll position and the focus, in earlier blocks and in the one that grows."""
    kept = loaded.evaluate("""() => {
        const text = 'First.\\n\\n```js\\nlet x = ' + 'y'.repeat(3000) + '\\n```\\n\\n- item one\\n- item two';
        const box = draw(text, false), pre = box.querySelector('pre'), item = box.querySelector('li').firstChild;
        pre.scrollLeft = 100;
        box.querySelector('.bar button').focus();
        getSelection().setBaseAndExtent(item, 2, item, 6);
        for (let i = 0; i < 20; i++) drawMarkdown(box, text + ' more'.repeat(i) + '\\n- item $x$'.repeat(i), false);
        drawMarkdown(box, text + '\\n- three\\n\\nEnd.', true);
        return [pre.isConnected, pre.scrollLeft, document.activeElement.textContent, String(getSelection()),
          box.querySelectorAll('li').length, box.textContent.includes('End.')];
    }""")
    assert kept == [True, 100, "Copy", "em o", 3, True]
    code = loaded.evaluate("""() => {
        const box = draw('```\\n' + 'x'.repeat(3000), false), pre = box.querySelector('pre');
        pre.scrollLeft = 50;
        drawMarkdown(box, '```\\n' + 'x'.repeat(3000) + '\\nmore', false);
        return [box.querySelector('pre') === pre, pre.scrollLeft, pre.textContent.trim().length];
    }""")
    assert code == [True, 50, 3005]


@needs_browser
def test_a_very_long_answer_grows_without_a_stop(loaded: Any) -> None:
    """Drawing what was added to 100,000 characters; about 20 ms on an idle core."""
    took = loaded.evaluate("""() => {
        const part = '## Part\\n\\nSome **bold** `code`, [a](https://e.example).\\n\\n- one\\n\\n```py\\nx\\n```\\n\\n';
        const text = part.repeat(100_000 / part.length), box = draw(text, false), took = [];
        for (let i = 0; i < 9; i++) {
          const before = performance.now();
          drawMarkdown(box, text + 'more '.repeat(i), false);
          took.push(performance.now() - before);
        }
        return Math.min(...took);
    }""")
    assert took < 200, took
