// The playground: chats with one model or two side by side, over the same endpoint as any client.
//
// A chat is the list of its messages; each try sends all of them. Nothing is kept when the page is left.
import { call, element } from "./dashboard_calls.js";

const form = document.getElementById("playground");
const columns = [...document.querySelectorAll("[data-chat]")].map((root) => new Chat(root));

function Chat(root) {
  this.root = root;
  this.log = root.querySelector("[data-log]");
  this.model = form.elements[root.dataset.chat];
  this.messages = [];
  this.stop = null;
}

Chat.prototype.clear = function () {
  this.stop?.abort();
  this.messages = [];
  this.log.replaceChildren();
};

// One turn: what is added to the messages, and the model's answer to it.
Chat.prototype.turn = async function (added) {
  this.messages.push(...added);
  for (const one of added) this.show(one.role, one.content);
  const answer = this.show("assistant", "");
  const note = answer.appendChild(element("p", "playground-note", "waiting …"));
  const text = answer.querySelector("[data-text]");
  const body = { model: this.model.value, messages: this.withSystem(), stream: true, ...options() };
  // With the results the model answers: it is not made to call again.
  if (added[0].role === "tool" && body.tool_choice === "required") body.tool_choice = "auto";
  this.stop = new AbortController();
  const began = performance.now();
  let first = null;
  let thought = null;
  const got = { content: "", calls: [], reason: null, usage: null };
  try {
    const response = await call("POST", "/v1/chat/completions", body, { signal: this.stop.signal, raw: true });
    const run = response.headers.get("X-Arriero-Run");
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices?.[0];
      if (chunk.usage) got.usage = chunk.usage;
      if (!choice) continue;
      if (choice.delta?.reasoning_content) {
        thought ??= thinkingBefore(text);
        thought.textContent += choice.delta.reasoning_content;
      }
      if (first === null && (choice.delta?.content || choice.delta?.tool_calls)) first = performance.now();
      if (choice.delta?.content) {
        got.content += choice.delta.content;
        text.textContent = got.content;
        this.log.scrollTop = this.log.scrollHeight;
      }
      for (const piece of choice.delta?.tool_calls ?? []) merge(got.calls, piece);
      if (choice.finish_reason) got.reason = choice.finish_reason;
    }
    this.messages.push(message(got));
    note.replaceChildren(...figures(got, began, first, run));
    if (got.calls.length) this.askForResults(answer, got.calls);
    if (body.response_format) markJson(answer, got.content);
  } catch (error) {
    const stopped = error.name === "AbortError";
    note.textContent = stopped ? "stopped" : error.message;
    note.classList.toggle("playground-failed", !stopped);
    note.setAttribute("role", "status");
    if (got.content) this.messages.push({ role: "assistant", content: got.content });
  } finally {
    this.stop = null;
  }
};

/** A box before the text of an answer, for what the model thinks. */
function thinkingBefore(text) {
  const box = element("details", "playground-note");
  box.append(element("summary", "", "thinking"));
  const inside = box.appendChild(element("div", "playground-text", ""));
  text.before(box);
  return inside;
}

Chat.prototype.withSystem = function () {
  const system = form.elements.system.value.trim();
  return system ? [{ role: "system", content: system }, ...this.messages] : this.messages;
};

Chat.prototype.show = function (role, content) {
  const made = element("article", `playground-message playground-${role}`);
  made.append(element("h3", "playground-role", { user: "You", assistant: this.model.value, tool: "Result" }[role] ?? role));
  const text = element("div", "playground-text", content ?? "");
  text.dataset.text = "";
  made.append(text);
  this.log.append(made);
  this.log.scrollTop = this.log.scrollHeight;
  return made;
};

// The person plays the tools: each call gets a field for its result, and the chat goes on with all of them.
Chat.prototype.askForResults = function (answer, calls) {
  const box = element("form", "playground-calls");
  for (const [place, one] of calls.entries()) {
    const label = element("label", "playground-call");
    label.append(element("code", "", `${one.function.name}(${one.function.arguments})`));
    const input = element("textarea", "");
    input.rows = 2;
    input.name = String(place);
    input.placeholder = "What the function returns";
    label.append(input);
    box.append(label);
  }
  const button = element("button", "button", "Give the results");
  box.append(button);
  box.addEventListener("submit", (event) => {
    event.preventDefault();
    button.disabled = true;
    this.turn(
      calls.map((one, place) => ({ role: "tool", tool_call_id: one.id, content: box.elements[String(place)].value })),
    ).finally(settle);
  });
  answer.append(box);
};

