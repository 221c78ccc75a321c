// Charts of the trends page: drag over one to zoom all of them, double-click to see all again.
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = [];
let zoomed = false;
const style = getComputedStyle(document.documentElement);
const token = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
const COLOURS = ["#2f6fde", "#d9822b", "#1f9d6b", "#a64ac9", "#c9364f", "#5b7083", "#8a7a12", "#0f93a8"];

const UNITS = {
  ratio: (value) => `${(value * 100).toFixed(value < 0.1 ? 1 : 0)} %`,
  seconds: (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : value < 120 ? `${value.toFixed(1)} s` : `${(value / 60).toFixed(0)} min`),
  currency: (value) => value.toFixed(value < 1 ? 4 : 2),
};
const show = (unit, value) =>
  value === null || value === undefined
    ? "–"
    : (UNITS[unit] ?? ((one) => (one >= 1000 ? `${(one / 1000).toFixed(1)} k` : one.toFixed(one < 10 && one % 1 ? 2 : 0))))(value);

function draw(figure) {
  const stored = figure.querySelector("script[type='application/json']");
  if (!stored) return;
  const data = JSON.parse(stored.textContent);
  const place = figure.querySelector("[data-plot]");
  if (!data.times.length) return;
  const ink = token("--text-soft", dark.matches ? "#9fb0c0" : "#5a6872");
  const grid = token("--line", dark.matches ? "#2a3540" : "#e3e8ec");
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: "12px system-ui" };
  const now = Date.now() / 1000;
  const single = data.times.length < 40;
  const chart = new uPlot(
    {
      width: place.clientWidth,
      height: 200,
      cursor: { drag: { x: true, y: false, setScale: false }, sync: { key: "trends" }, points: { size: 6 } },
      legend: { live: true },
      scales: { x: { range: (self, least, greatest) => (zoomed ? [least, greatest] : [now - data.seconds, now]) }, y: { range: (self, least, greatest) => [Math.min(0, least ?? 0), (greatest || 1) * 1.1] } },
      axes: [{ ...axis }, { ...axis, size: 64, values: (self, found) => found.map((one) => show(data.unit, one)) }],
      series: [
        { value: (self, at) => (at === null ? "–" : new Date(at * 1000).toLocaleString()) },
        ...data.series.map((one, place) => ({
          label: one.label,
          stroke: COLOURS[place % COLOURS.length],
          width: 2,
          fill: data.series.length === 1 ? `${COLOURS[0]}22` : undefined,
          points: { show: single, size: 5 },
          value: (self, value) => show(data.unit, value),
          spanGaps: false,
        })),
      ],
      hooks: { setSelect: [(self) => zoom(self)] },
    },
    [data.times, ...data.series.map((one) => one.values)],
    place,
  );
  place.addEventListener("dblclick", () => zoomTo(null, null));
  charts.push({ chart, place, first: now - data.seconds, last: now });
}

function zoom(self) {
  if (self.select.width < 8) return;
  const [from, to] = [self.posToVal(self.select.left, "x"), self.posToVal(self.select.left + self.select.width, "x")];
  self.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  zoomTo(from, to);
}

function zoomTo(from, to) {
  zoomed = from !== null;
  for (const one of charts) one.chart.setScale("x", { min: from ?? one.first, max: to ?? one.last });
  const note = document.getElementById("zoomed");
  if (!note) return;
  note.hidden = from === null;
  if (from !== null)
    note.querySelector("[data-span]").textContent =
      `${new Date(from * 1000).toLocaleString()} – ${new Date(to * 1000).toLocaleString()}`;
}

for (const figure of document.querySelectorAll("figure[data-chart]")) draw(figure);
document.querySelector("#zoomed button")?.addEventListener("click", () => zoomTo(null, null));
addEventListener("resize", () => charts.forEach((one) => one.chart.setSize({ width: one.place.clientWidth, height: 200 })));
