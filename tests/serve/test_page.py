"""The chat page in a real browser: Debian's chromium, headless, driven over playwright."""

import contextlib
import json
import re
import shutil
import time
from functools import cache

import pytest

from lib import serve
from lib.data.speech import spoken
from lib.runs import load_model
from lib.serve.server import Server
from tests.helpers import parrot

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt install chromium"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SUM, COUNT, MARKDOWN, ATTACK = (
    "What is 37 plus 85?",
    "Count to 120.",
    "Show me some Markdown.",
    "Attack the page.",
)


@cache
def model():
    return load_model(parrot.run())


@contextlib.contextmanager
def serving(**settings):
    server = Server(
        model(), serve.ServeSettings(run=str(parrot.run()), port=0, max_tokens=700, **settings)
    ).start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        engine = server.app.state.worker.engine
        step = engine.step
        engine.step = lambda: (time.sleep(0.02), step(4))[
            1
        ]  # slowly and in smaller bits, so that there is something to see and to stop
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser, server):
    """A browser of its own: nothing stored, greedy by settings.

    Any error in the console fails the test.
    """
    context = browser.new_context(viewport={"width": 1100, "height": 800}, base_url=server.url)
    context.set_default_timeout(60_000)
    context.add_init_script(
        "if (location.protocol == 'http:' && !localStorage.getItem('rawchat:settings'))"
        " localStorage.setItem('rawchat:settings', '{\"temperature\": 0}')"
    )
    context.errors = []
    context.on("weberror", lambda e: context.errors.append(str(e.error)))
    context.on("console", lambda m: m.type == "error" and context.errors.append(m.text))
    yield context
    context.close()
    assert context.errors == []


@pytest.fixture
def page(context):
    page = context.new_page()
    page.goto("/")
    page.get_by_text("context of 768 tokens").wait_for()
    return page


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def finished(page):
    page.get_by_role("button", name="Send", exact=True).wait_for()


def answers(page):
    return page.locator(".message.assistant .body").all_inner_texts()


def questions(page):
    return page.locator(".message.user .body").all_inner_texts()


def until(page, check, timeout=60):
    """Wait until a JavaScript expression holds (playwright's own wait needs eval, which the page's
    policy forbids).
    """
    ends = time.monotonic() + timeout
    while not page.evaluate(check):
        assert time.monotonic() < ends, f"{check}: not after {timeout} s"
        page.wait_for_timeout(10)


def test_empty_then_typed_answered_and_kept_over_a_reload(page):
    assert page.get_by_role("heading", name="What shall we talk about?").is_visible()
    page.get_by_role("button", name=SUM).click()
    finished(page)
    page.get_by_label("Message", exact=True).press_sequentially("hel")
    page.keyboard.press("Shift+Enter")
    assert page.get_by_label("Message", exact=True).input_value() == "hel\n"
    send(page, "hello")
    finished(page)
    shown = [questions(page), answers(page)]
    assert shown[0] == [SUM, "hello"] and "37 plus 85 is 122." in shown[1][0]
    assert page.title() == f"{SUM} – rawchat"
    page.reload()
    assert [questions(page), answers(page)] == shown and not page.get_by_role(
        "heading", name="What shall we talk about?"
    ).is_visible()


def test_tool_calls_are_folded(page):
    send(page, SUM)
    finished(page)
    details = page.locator("details.tool")
    assert (
        details.count() == 1
        and details.locator("summary").inner_text() == "Calculator: 37+85 = 122"
    )
    assert not details.locator("dl").is_visible()
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    assert details.locator("dd").all_inner_texts() == ["37+85", "122"]
    assert page.locator(".message.assistant strong").inner_text() == "122"


