"""The chat page in a real browser: what is asked, streamed, computed, stopped, edited and refused, and its looks."""

import pytest
from browser import keep_picture, wait_for
from scripted import ScriptedModel, endless, last_text, pieces, say_back

from onechip.server import serve_in_thread
from onechip.talker import TextPiece
from onechip.webguard import Door

pytestmark = pytest.mark.slow
EVIL = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"


def script(prompt):
    """Says the question back, endlessly if it asks for a long answer; HTML, or a failure, where it asks for those."""
    text = last_text(prompt)
    if "long" in text:
        return endless(prompt)
    if "HTML" in text:
        return [TextPiece(EVIL)]
    if "fail" in text:
        return [*pieces("So far so good. "), RuntimeError("a secret of the machine")]
    return say_back(prompt)


@pytest.fixture
def model():
    return ScriptedModel(script, pause=0.02)


@pytest.fixture
def served(model):
    """A server on loopback without a key."""
    served = serve_in_thread(model.talker(), Door(port=0))
    yield served
    served.stop()


class Page:
    """The page as a user without a mouse meets it."""

    def __init__(self, browser, address):
        from selenium.webdriver.common.keys import Keys

        self.driver, self.keys = browser, Keys
        browser.get(address)
        wait_for(lambda: "scripted" in browser.title or self.text("error"))

    def element(self, name):
        return self.driver.find_element("id", name)

    def text(self, name):
        return self.element(name).text

    def ask(self, text, wait=True):
        self.element("question").send_keys(text, self.keys.ENTER)
        if wait:
            self.wait_until_done()

    def wait_until_done(self):
        wait_for(lambda: self.element("send").is_enabled(), 20)

    def said(self):
        """(who, text) of each message, without its buttons."""
        read = """return Array.from(document.querySelectorAll('article')).map(a => [a.className.split(' ')[0],
            Array.from(a.querySelectorAll('.said, .tool, .note')).map(n => n.textContent).join('|')])"""
        return [tuple(pair) for pair in self.driver.execute_script(read)]

    def press(self, text):
        """The last button of that name, by the keyboard."""
        buttons = self.driver.find_elements("xpath", f"//button[text()='{text}']")
        buttons[-1].send_keys(self.keys.ENTER)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)


@pytest.fixture
def page(browser, served):
    return Page(browser, served.address)


def test_a_question_is_answered_as_it_is_written(page, model, tmp_path):
    """An answer grows while it is written; nothing else can be sent meanwhile; a reload keeps it."""
    keep_picture(page.driver, "chat_empty.png", tmp_path)
    model.pause = 0.1
    page.ask("one two three four five six seven eight", wait=False)
    wait_for(lambda: len(page.said()) == 2 and len(page.said()[1][1]) > 20)
    assert "eight" not in page.said()[1][1] and not page.element("send").is_enabled()
    keep_picture(page.driver, "chat_streaming.png", tmp_path)
    page.wait_until_done()
    answer = ("assistant", "You said: one two three four five six seven eight")
    assert page.said() == [("user", "one two three four five six seven eight"), answer]
    assert "seven eight" in page.element("status").get_attribute("textContent"), "read aloud when it is whole"
    keep_picture(page.driver, "chat_answer.png", tmp_path)
    page.driver.refresh()
    wait_for(lambda: "scripted" in page.driver.title)
    assert page.said()[1] == answer


def test_a_tool_call_is_shown_as_one(page, model, tmp_path):
    """Code and output have blocks of their own, and go back to the model as such with the next question."""
    page.ask("what is 12 * 34?")
    assert page.said()[1] == ("assistant", "Let me see. |Python12 * 34|Output408|It is 408.")
    keep_picture(page.driver, "chat_tool.png", tmp_path)
    page.ask("thanks")
    sent = model.asked[-1][0][1]
    assert sent["role"] == "assistant"
    assert sent["content"][1:3] == [{"type": "python", "text": "12 * 34"}, {"type": "python_output", "text": "408"}]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_an_answer(page, model, tmp_path, how):
    """What came is kept and marked; the model's place is free; the chat continues."""
    page.ask("a long story", wait=False)
    wait_for(lambda: "word3" in page.said()[-1][1])
    if how == "button":
        page.press("Stop")
    else:
        page.element("question").send_keys(page.keys.ESCAPE)
    page.wait_until_done()
    model.wait_until_idle()
    assert page.said()[1][1].endswith("|Stopped.")
    keep_picture(page.driver, f"chat_stopped_{how}.png", tmp_path)
    page.ask("and now?")
    assert page.said()[-1] == ("assistant", "You said: and now?")


def test_regenerate_and_edit_ask_again(page, model):
    """Regenerate replaces the last answer; an edited question drops what followed it; a new chat is empty."""
    page.ask("first")
    page.ask("second")
    page.press("Regenerate")
    page.wait_until_done()
    assert [m["content"] for m in model.asked[-1][0] if m["role"] == "user"] == ["first", "second"]
    assert len(page.said()) == 4
    page.driver.find_elements("xpath", "//button[text()='Edit']")[0].send_keys(page.keys.ENTER)
    editor = page.driver.switch_to.active_element
    assert editor.get_attribute("aria-label") == "Edit your message"
    editor.send_keys(" changed", page.keys.ENTER)
    page.wait_until_done()
    assert page.said() == [("user", "first changed"), ("assistant", "You said: first changed")]
    page.press("New chat")
    assert page.said() == [] and page.driver.switch_to.active_element == page.element("question")


def test_a_new_chat_takes_no_old_answer(page, model):
    """An answer that was being written when a new chat began is stopped, and is in no chat."""
    page.ask("a long story", wait=False)
    wait_for(lambda: "word3" in page.said()[-1][1])
    page.press("New chat")
    model.wait_until_idle()
    page.ask("hello")
    assert page.said() == [("user", "hello"), ("assistant", "You said: hello")]


