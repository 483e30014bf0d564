"""The chat page in a real browser: headless Chromium, driven over its debugging protocol.

Where there is none, the tests are skipped and say so; under CI they fail. The engine behind the server is a script, so
that a model can be made to say anything.

With GLMCTL_SCREENSHOT set to a path and GLMCTL_SCREENSHOT_MODEL to the demo's model, the picture for the docs is taken.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import USER, Tokenizer
from glmctl.engine.engine import Engine, EngineStats
from glmctl.engine.request import Completion, Event, Request
from glmctl.recipe.schema import ServeRecipe
from glmctl.rl.tasks.tool_use import TOOLS
from glmctl.serving.run import load_service
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

pytestmark = pytest.mark.slow

CALL = "<tool_call>get_stock\n<arg_key>item</arg_key>\n<arg_value>{}</arg_value>\n</tool_call><|observation|>"
XSS = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg onload=window.pwned=1><a href='javascript:window.pwned=1'>x</a>",
    "</div></main><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<details open ontoggle=window.pwned=1><summary>x</summary></details>",
    "[x](javascript:window.pwned=1) ![x](http://127.0.0.1:9/leak)",
    "<style>@import 'http://127.0.0.1:9/leak'</style><link rel=stylesheet href=//127.0.0.1:9/leak>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><base href=//127.0.0.1:9/>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src onerror=pwned=1&gt;'>",
    "\u202e<b id=talk>&lt;script&gt;pwned=1&lt;/script&gt;",
    "${pwned=1}{{constructor.constructor('pwned=1')()}}",
    "<form action=javascript:pwned=1><button autofocus onfocus=pwned=1>x</button></form>",
]


class ScriptedEngine:
    """Takes the place of an `Engine`: says what the script has for the last thing that the prompt says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.max_slots, self.max_length, self.version = 2, 4096, 0
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=512))
        self.stats = EngineStats()
        self.kv_blocks = (0, 1)
        self.waiting = 0
        self.aborted: list[str] = []
        self.prompts: list[str] = []
        self.replies: dict[str, str] = {}
        self.aborts = threading.Event()
        self._tokenizer = tokenizer
        self._inside: dict[str, tuple[Request, Iterator[int]]] = {}

    @property
    def active(self) -> int:
        return len(self._inside)

    @property
    def has_work(self) -> bool:
        return bool(self._inside)

    def add(self, request: Request) -> None:
        prompt = self._tokenizer.decode(request.prompt)
        self.prompts.append(prompt)
        self._inside[request.id] = request, self._reply(prompt)

    def abort(self, request_id: str) -> None:
        if self._inside.pop(request_id, None) is not None:
            self.aborts.set()

    def step(self) -> list[Event]:
        self.stats.steps += 1
        events = []
        for name, (request, reply) in list(self._inside.items()):
            token = next(reply)
            self.stats.tokens += 1
            self.stats.drafted += 2
            self.stats.accepted += 1
            done = None
            if token in self._tokenizer.eos_ids:
                del self._inside[name]
                done = Completion(name, request.prompt, [], [], "stop", [], matched_stop=token)
            events.append(Event(name, token, None, "stop" if done else None, 0, None, done))
        return events

    def _reply(self, prompt: str) -> Iterator[int]:
        asked = prompt.rsplit("<|user|>\n", 1)[-1].split("<|assistant|>")[0].removesuffix("/nothink")
        if "<|observation|>" in prompt.rsplit("<|user|>", 1)[-1]:
            asked = "after the tool"
        direct = prompt.endswith("<think></think>")
        thought = "" if direct else "<think>thinking about it</think>"
        tokens = self._tokenizer.encode(thought)
        if asked == "for ever":
            yield from tokens
            while True:
                # as fast as this process can: no page may be starved by a server
                yield from self._tokenizer.encode_plain(" on")
        if asked in self.replies:
            yield from [*tokens, *self._tokenizer.encode_plain("\n" + self.replies[asked])]
        else:
            script = {
                "hello": "\nStraight." if direct else "\nHello there.",
                "stock": "\n" + CALL.format("bolt"),
                "after the tool": "\nThere are 12 bolts.",
            }
            yield from [*tokens, *self._tokenizer.encode(script[asked])]
        yield self._tokenizer.id(USER)


