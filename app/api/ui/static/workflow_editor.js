// The editor of a workflow: what the API's check says appears while one types, at its line.
import { call } from "./dashboard_calls.js";
import { complain } from "./api_forms.js";

const form = document.getElementById("editor");
const text = form.elements.definition;
const gutter = form.querySelector("[data-gutter]");
let waiting = null;
let asked = 0;

function lines() {
  const count = text.value.split("\n").length;
  const marked = new Set([...form.querySelectorAll("[data-problem-line]")].map((one) => Number(one.dataset.problemLine)));
  const made = document.createDocumentFragment();
  for (let line = 1; line <= count; line += 1) {
    const one = document.createElement("span");
    one.textContent = line;
    if (marked.has(line)) one.className = "editor-wrong";
    made.append(one);
  }
  gutter.replaceChildren(made);
  gutter.scrollTop = text.scrollTop;
}

async function check() {
  const mine = ++asked;
  const answer = await call("POST", form.dataset.check, text.value, { type: "application/yaml", raw: true }).catch(() => null);
  if (mine !== asked || !answer) return;
  form.querySelector("[data-found]").innerHTML = await answer.text();
  lines();
}

text.addEventListener("input", () => {
  lines();
  clearTimeout(waiting);
  waiting = setTimeout(check, 300);
});
text.addEventListener("scroll", () => {
  gutter.scrollTop = text.scrollTop;
});
text.addEventListener("keydown", (event) => {
  // Escape, then Tab, leaves the field: a keyboard is never trapped in it.
  if (event.key === "Escape") text.dataset.leaves = "yes";
  else if (event.key === "Tab" && !event.shiftKey && text.dataset.leaves !== "yes") {
    event.preventDefault();
    text.setRangeText("  ", text.selectionStart, text.selectionEnd, "end");
    text.dispatchEvent(new Event("input"));
  } else if (event.key !== "Tab") delete text.dataset.leaves;
});
form.addEventListener("click", (event) => {
  const line = Number(event.target.closest("[data-problem-line]")?.dataset.problemLine);
  if (!line) return;
  const start = text.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
  text.focus();
  text.setSelectionRange(start, text.value.indexOf("\n", start) < 0 ? text.value.length : text.value.indexOf("\n", start));
});
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = text.value.match(/^["']?workflow["']?\s*:\s*["']?([^"'\s#,]+)/m)?.[1];
  const at = form.dataset.namespace ? `?namespace=${encodeURIComponent(form.dataset.namespace)}` : "";
  if (!name) {
    complain(form, new Error("The definition has no name: it begins with `workflow: my-name`."));
    return;
  }
  form.elements.save.disabled = true;
  try {
    const stored = await call("PUT", `/v1/workflows/${encodeURIComponent(name)}${at}`, text.value, { type: "application/yaml" });
    location.assign(`/ui/workflows/${encodeURIComponent(stored.name)}${at}`);
  } catch (error) {
    complain(form, error);
  } finally {
    form.elements.save.disabled = false;
  }
});
lines();
check();
