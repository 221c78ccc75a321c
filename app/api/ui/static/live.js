// Parts of a page that move: <div id="x" data-live="5"> is read again every 5 s; with data-events="/v1/runs/…/events",
// after each server-sent event. Nothing is asked while nobody looks, nor while the reader writes or chooses in that part.
const parts = () => [...document.querySelectorAll("[data-live]")];
const timers = new Map();
let streams = [];

async function refresh(part) {
  if (document.hidden || !part.isConnected || part.contains(document.activeElement?.closest("input, textarea, select")) || part.querySelector("input[type=checkbox]:checked")) return;
  const response = await fetch(location.href, { credentials: "same-origin", headers: { Accept: "text/html" } }).catch(() => null);
  if (!response?.ok || response.redirected) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html").getElementById(part.id);
  if (!fresh || fresh.innerHTML === part.dataset.shown) return;
  const open = new Set([...part.querySelectorAll("details[open][id]")].map((one) => one.id));
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  for (const one of fresh.querySelectorAll("details[id]")) if (open.has(one.id)) one.open = true;
  part.dataset.shown = fresh.innerHTML;
  part.replaceChildren(...fresh.childNodes);
  if (focused) document.getElementById(focused)?.focus();
  document.dispatchEvent(new CustomEvent("shown"));
  if (fresh.dataset.ended !== undefined) stop();
}

// Many events at once are one refresh.
function soon(part) {
  if (timers.has(part)) return;
  timers.set(part, setTimeout(() => { timers.delete(part); refresh(part); }, 300));
}

function stop() {
  for (const one of streams) one.close ? one.close() : clearInterval(one);
  streams = [];
}

function begin() {
  stop();
  if (document.hidden) return;
  for (const part of parts()) {
    if (part.dataset.ended !== undefined) continue;
    streams.push(setInterval(() => refresh(part), Number(part.dataset.live) * 1000));
    if (!part.dataset.events) continue;
    const source = new EventSource(`${part.dataset.events}?after=${part.dataset.after ?? 0}`);
    for (const name of part.dataset.names.split(" ")) source.addEventListener(name, () => soon(part));
    streams.push(source);
  }
}

document.addEventListener("visibilitychange", () => { begin(); if (!document.hidden) parts().forEach(soon); });
addEventListener("pagehide", stop);
begin();