class Browser:
    """One page, by the DevTools protocol."""

    def __init__(self, address: str) -> None:
        self._runner = asyncio.Runner()
        self._count = 0
        self.events: list[dict[str, Any]] = []
        self._runner.run(self._connect(address))
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._runner.run(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == self._count:
                assert "error" not in message, message
                return cast(dict[str, Any], message["result"])
            self.events.append(message)

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for a condition on the page, half a minute at most."""
        held = self.js(
            "new Promise(done => { const look = setInterval(() => { if (" + condition + ") end(true) }, 20);"
            "const late = setTimeout(() => end(false), 30000);"
            "const end = (held) => { clearInterval(look); clearTimeout(late); done(held) } })"
        )
        assert held, f"{condition}: {self.js('document.body.innerText')}"

    def open(self, url: str, name: str) -> None:
        self.call("Page.navigate", url=url)
        shown = f"document.getElementById('model')?.textContent === {json.dumps(name)}"
        self.until(f"document.readyState === 'complete' && {shown}")

    def type(self, text: str) -> None:
        """Into the prompt, then Enter."""
        self.js("document.getElementById('prompt').focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def wait_for_answers(self, count: int) -> None:
        answers = f"document.querySelectorAll('.turn.assistant').length === {count}"
        self.until(f"{answers} && document.getElementById('stop').disabled")

    def text(self, selector: str) -> str | None:
        return cast(str | None, self.js(f"document.querySelector({json.dumps(selector)})?.textContent"))

    def close(self) -> None:
        self._runner.run(self._socket.close())
        self._runner.run(self._session.close())
        self._runner.close()


@pytest.fixture(scope="module")
def engine(tiny_tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tiny_tokenizer)


@pytest.fixture(scope="module")
def server(engine: ScriptedEngine, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    worker = EngineWorker(cast(Engine, engine), 4)
    server = Server(Service("tiny", tiny_tokenizer, ChatTemplate(tiny_tokenizer), worker), "127.0.0.1", 0)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The debugging address of a browser of our own."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        absent = "the page is not tested: there is no Chromium here (apt-get install chromium)"
        assert "CI" not in os.environ, absent
        pytest.skip(absent)
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--no-proxy-server"]
    process = subprocess.Popen(
        [program, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "DevTools listening on ws://" in line:
                yield line.split("ws://")[1].split("/")[0]
                break
        else:
            raise AssertionError("Chromium ended before it listened")
    finally:
        process.kill()
        process.wait()


@contextmanager
def opened(chromium: str, url: str, name: str) -> Iterator[Browser]:
    """The page at `url` in a tab of its own, once it shows the model's name."""
    request = urllib.request.Request(f"http://{chromium}/json/new?about:blank", method="PUT")
    with urllib.request.urlopen(request) as response:
        target = json.load(response)
    browser = Browser(target["webSocketDebuggerUrl"])
    try:
        browser.open(url, name)
        yield browser
    finally:
        browser.close()


@pytest.fixture
def page(chromium: str, server: Server) -> Iterator[Browser]:
    with opened(chromium, f"{server.url}/", "tiny") as browser:
        yield browser


def test_type_stream_and_fold(page: Browser) -> None:
    page.type("hello")
    page.wait_for_answers(1)
    assert page.text(".turn.user .text") == "hello"
    assert page.text(".turn.assistant > .text") == "Hello there."
    assert page.text(".thought .text") == "thinking about it"
    assert page.js("document.querySelector('.thought').open") is False
    page.until("/tokens.*MTP accepted 50%/.test(document.getElementById('speed').textContent)")


def test_nothink_toggle(page: Browser, engine: ScriptedEngine) -> None:
    page.js("document.getElementById('thinking').click()")
    page.type("hello")
    page.wait_for_answers(1)
    assert page.text(".turn.assistant > .text") == "Straight."
    assert page.text(".thought") is None
    assert engine.prompts[-1].endswith("/nothink<|assistant|>\n<think></think>")
    page.js("document.getElementById('thinking').click()")
    page.type("hello /nothink")
    page.wait_for_answers(2)
    assert page.js("document.getElementById('thinking').checked") is False


def test_stop_ends_the_generation_on_the_server(page: Browser, engine: ScriptedEngine) -> None:
    engine.aborts.clear()
    page.type("for ever")
    page.until("document.querySelector('.turn.assistant > .text')?.textContent.length > 20")
    page.js("document.getElementById('stop').click()")
    page.wait_for_answers(1)
    assert page.text(".note") == "(stopped)"
    assert engine.aborts.wait(30)
    # the conversation goes on
    page.type("hello")
    page.wait_for_answers(2)


def test_tool_call_and_its_result(page: Browser, engine: ScriptedEngine) -> None:
    tools = [{"type": "function", "function": {"name": "get_stock", "parameters": {"type": "object"}}}]
    page.js(f"document.getElementById('tools').value = {json.dumps(json.dumps(tools))}")
    page.type("stock")
    page.wait_for_answers(1)
    assert page.text(".call strong") == "get_stock"
    assert json.loads(page.text(".call pre") or "") == {"item": "bolt"}
    page.js("document.querySelector('.call input').value = '12'; document.querySelector('button.answer').click()")
    page.wait_for_answers(2)
    assert "<tool_response>\n12\n</tool_response>" in engine.prompts[-1]
    assert page.js("document.querySelectorAll('.turn.assistant')[1].querySelector(':scope > .text').textContent") == (
        "There are 12 bolts."
    )


@pytest.mark.parametrize("payload", XSS)
def test_what_a_model_says_is_never_html(page: Browser, engine: ScriptedEngine, server: Server, payload: str) -> None:
    """As its answer, as its thought, as a tool's argument, and as the user's own words."""
    engine.replies["attack"] = payload
    engine.replies["attack by tool"] = CALL.format(payload).removesuffix("<|observation|>")
    engine.replies[payload] = "fine"
    page.type("attack")
    page.wait_for_answers(1)
    page.type("attack by tool")
    page.wait_for_answers(2)
    page.type(payload)
    page.wait_for_answers(3)
    assert page.text(".turn.assistant > .text") == payload
    assert page.js("typeof window.pwned") == "undefined"
    allowed = "'DIV', 'DETAILS', 'SUMMARY', 'STRONG', 'PRE', 'INPUT', 'BUTTON'"
    strange = page.js(
        f"[...document.querySelectorAll('#talk *')].map(e => e.tagName).filter(t => ![{allowed}].includes(t))"
    )
    assert strange == []
    requests = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(server.url) or url == "about:blank" for url in requests), requests
    assert not [e for e in page.events if e["method"] == "Page.javascriptDialogOpening"]


