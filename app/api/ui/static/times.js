// Times in the reader's zone, in words; the exact one is in the title.
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto", style: "short" });
const STEPS = [["second", 60], ["minute", 60], ["hour", 24], ["day", 30], ["month", 12], ["year", Infinity]];

function inWords(at) {
  let value = (at - Date.now()) / 1000;
  for (const [unit, most] of STEPS) {
    if (Math.abs(value) < most) return relative.format(Math.round(value), unit);
    value /= most;
  }
  return at.toLocaleString();
}

function show() {
  for (const one of document.querySelectorAll("time[datetime]")) {
    const at = new Date(one.dateTime);
    one.textContent = inWords(at);
    one.title = at.toLocaleString(undefined, { dateStyle: "full", timeStyle: "long" });
  }
}
show();
setInterval(() => document.hidden || show(), 20_000);
document.addEventListener("shown", show);
