"""Reading, writing and probabilities on the page: scrolling that never fights, typing, tokens and what they become."""

from typing import Any

from page_helpers import (
    Served,
    answer,
    answered,
    ask,
    browser as browser,
    needs_browser,
    open_page,
    page as page,
    served as served,
    until,
)

pytestmark = needs_browser
AT_END = "document.querySelector('#log').scrollHeight - log.scrollTop - log.clientHeight < 9"
NEWEST = "!document.querySelector('#newest').classList.contains('hidden')"


def stream_a_long_answer(page: Any, served: Served) -> None:
    """Return while it is being written and fills more than the screen."""
    served.pool.pause, served.pool.script = 0.01, lambda text: "line\n" * 400
    ask(page, "go", wait=False)
    until(page, "document.querySelector('#log').scrollHeight > 1.3 * log.clientHeight")


def test_the_stream_follows_until_the_reader_scrolls_up_by_whatever_means(page: Any, served: Served) -> None:
    stream_a_long_answer(page, served)
    until(page, AT_END)
    ways = {
        "a wheel, by little": lambda: (page.mouse.move(700, 300), page.mouse.wheel(0, -3)),
        "a wheel": lambda: page.mouse.wheel(0, -200),
        "a key": lambda: (page.focus("#log"), page.keyboard.press("PageUp")),
        "a scroll bar or a search": lambda: page.evaluate("document.querySelector('#log').scrollTop -= 60"),
    }
    for way, scroll_up in ways.items():
        scroll_up()
        until(page, NEWEST)
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 250))")  # the end of smooth scrolling
        before, length = page.evaluate("[log.scrollTop, document.querySelector('#log').scrollHeight]")
        until(page, f"document.querySelector('#log').scrollHeight > {length} + 40")
        assert page.evaluate("log.scrollTop") == before, way
        page.click("#newest")
        until(page, f"{AT_END} && !({NEWEST})")
        length = page.evaluate("log.scrollHeight")
        until(page, f"log.scrollHeight > {length} + 40 && {AT_END}")
    page.evaluate("document.querySelector('#log').scrollTop = 0")
    until(page, NEWEST)
    page.evaluate("log.scrollTop = log.scrollHeight")  # down to the end by hand
    until(page, f"!({NEWEST})")


def test_selecting_text_stops_the_following(page: Any, served: Served) -> None:
    stream_a_long_answer(page, served)
    box = page.locator("#log").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 260, steps=3)
    before = page.evaluate("log.scrollTop")
    length = page.evaluate("log.scrollHeight")
    until(page, f"log.scrollHeight > {length} + 40")
    page.mouse.up()
    until(page, NEWEST)
    assert page.evaluate("log.scrollTop") == before and page.evaluate("String(getSelection()).length") > 0


def test_a_conversation_of_2000_messages_stays_quick(page: Any, served: Served) -> None:
    took = page.evaluate("""async () => {
        const { emit, show, startNew } = await import('/page/state.js'), { add } = await import('/page/tree.js');
        const conversation = startNew();
        let parent = null;
        for (let i = 0; i < 2000; i++) {
          const parts = [{ kind: 'text', text: `- **${i}**\\n\\nwords` }];
          const message = i % 2 ? { role: 'assistant', end: 'stop', tokens: [], parts }
            : { role: 'user', text: 'question ' + i };
          const id = 'm' + i;
          conversation.messages[id] = { id, parent, made: i, changed: i, ...message };
          parent = id;
        }
        show(conversation.id);
        const written = conversation.messages.m1999, took = [];
        for (let i = 0; i < 20; i++) {
          written.parts[0].text += ' more';
          const before = performance.now();
          emit('message', conversation, written);
          await new Promise((resolve) => setTimeout(() => requestAnimationFrame(() => setTimeout(resolve))));
          took.push(performance.now() - before);
        }
        return [took.sort((a, b) => a - b)[10], document.querySelectorAll('.message').length];
    }""")
    assert took[1] == 2000 and took[0] < 150, took  # two frames and the layout


# ---------------------------------------------------------------------------------------------------
# Writing

PRESS = """([init, keyCode]) => {
    const event = new KeyboardEvent('keydown', { key: 'Enter', bubbles: true, cancelable: true, ...init });
    if (keyCode) Object.defineProperty(event, 'keyCode', { value: keyCode });
    return !document.querySelector('#text').dispatchEvent(event);
}"""


def test_enter_sends_unless_it_ends_a_composition(page: Any, served: Served) -> None:
    page.fill("#text", "\u65e5\u672c")
    assert not page.evaluate(PRESS, [{"isComposing": True}, 0])
    assert not page.evaluate(PRESS, [{}, 229])  # Safari
    assert not page.evaluate(PRESS, [{"shiftKey": True}, 0])
    assert served.pool.requests == [] and page.input_value("#text") == "\u65e5\u672c"
    assert page.evaluate(PRESS, [{}, 13])
    answered(page)
    assert len(served.pool.requests) == 1