function message(got) {
  const made = { role: "assistant", content: got.content || null };
  if (got.calls.length) made.tool_calls = got.calls;
  return made;
}

function merge(calls, piece) {
  const one = (calls[piece.index] ??= { id: piece.id, type: "function", function: { name: "", arguments: "" } });
  one.id ??= piece.id;
  one.function.name += piece.function?.name ?? "";
  one.function.arguments += piece.function?.arguments ?? "";
}

function figures(got, began, first, run) {
  const parts = [];
  const end = performance.now();
  if (first !== null) parts.push(`first token ${seconds(first - began)}`);
  parts.push(`in all ${seconds(end - began)}`);
  if (got.usage) {
    parts.push(`${got.usage.prompt_tokens} tokens read, ${got.usage.completion_tokens} written`);
    if (first !== null && end > first && got.usage.completion_tokens > 1)
      parts.push(`${(((got.usage.completion_tokens - 1) * 1000) / (end - first)).toFixed(0)} per second`);
  }
  if (got.reason && got.reason !== "stop") parts.push({ length: "cut at the limit", tool_calls: "calls functions" }[got.reason] ?? got.reason);
  const made = [document.createTextNode(parts.join(" · "))];
  if (run) {
    const link = element("a", "", "its run");
    link.href = `/ui/runs/${encodeURIComponent(run)}`;
    made.push(document.createTextNode(" · "), link);
  }
  return made;
}

function markJson(answer, content) {
  try {
    answer.querySelector("[data-text]").textContent = JSON.stringify(JSON.parse(content), null, 2);
    answer.classList.add("playground-json");
  } catch {
    answer.append(element("p", "playground-note playground-failed", "This is not JSON: the answer was cut."));
  }
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

// The fields of the form as fields of the request. Raises Error with the name of the field that is wrong.
function options() {
  const given = {};
  const number = (name, key) => {
    if (form.elements[name].value !== "") given[key] = Number(form.elements[name].value);
  };
  number("temperature", "temperature");
  number("max_tokens", "max_tokens");
  given.stream_options = { include_usage: true };
  const schema = parsed("schema", "JSON schema");
  if (schema) given.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  const tools = parsed("tools", "Functions");
  if (tools) given.tool_choice = form.elements.tool_choice.value;
  if (tools) given.tools = tools.map((one) => (one.type === "function" ? one : { type: "function", function: one }));
  return given;
}

function parsed(name, label) {
  const value = form.elements[name].value.trim();
  if (!value) return null;
  try {
    return JSON.parse(value);
  } catch (error) {
    throw new Error(`${label}: ${error.message}`);
  }
}

// The events of a stream of server-sent events, parsed.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const shown = () => columns.filter((one) => one.model.value);
function settle() {
  const busy = columns.some((one) => one.stop);
  form.elements.send.disabled = busy;
  form.elements.stop.disabled = !busy;
  form.elements.text.focus();
}

function arrange() {
  for (const one of columns) {
    one.root.hidden = !one.model.value;
    one.root.querySelector("[data-name]").textContent = one.model.value;
  }
  form.closest(".playground").classList.toggle("playground-two", shown().length > 1);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = form.elements.text.value.trim();
  const problem = document.getElementById("playground-problem");
  problem.textContent = "";
  if (!text || columns.some((one) => one.stop)) return;
  try {
    options();
  } catch (error) {
    problem.textContent = error.message;
    return;
  }
  form.elements.text.value = "";
  for (const one of shown()) one.turn([{ role: "user", content: text }]).finally(settle);
  settle();
});
form.elements.stop.addEventListener("click", () => columns.forEach((one) => one.stop?.abort()));
form.elements.clear.addEventListener("click", () => columns.forEach((one) => one.clear()));
form.elements.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
for (const one of columns) one.model.addEventListener("change", arrange);
for (const button of document.querySelectorAll("[data-example]"))
  button.addEventListener("click", () => {
    const [name, value] = [button.dataset.example, button.dataset.value];
    form.elements[name].value = value;
    const details = form.elements[name].closest("details");
    if (details) details.open = true;
    form.elements.text.focus();
  });
arrange();