def test_an_answer_streams_and_stops(page, server):
    send(page, COUNT)
    until(
        page,
        "document.querySelectorAll('.message.assistant .body')[0]?.innerText.includes('10 11')",
    )
    assert page.get_by_role("button", name="Stop").is_visible() and "120" not in answers(page)[0]
    page.get_by_role("button", name="Stop").click()
    finished(page)
    text = answers(page)[0]
    assert parrot.COUNT.startswith(text.strip()) and 20 < len(text) < len(parrot.COUNT)
    assert "stopped" in page.locator(".message.assistant .about").inner_text()
    for _ in range(100):
        if not server.app.state.worker.busy:
            break
        page.wait_for_timeout(50)
    assert not server.app.state.worker.busy, "the server writes on for nobody"
    page.get_by_role("button", name="Regenerate").click()
    until(
        page, "document.querySelectorAll('.message.assistant .body')[0]?.innerText.includes('3 4')"
    )
    page.keyboard.press("Escape")
    finished(page)
    assert len(answers(page)) == 1 and answers(page)[0] != text


def test_a_reload_in_the_middle_keeps_what_was_there(page):
    send(page, COUNT)
    until(
        page,
        "document.querySelectorAll('.message.assistant .body')[0]?.innerText.includes('20 21')",
    )
    page.reload()
    text = answers(page)[0]
    assert parrot.COUNT.startswith(text.strip()) and "20 21" in text and questions(page) == [COUNT]
    assert page.get_by_role("button", name="Send", exact=True).is_visible()