def test_on_touch_enter_makes_a_line(browser: Any, served: Served) -> None:
    served.pool.__init__()  # type: ignore[misc]
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_page(page, served)
    page.tap("#text")
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    assert page.input_value("#text") == "one\ntwo" and served.pool.requests == []
    page.tap("#send")
    answered(page)
    assert len(served.pool.requests) == 1
    context.close()


def test_a_text_of_100000_characters_is_smooth_and_counted(page: Any, served: Served) -> None:
    took = page.evaluate("""() => {
        const area = document.querySelector('#text'), took = [];
        area.value = 'some words and so on\\n'.repeat(5000);
        area.dispatchEvent(new Event('input', { bubbles: true }));
        area.focus();
        for (let i = 0; i < 15; i++) {
          const before = performance.now();
          document.execCommand('insertText', false, 'a');
          void document.body.offsetHeight;
          took.push(performance.now() - before);
        }
        return took.sort((a, b) => a - b)[7];
    }""")
    assert took < 50  # measured: 4 ms from the key to the end of layout
    until(page, "document.querySelector('#counter.over')")
    assert "105,015" in page.inner_text("#counter") and "4,096" in page.inner_text("#counter")
    page.fill("#text", "x" * 200_001)
    page.click("#send")
    until(page, "document.querySelector('#counter').textContent.includes('200,001')")
    assert served.pool.requests == [] and len(page.input_value("#text")) == 200_001


def test_the_counter_knows_the_conversation(page: Any, served: Served) -> None:
    ask(page, "a" * 3000)
    page.fill("#text", "b" * 500)
    until(page, "document.querySelector('#counter').textContent.includes('before')")
    assert page.locator("#counter.over").count() == 0
    page.fill("#text", "b" * 1500)
    until(page, "document.querySelector('#counter.over')?.textContent.includes('left out')")


# ---------------------------------------------------------------------------------------------------
# Probabilities


def test_tokens_of_half_characters_and_overrides(page: Any, served: Served) -> None:
    served.pool.script = lambda text: "a\u4f60\u202eb"
    ask(page, "hi")
    answer(page).get_by_role("button", name="How sure?").click()
    tokens = answer(page).locator(".tokens .token")
    assert tokens.all_text_contents()[:5] == ["a", "·", "·", "\u4f60", "·"]
    assert tokens.nth(1).get_attribute("aria-label").startswith("bytes E4")
    shown = answer(page).locator(".tokens").text_content()
    assert "\u202e" not in shown and "U+202E" in shown
    assert answer(page).get_by_role("button", name="How sure?").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Tab")
    tokens.nth(0).press("End")
    assert page.evaluate("document.activeElement.textContent") == "b"
    tokens.last.click()
    box = page.locator("#alternatives")
    assert box.locator(".alternative[aria-current]").inner_text().startswith("b")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "b"


def test_an_alternative_chosen_while_it_writes_stops_the_answer(page: Any, served: Served) -> None:
    page.click("#settings-open")
    page.check("#probabilities")
    page.get_by_role("button", name="Save").click()
    served.pool.pause, served.pool.script = 0.05, lambda text: "slowly written " * 20
    ask(page, "hi", wait=False)
    until(page, "document.querySelectorAll('.tokens .token').length > 5")
    answer(page).locator(".tokens .token").nth(2).click()
    served.pool.pause, served.pool.script = 0.0, lambda text: " end"
    page.locator("#alternatives .alternative:enabled").first.click()
    until(page, "document.querySelector('.message.assistant .version')?.textContent === '2/2'")
    answered(page)
    assert served.pool.requests[-1].prompt[-3:] == list(b"sla") and served.pool.requests[-1].answer_begun == 3
    until(page, "document.querySelector('.message.assistant .tokens').textContent === 'sla end'")
    assert answer(page).locator(".tokens .given").count() == 3
    page.get_by_role("button", name="Earlier version").click()
    assert answer(page).locator(".tokens").text_content().startswith("slowly")


# ---------------------------------------------------------------------------------------------------
# Modules by themselves


