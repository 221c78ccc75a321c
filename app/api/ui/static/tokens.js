// The text of a step while it is written: <pre data-tokens="/v1/runs/…/steps/…/tokens">. The stream is followed while
// somebody looks; what has come is kept when the page is drawn again.
const texts = new Map();

function show(path) {
  for (const place of document.querySelectorAll("[data-tokens]"))
    if (place.dataset.tokens === path) place.textContent = texts.get(path).text;
}

function follow(path) {
  const kept = { text: "", source: new EventSource(path) };
  texts.set(path, kept);
  kept.source.addEventListener("begun", () => { kept.text = ""; show(path); });
  kept.source.addEventListener("text", (event) => { kept.text += JSON.parse(event.data); show(path); });
  kept.source.addEventListener("pieces", (event) => {
    for (const piece of JSON.parse(event.data)) if (!piece.index) kept.text += piece.text ?? "";
    show(path);
  });
  for (const name of ["done", "error"]) kept.source.addEventListener(name, () => { if (name === "done" || kept.source.readyState === 2) kept.source.close(); });
}

function begin() {
  if (document.hidden) return;
  for (const place of document.querySelectorAll("[data-tokens]")) {
    const path = place.dataset.tokens;
    if (texts.has(path)) show(path);
    else follow(path);
  }
}

function stop() {
  for (const kept of texts.values()) kept.source.close();
  texts.clear();
}

document.addEventListener("shown", begin);
document.addEventListener("visibilitychange", () => (document.hidden ? stop() : begin()));
addEventListener("pagehide", stop);
begin();