def test_editing_a_message_goes_on_from_there(page):
    for text in ("hello", COUNT):
        send(page, text)
        until(
            page,
            "document.querySelector('.message.assistant:last-child .body')?.innerText.length > 5",
        )
        page.keyboard.press("Escape")
        finished(page)
    first = page.locator(".message.user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    box = page.get_by_label("Edit message")
    assert box.input_value() == "hello"
    page.keyboard.press("Escape")
    assert questions(page) == ["hello", COUNT], "escape leaves it as it was"
    first.hover()
    first.get_by_role("button", name="Edit").click()
    box.fill(SUM)
    page.keyboard.press("Enter")
    finished(page)
    assert questions(page) == [SUM] and len(answers(page)) == 1 and "122" in answers(page)[0]


@pytest.mark.parametrize("leave", ["+ New conversation", "hello", "Delete “Count to 120.”"])
def test_who_leaves_while_an_answer_is_written_can_send(page, leave):
    """To a new conversation, to another of the list, or by deleting this one."""
    send(page, "hello")
    finished(page)
    page.get_by_role("button", name="+ New conversation").click()
    page.on("dialog", lambda dialog: dialog.accept())
    send(page, COUNT)
    until(page, "document.querySelector('.message.assistant .body')?.innerText.length > 5")
    page.get_by_role("button", name=leave, exact=True).click()
    finished(page)
    assert page.evaluate("running") is None
    assert not page.get_by_role("button", name="Stop", exact=True).is_visible()


def test_what_is_typed_into_a_message_survives_the_end_of_an_answer(page):
    send(page, COUNT)
    until(page, "document.querySelector('.message.assistant .body')?.innerText.length > 5")
    first = page.locator(".message.user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    box = page.get_by_label("Edit message")
    box.fill("hello")
    page.evaluate("stop()")
    until(page, "running === null")
    page.get_by_role("button", name="Token probabilities").click()
    assert box.input_value() == "hello"
    # and it can be sent or left, as ever
    box.press("Escape")
    assert questions(page) == [COUNT]
    first.hover()
    first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").press("Enter")
    until(page, "document.querySelector('.editing') === null")
    page.evaluate("stop()")
    finished(page)
    assert questions(page) == [COUNT]


def test_markdown_becomes_elements(page):
    send(page, MARKDOWN)
    finished(page)
    body = page.locator(".message.assistant .body")
    for selector, text in [
        ("h1", "A heading"),
        ("strong", "bold"),
        ("em", "italic"),
        ("p code", "code"),
        ("ul > li > ul > li", "inside two"),
        ("ol > li:nth-child(2)", "second"),
        ("blockquote", "quoted"),
        ("td:nth-child(2)", "3.14"),
        (".block pre .k >> nth=0", "def"),
        (".block pre .c", "# a sum"),
    ]:
        assert body.locator(selector).inner_text().strip() == text, selector
    assert body.locator("a").get_attribute(
        "href"
    ) == "https://example.com/a?b=c" and "noopener" in body.locator("a").get_attribute("rel")
    assert (
        body.locator(".block pre").inner_text().rstrip()
        == "def add(a, b):  # a sum\n    return a + b"
    )


RENDER = """([texts, elements]) => texts.map(text => {
  const box = document.createElement('div');
  document.body.append(box);
  showMarkdown(box, text);
  const bad = [...box.querySelectorAll('*')].filter(e =>
    !elements.includes(e.tagName.toLowerCase()) || [...e.attributes].some(a =>
      a.name.startsWith('on') || a.name === 'style'
      || (a.name === 'href' && !/^(https?:|mailto:)/.test(a.value))));
  box.remove();
  return { text: box.textContent, bad: bad.map(e => e.outerHTML) };
})"""
ELEMENTS = (
    "p strong em code pre a span h1 h2 h3 h4 ul ol li blockquote table thead tbody tr th td "
    "div button hr"
).split()
PAYLOADS = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "![x](http://evil.test/a.png)",
    "[x](vbscript:x)",
    "[x]( javascript:window.hacked=1)",
    "[x](&#106;avascript:window.hacked=1)",
    '```"><img src=x onerror=window.hacked=1>\ncode\n```',
    "<svg/onload=window.hacked=1>",
    "`<b>`",
    "| <img src=x onerror=window.hacked=1> | b |\n|---|---|\n| <script>window.hacked=1</script> | "
    "[a](javascript:1) |",
    "# <iframe srcdoc='<script>parent.hacked=1</script>'>",
    "- <a href='javascript:window.hacked=1'>x</a>",
    "> <style>*{display:none}</style>",
    'https://evil.test/"onmouseover="window.hacked=1',
    "**<b onclick=window.hacked=1>x</b>**",
    "<https://a.test/><script>",
    "\x00\u202e<script>",
]


def test_nothing_that_is_written_becomes_code(page, context):
    requests = []
    context.on("request", lambda r: requests.append(r.url))
    send(page, ATTACK)
    finished(page)
    # the user's own words, in the bubble, the list and the title
    send(page, "<img src=x onerror=window.hacked=1>")
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    finished(page)
    page.reload()
    assert "<script>window.hacked=1</script>" in answers(page)[0]
    rendered = page.evaluate(RENDER, [PAYLOADS, ELEMENTS])
    assert [r["bad"] for r in rendered] == [[]] * len(PAYLOADS)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None and not [
        u for u in requests if "evil" in u or u.endswith("/x")
    ]
    assert page.locator("img, iframe, svg svg, #log script").count() == 0


def test_odd_markdown_is_rendered_quickly_and_whole(page):
    texts = [
        "*" * 3000,
        "[" * 3000,
        "`" * 3001,
        "> " * 2000 + "x",
        "a_b_c snake_case_name",
        "  - " * 500 + "x",
        "|" * 3000 + "\n" + "|-" * 1500,
        "((((" * 1000,
        "**a" * 1500,
        "http://" * 800,
        "_a*b" * 1500,
        "1. a\n\n\n2. b\n   c\n- d",
        "```python\nnever closed",
        "#" * 50,
        "\\*not\\*",
        "a  \nb",
        "\n\n\n",
        "",
    ]
    page.evaluate(RENDER, [texts[:1], ELEMENTS])
    milliseconds = page.evaluate(
        "texts => texts.map(t => { const box = document.createElement('div'), began = "
        "performance.now();"
        " showMarkdown(box, t); return performance.now() - began; })",
        texts,
    )
    assert max(milliseconds) < 2000, milliseconds
    rendered = page.evaluate(RENDER, [texts, ELEMENTS])
    assert (
        "snake_case_name" in rendered[4]["text"]
        and "never closed" in rendered[12]["text"]
        and rendered[14]["text"] == "*not*"
    )
    assert all(r["bad"] == [] for r in rendered)


DOUBT = "spans => spans.map(span => span.style.getPropertyValue('--doubt'))"
DAMAGED = ["", "{", "null", "7", '"text"', "[]", "[null]", '{"a": {"b": null}}']
CHATS = [
    '{"id": "0", "messages": [null, 1, {"role": "user"}, {"role": "user", "content": 3}]}',
    '{"id": "0", "messages": [{"role": "assistant", "content": [{"type": "text"}]}]}',
    '{"id": "0", "time": {}, "saves": "x", "messages": [{"role": "user", "content": "kept"},'
    ' {"role": "assistant", "content": "b", "tokens": {"0": [[1]]}, "usage": 4, "note": {}}]}',
    '{"id": 5, "messages": []}',
    '{"messages": {"length": 3}}',
]


def test_damaged_storage_never_leaves_the_page_dead(page):
    def store(settings, view, token, chat):
        page.evaluate(
            "([settings, view, token, chat]) => { localStorage.clear();"
            " for (const [key, value] of Object.entries({'rawchat:settings': settings,"
            " 'rawchat:view': view, 'rawchat:token': token, 'rawchat:chat:0': chat}))"
            " localStorage.setItem(key, value); sessionStorage.setItem('rawchat:here', '0'); }",
            [settings, view, token, chat],
        )
        page.reload()
        page.get_by_text("context of 768 tokens").wait_for()

    values = [*DAMAGED, '{"temperature": "hot", "top_k": [], "seed": 1e400, "doubts": "x"}']
    for value in values:
        store(value, value, value, value)
        assert page.get_by_role("heading", name="What shall we talk about?").is_visible()
        page.get_by_role("button", name="Settings").click()
        # where nothing is stored, this browser stores 0
        temperature = "0.6" if value else "0"
        assert page.get_by_label("Temperature").input_value() == temperature
        page.get_by_role("button", name="Done").click()
    for chat in CHATS:
        store("{}", '{"doubts": true}', '""', chat)
    assert questions(page) == []
    store('{"temperature": 0}', "{}", '""', CHATS[2])
    assert [questions(page), answers(page)] == [["kept"], ["b"]], "what is sound is kept"
    page.get_by_role("button", name="+ New conversation").click()
    send(page, "hello")
    finished(page)
    assert answers(page)[-1] == "Hello! How can I help?"


def test_a_browser_that_keeps_nothing_can_chat(browser, server):
    with contextlib.closing(browser.new_context(base_url=server.url)) as context:
        for store in ("localStorage", "sessionStorage"):
            context.add_init_script(
                f"Object.defineProperty(window, '{store}', {{ get() {{ throw new DOMException("
                "'no', 'SecurityError'); } })"
            )
        page = context.new_page()
        page.goto("/")
        page.get_by_text("context of 768 tokens").wait_for()
        page.evaluate("settings.temperature = 0")
        send(page, "hello")
        finished(page)
        assert answers(page) == ["Hello! How can I help?"]


def test_long_runs_of_backticks_are_drawn_fast(page):
    texts = [
        "`" * 30_000,
        "a " + "`" * 30_000,
        " ".join("`" * n for n in range(1, 250)),
        "``` " * 8000 + "`",
        "x`" * 8000,
    ]
    milliseconds = page.evaluate(
        "texts => texts.map(t => { const box = document.createElement('div'), began = "
        "performance.now(); showMarkdown(box, t); return performance.now() - began; })",
        texts,
    )
    assert max(milliseconds) < 500, milliseconds
    code = ["`a`", "``a`b``", "`a``b`", "a ` b", "`` `", "``a` b", "`a\nb` `c`"]
    shown = page.evaluate(
        "texts => texts.map(t => { const box = document.createElement('div'); showMarkdown(box, t);"
        " return [...box.querySelectorAll('code')].map(e => e.textContent); })",
        code,
    )
    assert shown == [["a"], ["a`b"], ["a``b"], [], [], [], ["a\nb", "c"]]


def test_what_is_copied_is_not_glued(page, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    call = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}]
    text = lambda t: {"type": "text", "text": t}
    cases = [
        [text("s t r a w"), *call, text("The letter")],
        [text("is"), *call, text("3145 or"), *call, text("= 7"), *call, text(" so")],
        [*call, text("a"), text("b")],
        [text("東京"), *call, text("は")],
    ]
    assert page.evaluate("cases => cases.map(plain)", cases) == [spoken(case) for case in cases]
    page.evaluate(
        "content => { chat.messages = [{ role: 'user', content: 'x' },"
        " { role: 'assistant', content }]; show(); }",
        cases[0],
    )
    page.locator(".message.assistant").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "s t r a w\nThe letter"


