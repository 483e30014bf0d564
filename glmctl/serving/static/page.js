// One conversation with the server that this page came from. Whatever a model or a server says becomes
// text, never HTML; the Content-Security-Policy would not run it either.

const $ = (id) => document.getElementById(id);
const messages = [];
let running = null; // AbortController of the answer under way
let model = null;
const FRAME = 16; // milliseconds of reading an answer after which the page gets its turn

function make(parent, tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

// MTP counters of the whole server: drafted and accepted so far
async function drafts() {
  const response = await fetch("metrics", { headers: headers() });
  if (!response.ok) return null;
  const text = await response.text();
  const read = (name) => Number(new RegExp(`^glmctl_${name}_total (\\S+)`, "m").exec(text)?.[1] ?? 0);
  return [read("drafts"), read("drafts_accepted")];
}

// Adds to what an element shows; setting all of it again would take longer with every token.
function extend(element, piece) {
  if (element.firstChild) element.firstChild.appendData(piece);
  else element.append(piece);
}

// Scrolls to the end with the next frame: asking for the height lays the page out, so not at every token.
let following = false;
function follow() {
  if (following) return;
  following = true;
  requestAnimationFrame(() => {
    following = false;
    $("talk").scrollTop = $("talk").scrollHeight;
  });
}

// the data of server-sent events, whatever the network's pieces are
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let since = performance.now();
  for (;;) {
    const { value, done } = await reader.read();
    // a server faster than the page would otherwise leave no moment to draw, or to press Stop
    if (performance.now() - since > FRAME) {
      await new Promise((resume) => setTimeout(resume));
      since = performance.now();
    }
    if (done) return;
    buffer += value;
    const whole = buffer.split("\n\n");
    buffer = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

class Turn {
  constructor() {
    this.element = make($("talk"), "div", "turn assistant");
    this.message = { role: "assistant", content: "" };
    this.calls = [];
  }

  add(delta) {
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    if (delta.content) {
      if (this.thought) this.thought.open = false;
      this.text ??= make(this.element, "div", "text");
      this.message.content += delta.content;
      extend(this.text, delta.content);
    }
    for (const part of delta.tool_calls ?? []) this.call(part);
    follow();
  }

  think(piece) {
    if (!this.thought) {
      this.thought = make(this.element, "details", "thought");
      this.thought.open = true;
      make(this.thought, "summary", "", "Thinking");
      this.thoughtText = make(this.thought, "div", "text");
    }
    this.message.reasoning_content = (this.message.reasoning_content ?? "") + piece;
    extend(this.thoughtText, piece);
  }

  call(part) {
    let call = this.calls[part.index];
    if (!call) {
      if (this.thought) this.thought.open = false;
      const box = make(this.element, "div", "call");
      make(box, "strong", "", part.function.name);
      call = { id: part.id, name: part.function.name, arguments: "", box, shown: make(box, "pre", "") };
      this.calls[part.index] = call;
    }
    const piece = part.function.arguments ?? "";
    call.arguments += piece;
    extend(call.shown, piece);
  }

  finish(reason) {
    if (reason === "length") make(this.element, "div", "note", "(cut off at the token limit)");
    // a call that was cut off is no call: its arguments are not JSON
    if (reason === "tool_calls") {
      this.message.tool_calls = this.calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name, arguments: call.arguments },
      }));
    }
    if (this.message.content || this.message.reasoning_content || this.message.tool_calls) messages.push(this.message);
    if (reason === "tool_calls") this.askForResults();
  }

  askForResults() {
    for (const call of this.calls) {
      call.result = make(call.box, "input", "result");
      call.result.placeholder = "what the function returned";
    }
    const button = make(this.element, "button", "answer", "Send results");
    button.type = "button";
    button.onclick = () => {
      button.remove();
      for (const call of this.calls) {
        call.result.disabled = true;
        messages.push({ role: "tool", tool_call_id: call.id, content: call.result.value });
      }
      answer();
    };
  }
}

function request() {
  const system = $("system").value.trim();
  const tools = $("tools").value.trim();
  const limit = Number($("limit").value);
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number($("temperature").value),
    chat_template_kwargs: { enable_thinking: $("thinking").checked },
    stream: true,
    stream_options: { include_usage: true },
    ...(tools ? { tools: JSON.parse(tools) } : {}),
    ...(limit ? { max_tokens: limit } : {}),
  };
}

async function answer() {
  const turn = new Turn();
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("speed").textContent = "";
  let reason = null;
  try {
    if (model === null) await findModel();
    const before = await drafts();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    if (!response.ok) throw await failure(response);
    let first = null;
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        if (Object.keys(choice.delta).some((key) => key !== "role" && choice.delta[key])) first ??= performance.now();
        turn.add(choice.delta);
        reason = choice.finish_reason ?? reason;
      }
      if (chunk.usage) await showSpeed(chunk.usage.completion_tokens, first, before);
    }
  } catch (error) {
    if (error.name === "AbortError") make(turn.element, "div", "note", "(stopped)");
    else make(turn.element, "div", "problem", error.message);
  } finally {
    turn.finish(reason);
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

async function showSpeed(tokens, first, before) {
  const seconds = (performance.now() - first) / 1000;
  let text = `${tokens} tokens`;
  if (tokens > 1 && seconds > 0) text += `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s`;
  const after = await drafts();
  if (before && after && after[0] > before[0]) {
    text += `, MTP accepted ${Math.round((100 * (after[1] - before[1])) / (after[0] - before[0]))}%`;
  }
  $("speed").textContent = text;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  let text = $("prompt").value.trim();
  if (!text || running) return;
  if (text.endsWith("/nothink")) {
    text = text.slice(0, -"/nothink".length).trim();
    $("thinking").checked = false;
    if (!text) return void ($("prompt").value = "");
  }
  $("prompt").value = "";
  messages.push({ role: "user", content: text });
  make(make($("talk"), "div", "turn user"), "div", "text", text);
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("talk").replaceChildren();
  $("speed").textContent = "";
});
findModel().catch((error) => ($("model").textContent = error.message));
