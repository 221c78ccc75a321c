// Forms and buttons that call the API: <form data-api="POST /v1/…" data-then="reload">.
//
// Fields become a JSON body, by their names and `data-type`; empty ones are left out. What is refused is shown in the
// form, in the API's words. Nothing happens without the answer of the API.
import { call, element } from "./dashboard_calls.js";

const READ = {
  integer: (value) => Number.parseInt(value, 10),
  number: (value) => Number(value),
  boolean: (value) => value === "true",
  json: (value) => JSON.parse(value),
  list: (value) => value.split(",").map((one) => one.trim()).filter(Boolean),
  pairs: (value) =>
    Object.fromEntries(
      value
        .split(/[\n,]/)
        .map((one) => one.trim())
        .filter(Boolean)
        .map((one) => [one.split("=")[0].trim(), one.split("=").slice(1).join("=").trim()]),
    ),
};

// The JSON body of a form. `data-into="inputs"` puts a field into that object.
export function bodyOf(form) {
  const body = {};
  for (const field of form.elements) {
    if (!field.name || (field.disabled && field !== form.pressed) || field.dataset.query !== undefined || field.dataset.path !== undefined) continue;
    if (field.type === "submit" && field !== form.pressed) continue;
    if ((field.type === "checkbox" || field.type === "radio") && !field.checked && field.dataset.type !== "flag") continue;
    const place = field.dataset.into ? (body[field.dataset.into] ??= {}) : body;
    if (field.dataset.type === "flag") {
      place[field.name] = field.checked;
      continue;
    }
    if (field.dataset.type === "many") {
      (place[field.name] ??= []).push(field.value);
      continue;
    }
    if (field.value === "" && field.dataset.keep === undefined) continue;
    try {
      place[field.name] = (READ[field.dataset.type] ?? ((value) => value))(field.value);
    } catch (error) {
      throw new Error(`${field.name}: ${error.message}`);
    }
  }
  return body;
}

function pathOf(form, path) {
  for (const field of form.querySelectorAll("[data-path]"))
    if (field.type !== "submit" || field === form.pressed) path = path.replace(`{${field.name}}`, encodeURIComponent(field.value));
  const query = new URLSearchParams();
  for (const field of form.querySelectorAll("[data-query]")) if (field.value !== "") query.append(field.name, field.value);
  return query.size ? `${path}${path.includes("?") ? "&" : "?"}${query}` : path;
}

export function complain(form, error) {
  let place = form.querySelector("[data-problems]");
  if (!place) {
    place = element("div", "problems");
    place.dataset.problems = "";
    form.append(place);
  }
  place.setAttribute("role", "alert");
  place.replaceChildren();
  const errors = error.problem?.errors ?? [];
  if (!errors.length) place.append(element("p", "problem", error.problem?.detail ?? error.message));
  for (const one of errors.slice(0, 20)) {
    const line = element("p", "problem");
    if (one.where) line.append(element("code", "", one.where), " ");
    line.append(one.message, one.accepted ? ` — accepted: ${one.accepted}` : "", one.line ? ` (line ${one.line})` : "");
    place.append(line);
  }
}

async function submit(form) {
  const [method, path] = form.dataset.api.split(" ");
  const button = form.querySelector("button:not([type='button'])");
  if (button) button.disabled = true;
  form.querySelector("[data-problems]")?.replaceChildren();
  try {
    const answer = await call(method, pathOf(form, path), method === "GET" || method === "DELETE" ? undefined : bodyOf(form));
    form.dispatchEvent(new CustomEvent("answered", { detail: answer, bubbles: true }));
    const then = form.dataset.then ?? "reload";
    if (then === "reload") location.reload();
    else if (then === "answer") showAnswer(form, answer);
    else if (then !== "stay") location.assign(then.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(answer[name])));
  } catch (error) {
    complain(form, error);
  } finally {
    if (button) button.disabled = false;
  }
}

// The answer in words: `data-answer="Found {count}"` fields, or the fields of the answer.
function showAnswer(form, answer) {
  const place = document.getElementById(form.dataset.answer);
  place.hidden = false;
  for (const one of place.querySelectorAll("[data-field]")) one.textContent = String(answer[one.dataset.field] ?? "");
  place.focus();
}

document.addEventListener("submit", (event) => {
  const form = event.target.closest("form[data-api]");
  if (!form) return;
  event.preventDefault();
  form.pressed = event.submitter;
  if (form.dataset.needs && !bodyOf(form)[form.dataset.needs]) return complain(form, new Error("Nothing is chosen."));
  if (form.dataset.confirm && !confirm(form.dataset.confirm)) return;
  submit(form);
});
// A document in YAML: <form data-api-text="PUT /v1/…"> with a field `text`. `{rule}` in the path is the value of the line
// `rule: …` of the document, or of the field with that name and `data-path`.
function namedIn(form, path) {
  const text = form.elements.text.value;
  return pathOf(form, path).replace(/\{(\w+)\}/g, (_, key) => {
    const found = new RegExp(`^${key}:[ \\t]*["']?([^"'#\\n]+)`, "m").exec(text);
    if (!found) throw new Error(`the document has no line "${key}: NAME"`);
    return encodeURIComponent(found[1].trim());
  });
}

document.addEventListener("submit", async (event) => {
  const form = event.target.closest("form[data-api-text]");
  if (!form) return;
  event.preventDefault();
  const [method, path] = form.dataset.apiText.split(" ");
  try {
    const answer = await call(method, namedIn(form, path), form.elements.text.value, { type: "application/yaml" });
    const then = form.dataset.then ?? "reload";
    if (then === "reload") location.reload();
    else location.assign(then.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(answer[name])));
  } catch (error) {
    complain(form, error);
  }
});

// Forgetting: what is meant is shown first, and deleted by a second step.
document.addEventListener("answered", (event) => {
  const form = event.target.closest("form[data-forget]");
  if (!form) return;
  const place = form.parentElement.querySelector("[data-matches]");
  const found = event.detail.matches ?? [];
  place.hidden = false;
  place.replaceChildren();
  if (!found.length) place.append(element("p", "", "Nothing has to do with it."));
  else {
    const list = element("ul", "");
    for (const one of found) list.append(element("li", "", one.text));
    const button = element("button", "button danger", `Forget ${found.length === 1 ? "it" : `these ${found.length}`}`);
    button.type = "button";
    button.addEventListener("click", async () => {
      try {
        await call("POST", form.dataset.api.split(" ")[1], { ids: found.map((one) => one.id) });
        location.reload();
      } catch (error) {
        complain(form, error);
      }
    });
    place.append(list, button);
  }
  place.focus();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  navigator.clipboard?.writeText(document.getElementById(button.dataset.copy).textContent);
  button.textContent = "Copied";
});

// A search leaves out what was not filled in.
document.addEventListener("submit", (event) => {
  if (event.target.method !== "get" || event.target.dataset.api) return;
  const empty = [...event.target.elements].filter((field) => field.name && field.value === "");
  for (const field of empty) field.disabled = true;
  addEventListener("pageshow", () => empty.forEach((field) => { field.disabled = false; }), { once: true });
});