def test_hidden_buttons_leave_no_hole(page):
    """Between a message and its answer there is the gap between messages, and no row of nothing."""
    for text in ("hello", "hello"):
        send(page, text)
        finished(page)
    question = page.locator(".message.user .body").first.bounding_box()
    answer = page.locator(".message.assistant .body").first.bounding_box()
    assert answer["y"] - question["y"] - question["height"] < 20
    # the buttons are there all the same, and inside of the page
    page.locator(".message.user").first.hover()
    edit = page.get_by_role("button", name="Edit").first.bounding_box()
    assert edit["x"] > 0 and edit["x"] + edit["width"] <= question["x"]


def test_a_base_model_is_greeted_as_one(browser):
    base = model()._replace(stage="base")
    settings = serve.ServeSettings(run=str(parrot.run()), port=0)
    server = Server(base, settings).start()
    try:
        with contextlib.closing(browser.new_context(base_url=server.url)) as context:
            page = context.new_page()
            page.goto("/")
            page.get_by_role("heading", name="How shall a text begin?").wait_for()
            assert page.get_by_text("has not learnt to chat").is_visible()
            assert page.get_by_placeholder("Begin a text").is_visible()
            page.get_by_role("button", name="Once upon a time").click()
            finished(page)
            assert page.get_by_role("alert").count() == 0
    finally:
        server.close()