def test_the_page_breaks_none_of_its_own_rules(page: Browser) -> None:
    page.type("hello")
    page.wait_for_answers(1)
    entries = [e["params"]["entry"]["text"] for e in page.events if e["method"] == "Log.entryAdded"]
    assert not [entry for entry in entries if "Content Security Policy" in entry or "Trusted" in entry]


if "GLMCTL_SCREENSHOT" in os.environ:

    def test_picture_for_the_docs(chromium: str) -> None:
        """The demo's own model: it thinks, calls a tool, and answers with what that returned."""
        model = os.environ["GLMCTL_SCREENSHOT_MODEL"]
        server = Server(load_service(ServeRecipe(name="x", model=model, served_name="glm-demo")), "127.0.0.1", 0)
        server.start()
        with opened(chromium, f"{server.url}/", "glm-demo") as page:
            page.call("Emulation.setDeviceMetricsOverride", width=880, height=620, deviceScaleFactor=2, mobile=False)
            page.js("document.getElementById('temperature').value = 0")
            page.js(f"document.getElementById('tools').value = {json.dumps(json.dumps(TOOLS))}")
            page.type("Stock of item 1 shop 4 day 2?")
            page.wait_for_answers(1)
            page.js("document.querySelector('.call input').value = '7'")
            page.js("document.querySelector('button.answer').click()")
            page.wait_for_answers(2)
            page.js("for (const fold of document.querySelectorAll('.thought')) fold.open = true")
            picture = page.call("Page.captureScreenshot", format="png")["data"]
        server.stop()
        Path(os.environ["GLMCTL_SCREENSHOT"]).write_bytes(base64.b64decode(picture))