def test_tokens_js(page: Any) -> None:
    found = page.evaluate("""async () => {
        const t = await import('/page/tokens.js');
        const token = [1, 'a', 0.001, [[2, 'b', 0.9], [3, [228], 0.05]]], next = t.shownText();
        return { percents: [1, 0.999, 0.9, 0.123, 0.012, 0.00004, 0.000001, 0, null].map(t.percent),
          levels: [0, 0.05, 0.3, 0.5, 0.9, 1, null].map(t.level),
          all: t.alternatives(token).map((o) => [o.text, o.chosen]),
          kept: t.fromLogprob({ id: 7, token: '\\ufffd', bytes: [228], logprob: 0,
            top_logprobs: [{ token: 'x', logprob: -0.693147 }] }),
          forced: t.fromLogprob({ id: 7, token: 'x', logprob: 0, forced: true }),
          shown: [[0, [228, 189]], [0, [160, 97]], [0, 'b'], [0, [228]], [0, 'c']].map(next),
          names: [[0, ' \\n\\t\\u202e'], [0, [228, 10]]].map(t.tokenName),
          follow: ['a', '<|assistant_end|>', '<|python_start|>'].map((text) => t.canFollow({ id: 1, text })),
          are: [token, [1, 'a', 2, []], [1, 'a', null, []],
            ['1', 'a', 0, []], [1, { length: 1 }, 0, []], [1, ['<b>'], 0, []], 5, null].map(t.isToken) };
    }""")
    assert found["percents"] == ["100%", ">99%", "90%", "12%", "1.2%", "0.004%", "<0.001%", "0%", "–"]
    assert found["levels"] == ["0", "1", "2", "3", "4", "5", "forced"]
    assert found["all"] == [["b", False], [[228], False], ["a", True]]
    assert found["kept"] == [7, [228], 1, [[-1, "x", 0.5]]] and found["forced"] == [7, "x", None, []]
    assert found["shown"] == ["", "\u4f60a", "b", "", "\ufffdc"]
    assert found["names"] == ["␣⏎⇥U+202E", "bytes E4 0A"]
    assert found["follow"] == [True, False, True]
    assert found["are"] == [True, False, True, False, False, False, False, False]


def test_tree_js(page: Any) -> None:
    found = page.evaluate("""async () => {
        const t = await import('/page/tree.js'), c = t.newConversation();
        const texts = () => t.path(c).map((m) => t.textOf(m));
        const q = t.add(c, null, { role: 'user', text: ' a  title\\nhere ' });
        const first = t.add(c, q.id, { role: 'assistant', parts: [] });
        const pieces = [['text', 'x'], ['text', 'y'], ['python', '1+1'], ['text', 'z']];
        for (const [kind, text] of pieces) t.appendPiece(first, kind, text);
        const second = t.add(c, q.id, { role: 'assistant', parts: [{ kind: 'text', text: 'second' }] });
        const out = { title: c.title, parts: first.parts.length, newest: texts(),
          numbers: t.steps(c).map((s) => [s.number, s.count]) };
        t.chooseVersion(c, second, -1);
        out.earlier = texts();
        t.chooseVersion(c, first, -1);
        out.stays = texts();
        c.messages[q.id].parent = second.id;  // a circle
        out.circle = texts().length;
        return out;
    }""")
    assert found == {
        "title": "a title here", "parts": 3, "newest": [" a  title\nhere ", "second"], "numbers": [[1, 1], [2, 2]],
        "earlier": [" a  title\nhere ", "xyz"], "stays": [" a  title\nhere ", "xyz"], "circle": 0,
    }  # fmt: skip


def test_stream_js(page: Any) -> None:
    """Events are found however the bytes are cut, also within a character; a stream that stops early is an error."""
    body = 'data: {"a": "é你"}\n\n: comment\n\ndata: one\r\ndata: two\r\n\r\ndata:[DONE]\n\n'
    read = """async ([bytes, size]) => {
        const { serverEvents } = await import('/page/stream.js'), found = [];
        const stream = new ReadableStream({ start(c) {
          for (let i = 0; i < bytes.length; i += size) c.enqueue(Uint8Array.from(bytes.slice(i, i + size)));
          c.close();
        } });
        for await (const data of serverEvents(new Response(stream))) found.push(data);
        return found;
    }"""
    for size in (1, 2, 3, 7, 1000):
        assert page.evaluate(read, [list(body.encode()), size]) == ['{"a": "é你"}', "one\ntwo", "[DONE]"]


def test_transfer_js(page: Any) -> None:
    found = page.evaluate("""async () => {
        const t = await import('/page/transfer.js'), { path, textOf } = await import('/page/tree.js');
        const read = (value) => t.fromFile(JSON.stringify(value)).conversations.map((c) => path(c).map(textOf));
        const error = (value) => { try { t.fromFile(value); return ''; } catch (e) { return e.message; } };
        const list = [['system', 's'], ['user', 'q'], ['assistant', 'a']].map(([role, content]) => ({ role, content }));
        const theirs = { conversations: [{ from: 'human', value: 'q' }, { from: 'gpt', value: 'a' }] };
        return { fences: [t.fenced('a'), t.fenced('a ```` b', 'py')], openai: read(list),
          wrapped: read([{ messages: list }]), sharegpt: read([theirs]),
          errors: ['x', '{}', '[]', '5', 'null'].map((text) => error(text).length > 0) };
    }""")
    assert found["fences"] == ["```\na\n```", "`````py\na ```` b\n`````"] and found["errors"] == [True] * 5
    assert found["openai"] == found["wrapped"] == found["sharegpt"] == [["q", "a"]]