def test_probabilities_on_hover(page):
    page.get_by_role("button", name="Token probabilities").click()
    send(page, SUM)
    finished(page)
    assert (
        "".join(page.locator(".body > .tokens span").all_inner_texts())
        == "Let me see. 37 plus 85 is **122**."
    )
    token = page.locator(".body > .tokens span").nth(1)
    assert page.get_by_text("How likely each token was").is_visible()
    # what it called is coloured too, though not what the calculator answered
    called = page.locator("details.tool summary .tokens span")
    assert "".join(called.all_inner_texts()) == "37+85"
    assert all(0 <= float(d) <= 1 for d in called.evaluate_all(DOUBT))
    assert page.locator("details.tool summary").inner_text() == "Calculator: 37+85 = 122"
    assert not page.locator("#tip").is_visible()
    token.hover()
    rows = page.locator("#tip tr").all_inner_texts()
    shares = [float(re.search(r"([\d.]+) %", r)[1]) for r in rows]
    assert len(rows) == 5 and shares == sorted(shares, reverse=True) and shares[0] > 50
    assert page.locator("#tip tr.taken td").first.inner_text() == token.inner_text()
    page.get_by_role("button", name="Token probabilities").click()
    assert (
        page.locator(".tokens").count() == 0
        and page.locator(".message.assistant strong").inner_text() == "122"
    )


