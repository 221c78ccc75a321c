// Calls of the API from a page, in the name of who is logged in.
export class Refused extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? problem?.error?.message ?? `the API answered ${status}`);
    this.status = status;
    this.problem = problem;
  }
}

// What a change must bring beside the cookie: other sites cannot read it.
export const token = () => document.querySelector("meta[name='arriero-token']")?.content ?? "";

// Returns the parsed answer, or the response itself with `raw`. Raises Refused with the problem that the API names.
export async function call(method, path, body, { signal, raw = false, type = "application/json" } = {}) {
  const headers = { "X-Arriero-Dashboard": token() };
  if (method !== "GET") headers["Content-Type"] = type;
  const text = body === undefined ? (method === "GET" || method === "DELETE" ? undefined : "{}") : type === "application/json" ? JSON.stringify(body) : body;
  const response = await fetch(path, { method, headers, body: text, signal, credentials: "same-origin" });
  if (!response.ok) throw new Refused(response.status, await response.json().catch(() => null));
  if (raw) return response;
  return response.status === 204 ? null : response.json();
}

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}
