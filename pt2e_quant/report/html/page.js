"use strict";

const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const plots = JSON.parse(byId("plots").textContent);

// --- tables ---------------------------------------------------------------------------------------------------------

const valueOf = (row, column, kind) => {
  const cell = row.cells[column];
  return kind === "number" ? Number(cell.dataset.value ?? cell.textContent) : cell.textContent;
};

function sortBy(button) {
  const header = button.closest("th");
  const body = header.closest("table").tBodies[0];
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const { cellIndex: column } = header;
  const { kind } = button.dataset;
  const rows = [...body.rows].map((row) => [valueOf(row, column, kind), row]);
  rows.sort(([a], [b]) => sign * (kind === "number" ? a - b : a.localeCompare(b, "en", { numeric: true })));
  body.append(...rows.map(([, row]) => row));
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("show").value;
  const rows = [...byId("layers").tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = (kind && !row.classList.contains(kind)) || !words.every((word) => text.includes(word));
  }
  byId("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} ops`;
}

// --- plots ----------------------------------------------------------------------------------------------------------

function layout(more) {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  return {
    paper_bgcolor: color("--back"), plot_bgcolor: color("--back"), font: { color: color("--front"), size: 12 },
    margin: { l: 60, r: 20, t: 20, b: 40 }, legend: { orientation: "h", y: 1.08 }, ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

const draw = (id, traces, more) =>
  byId(id) && Plotly.react(id, traces, layout(more), { displayModeBar: false, responsive: true });

const line = (x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: "#d1642b", width: 2 } });

function drawErrors({ nodes, own, inherited }) {
  const at = nodes.map((_, index) => index + 1);
  const trace = (name, y, color, symbol) =>
    ({ name, x: at, y, text: nodes, mode: "markers", marker: { color, symbol, size: 7 }, hovertemplate: "%{text}: %{y} dB" });
  const traces = [trace("own", own, "#d1642b", "circle"), trace("inherited", inherited, "#2f81c9", "diamond-open")];
  draw("plot-errors", traces, { xaxis: { title: { text: "tensor" } }, yaxis: { title: { text: "SQNR, dB" } } });
}

function drawRanges({ tensors, low, high, values, grids }) {
  const percent = (part) => Math.round(part * 1000) / 10;
  const text = tensors.map((_, i) => `values [${values[i].map((v) => v.toPrecision(4))}], grid [${grids[i].map((v) => v.toPrecision(4))}]`);
  const trace = {
    type: "bar", orientation: "h", y: tensors.map((_, i) => i), base: low.map(percent), x: high.map((h, i) => percent(h - low[i])),
    hovertext: text, hoverinfo: "text", marker: { color: "#2f81c9" },
  };
  draw("plot-ranges", [trace], {
    height: 80 + 18 * tensors.length, shapes: [line(0), line(100)], xaxis: { title: { text: "% of the grid" } },
    yaxis: { tickvals: tensors.map((_, i) => i), ticktext: tensors, autorange: "reversed" },
  });
}

function drawHistogram() {
  const select = byId("observer");
  if (select === null) return;
  const { low, high, counts, clip } = plots.histograms[select.value];
  const width = (high - low) / counts.length;
  const x = counts.map((_, i) => low + (i + 0.5) * width);
  const trace = { type: "bar", x, y: counts, width: width || 1, marker: { color: "#2f81c9" }, hovertemplate: "%{y} values near %{x:.4g}" };
  const axes = { xaxis: { title: { text: "value" } }, yaxis: { title: { text: "how many" }, type: "log" } };
  draw("plot-histogram", [trace], { ...axes, shapes: (clip ?? []).map(line), bargap: 0 });
}

function drawAll() {
  drawHistogram();
  drawErrors(plots.errors);
  drawRanges(plots.ranges);
}

async function unpack() {
  const packed = atob(byId("plotly").textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function start() {
  if (document.querySelector(".plot") === null) return;
  if (!("DecompressionStream" in window)) {
    for (const plot of document.querySelectorAll(".plot")) plot.textContent = "Plots need a browser of 2023 or later.";
    return;
  }
  await unpack();
  drawAll();
  root.dataset.plots = "drawn";
}

// --- start ----------------------------------------------------------------------------------------------------------

function setTheme(theme) {
  root.dataset.theme = theme;
  if (root.dataset.plots) drawAll();
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
byId("observer")?.addEventListener("change", drawHistogram);
byId("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => sortBy(button));
for (const event of ["input", "change", "reset"]) byId("filter").addEventListener(event, () => setTimeout(filter));
byId("filter").addEventListener("submit", (event) => event.preventDefault());
start();