def test_probabilities_of_other_scripts_by_keyboard(page):
    """Pieces of a character are shown as the character, and Tab leads to the first token."""
    page.get_by_role("button", name="Token probabilities").click()
    send(page, "Say it in other scripts.")
    finished(page)
    shown = page.locator(".body > .tokens span")
    assert "".join(shown.all_inner_texts()) == "Grüße aus 東京, naïve 🙂 café."
    assert page.locator(".body > .tokens span[tabindex='0']").count() == 1
    shown.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip tr.taken td").first.inner_text() == shown.nth(2).inner_text()


def test_settings_reach_the_server_and_survive_a_reload(page, context):
    bodies = []
    context.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data)))
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("9")
    page.get_by_label("Longest answer").fill("12")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    page.reload()
    send(page, COUNT)
    finished(page)
    sent = bodies[-1]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"], sent["messages"][0]) == (
        2,
        12,
        7,
        {"role": "system", "content": "Be brief."},
    )
    assert "as long as it may be" in page.locator(".message.assistant .about").inner_text()
    first = answers(page)[0]
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    assert answers(page)[0] == first, "the same seed gives the same answer"
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to defaults").click()
    assert (
        page.get_by_label("Temperature").input_value() == "0.6"
        and page.get_by_label("Seed").input_value() == ""
    )


def test_several_conversations(page):
    send(page, "hello")
    finished(page)
    page.get_by_role("button", name="+ New conversation").click()
    assert questions(page) == []
    send(page, SUM)
    finished(page)
    names = page.locator("#list .open")
    assert names.all_inner_texts() == [SUM, "hello"]
    names.nth(1).click()
    assert questions(page) == ["hello"] and answers(page) == ["Hello! How can I help?"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name=f"Delete “{SUM}”").click()
    assert names.all_inner_texts() == ["hello"]
    page.reload()
    assert names.all_inner_texts() == ["hello"] and questions(page) == ["hello"]


def test_two_tabs_at_once(page, context):
    send(page, COUNT)
    until(
        page, "document.querySelectorAll('.message.assistant .body')[0]?.innerText.includes('4 5')"
    )
    other = context.new_page()
    other.goto("/")
    until(
        other, "document.querySelectorAll('.message.user').length == 1"
    )  # the conversation of the first tab, as far as it is stored
    other.get_by_role("button", name="+ New conversation").click()
    send(other, SUM)
    finished(other)
    finished(page)
    assert "122" in answers(other)[0] and answers(page) == [parrot.COUNT]
    for tab in (page, other):
        until(tab, "document.querySelectorAll('#list li').length == 2")
    other.get_by_role("button", name=COUNT, exact=True).click()
    assert answers(other) == [parrot.COUNT]
    send(other, "hello")  # what one tab adds, the other one shows
    finished(other)
    until(page, "document.querySelectorAll('.message.user').length == 2")
    assert questions(page) == [COUNT, "hello"]


def test_two_tabs_in_one_conversation_lose_nothing(page, context):
    send(page, "hello")
    finished(page)
    other = context.new_page()
    other.goto("/")
    until(other, "document.querySelectorAll('.message.assistant').length == 1")
    send(page, COUNT)
    send(other, SUM)
    finished(page)
    finished(other)
    stored = page.evaluate("chats().map(c => c.messages.map(m => plain(m.content)))")
    for tab, question in ((page, COUNT), (other, SUM)):
        shown = answers(tab)[-1]
        assert questions(tab)[0] == "hello" and questions(tab)[-1] == question and len(shown) > 10
        assert any(chat[-2] == question and len(chat[-1]) > 10 for chat in stored), (
            "both tabs' conversations are kept whole"
        )