def test_settings_reach_the_model(page, model):
    """System prompt, temperature, top-p and the most tokens are sent with each question."""
    page.element("settings").find_element("tag name", "summary").send_keys(page.keys.ENTER)
    page.element("system").send_keys("Be brief.")
    for name, value in {"temperature": "0.3", "top_p": "0.7", "max_tokens": "3"}.items():
        page.element(name).clear()
        page.element(name).send_keys(value)
    page.ask("one two three four")
    prompt, settings = model.asked[-1]
    assert prompt[0] == {"role": "system", "content": "Be brief."}
    assert (settings.temperature, settings.top_p, settings.max_tokens) == (0.3, 0.7, 3)
    assert page.said()[-1][1] == "You said: one |Cut off: the most tokens were reached."


def test_errors_are_said_and_can_be_retried(page, model, served, tmp_path):
    """A refusal, a failure in the middle and a server that is gone are each one line, with a way to try again."""
    page.ask("please fail")
    assert "The server failed" in page.text("error") and "secret" not in page.driver.page_source
    assert page.said()[-1][1].startswith("So far so good. |Incomplete:")
    page.press("New chat")
    page.element("question").send_keys("word " * 250, page.keys.ENTER)
    page.wait_until_done()
    assert "must leave room for an answer" in page.text("error")
    served.stop()
    page.press("New chat")
    page.ask("anybody?")
    assert "The server cannot be reached." in page.text("error") and "Try again" in page.text("error")
    keep_picture(page.driver, "chat_error.png", tmp_path)


def test_an_answer_is_never_html(page, tmp_path):
    """Markup in an answer is text: nothing of it is loaded or run, and the page could not run it either."""
    page.ask("some HTML")
    assert page.said()[-1] == ("assistant", EVIL)
    assert page.run("return document.querySelectorAll('main img, main script').length") == 0
    page.run("document.querySelector('main').innerHTML = arguments[0]", EVIL)  # as a faulty page might
    page.run("""const s = document.createElement('script'); s.textContent = "document.title = 'broken in'";
        document.body.append(s)""")
    assert "broken" not in page.driver.title, "the policy of its content forbids it"


def test_a_key_is_asked_for(browser, model, tmp_path):
    """With a key the page shows a field for it, and works once it is there."""
    key = "k" * 20
    served = serve_in_thread(model.talker(), Door(port=0, key=key))
    try:
        page = Page(browser, served.address)
        assert "API key" in page.text("error") and page.element("key") == page.driver.switch_to.active_element
        page.element("key").send_keys(key, page.keys.TAB)
        wait_for(lambda: "scripted" in browser.title)
        page.ask("hello")
        assert page.said()[-1] == ("assistant", "You said: hello")
        assert key not in page.run("return JSON.stringify([{...sessionStorage}, {...localStorage}])")
    finally:
        served.stop()


LUMINANCE = """
const rgb = color => color.match(/[0-9.]+/g).slice(0, 3).map(Number);
const light = color => rgb(color).map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function behind(node) {
    for (; node; node = node.parentElement) {
        const color = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$/.test(color)) return color;
    }
}
return Array.from(document.querySelectorAll('body *')).filter(n => n.offsetWidth > 1 && !n.disabled &&
    Array.from(n.childNodes).some(c => c.nodeType === 3 && c.textContent.trim())).map(n => {
        const [a, b] = [light(getComputedStyle(n).color), light(behind(n))].sort((x, y) => y - x);
        return [n.tagName + ' ' + n.textContent.slice(0, 30), (a + 0.05) / (b + 0.05)];
    });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone(page, tmp_path, scheme, request):
    """At 360 by 640 nothing is wider than the screen, and all text has a contrast of 4.5 to 1, in light and in dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    request.addfinalizer(lambda: page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {}))
    page.ask("what is 12 * 34?")
    page.ask("x" * 300)
    page.ask("fail")
    keep_picture(page.driver, f"chat_phone_{scheme}.png", tmp_path)
    contrasts = page.run(LUMINANCE)
    page.element("settings").find_element("tag name", "summary").click()
    wide = "return Math.max(document.documentElement.scrollWidth, document.querySelector('main').scrollWidth)"
    assert page.run(wide) <= 360
    keep_picture(page.driver, f"chat_phone_settings_{scheme}.png", tmp_path)
    assert len(contrasts) > 15 and [pair for pair in contrasts + page.run(LUMINANCE) if pair[1] < 4.5] == []


def test_a_screen_reader_finds_its_way(page, model):
    """All fields and buttons have names, answers are announced politely, and Tab passes through everything in order."""
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    kinds = ("button", "textbox", "spinbutton", "DisclosureTriangle", "main")
    named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if n.get("role", {}).get("value") in kinds]
    assert len(named) >= 5 and all(name for _, name in named), named
    assert ("textbox", "Message") in named and ("main", "Conversation") in named
    assert page.run("return document.documentElement.lang") == "en"
    live = page.element("status")
    assert (live.get_attribute("role"), live.get_attribute("aria-live")) == ("status", "polite")
    assert page.element("error").get_attribute("role") == "alert"
    page.ask("hello")
    page.run("document.activeElement.blur()")
    order = []
    for _ in range(12):
        page.driver.switch_to.active_element.send_keys(page.keys.TAB)
        order.append(page.run("return document.activeElement.id || document.activeElement.textContent.trim()"))
    start = order.index("new")
    assert order[start : start + 7] == ["new", "chat", "Edit", "Regenerate", "question", "send", "Settings"]