def test_a_narrow_screen(browser, server):
    with contextlib.closing(
        browser.new_context(
            viewport={"width": 360, "height": 640},
            base_url=server.url,
            has_touch=True,
            is_mobile=True,
        )
    ) as context:
        page = context.new_page()
        page.goto("/")
        page.get_by_text("It sees the last").wait_for()
        page.evaluate("settings.temperature = 0")
        assert not page.locator("#side").is_visible()
        send(page, MARKDOWN)
        finished(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, (
            "nothing is wider than the screen"
        )
        box = page.get_by_label("Message", exact=True).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
        assert page.locator("#text").evaluate("e => getComputedStyle(e).fontSize") == "16px", (
            "smaller, and phones zoom in"
        )
        page.get_by_role("button", name="Conversations").tap()
        page.locator("#side").wait_for(state="visible")
        page.get_by_role("button", name="+ New conversation").tap()
        page.locator("#side").wait_for(state="hidden")
        assert questions(page) == []


def test_dark_and_light(browser, server):
    with contextlib.closing(
        browser.new_context(color_scheme="dark", base_url=server.url)
    ) as context:
        page = context.new_page()
        page.goto("/")
        shade = lambda: sum(
            map(
                int,
                re.findall(
                    r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")
                )[:3],
            )
        )
        assert shade() < 200
        page.get_by_role("button", name="Theme: as the system").click()
        assert shade() > 600
        page.reload()
        assert shade() > 600, "the choice is kept"
        page.get_by_role("button", name="Theme: light").click()
        assert shade() < 200


def test_an_error_is_shown_and_can_be_tried_again(page, context, server):
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, json={"error": {"message": "too many people"}}),
        times=1,
    )
    send(page, SUM)
    finished(page)
    assert page.get_by_role("alert").inner_text() == "It didn't work: too many people"
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert "122" in answers(page)[0] and page.get_by_role("alert").count() == 0
    page.evaluate("model.id = 'the-one-before'")  # the server was started anew with another model
    for wanted in ("the model 'the-one-before' does not exist here", ""):
        page.get_by_role("button", name="Try again" if not wanted else "Regenerate").click()
        finished(page)
        assert (
            (wanted in page.get_by_role("alert").inner_text())
            if wanted
            else page.get_by_role("alert").count() == 0
        )
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    send(page, "hello")
    finished(page)
    assert "can't be reached" in page.get_by_role("alert").inner_text()
    context.errors.clear()  # the browser reports both in the console


def test_the_token_is_asked_for_once(browser):
    with (
        serving(token="s3cret") as server,
        contextlib.closing(browser.new_context(base_url=server.url)) as context,
    ):
        page = context.new_page()
        page.goto("/")
        page.get_by_label("Token", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That token is wrong.").wait_for()
        # who leaves is told how to come back, and not asked again at once
        page.keyboard.press("Escape")
        page.get_by_text("asks for its token: reload").wait_for()
        assert not page.get_by_role("dialog").is_visible()
        page.reload()
        page.get_by_label("Token", exact=True).fill("s3cret")
        page.keyboard.press("Enter")
        page.get_by_text("context of 768 tokens").wait_for()
        page.reload()
        page.get_by_text("context of 768 tokens").wait_for()
    with (
        serving(token="s3cret") as server,
        contextlib.closing(browser.new_context(base_url=server.url)) as context,
    ):
        page = context.new_page()
        page.goto("/#token=s3cret")
        page.get_by_text("context of 768 tokens").wait_for()
        assert page.url.rstrip("/") == server.url, "the token does not stay in the address"


def test_everything_has_a_name_and_the_keyboard_reaches_it(page):
    send(page, SUM)
    finished(page)
    nameless = page.evaluate("""() => {
      const named = e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length;
      return [...document.querySelectorAll('button, input, textarea')]
        .filter(e => !named(e) && e.type !== 'hidden' && !e.hidden).map(e => e.outerHTML);
    }""")
    assert nameless == []
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "document.activeElement.getAttribute('aria-label') || "
                "document.activeElement.innerText.trim()"
            )
        )
    assert {
        "+ New conversation",
        "Settings",
        "Token probabilities",
        "Edit",
        "Regenerate",
        "Calculator: 37+85 = 122",
    } <= seen
    assert page.get_by_role("status").inner_text() == "The answer is complete"
