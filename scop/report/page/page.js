"use strict";
// Fills the page from the data that scop/report/page/__init__.py embeds. Plots are drawn by Plotly.
const data = JSON.parse(document.getElementById("data").textContent);
const metrics = new Map(data.metrics.map((metric) => [metric.key, metric]));
// Okabe and Ito's palette, safe for colour-blind readers; without its yellow, which is too light on white.
const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a"];
const SYMBOLS = ["circle", "square", "triangle-up", "cross", "x", "star", "pentagon"];
const ROWS_AT_ONCE = 200, MARKS_IN_SVG = 1500, CURVES_AT_ONCE = 6, RUNS_IN_HOVER = 4;
const methods = [...new Set(data.rows.map((row) => row.params.method ?? "?"))];
const colour = (method) => PALETTE[methods.indexOf(method) % PALETTE.length];
const element = (id) => document.getElementById(id);
// Plotly interprets text as markup.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

const state = { sort: data.sort, up: !metrics.get(data.sort)?.higher, words: "", limit: ROWS_AT_ONCE, chosen: null };

// -- numbers ----------------------------------------------------------------------------------------------------------

function prefixed(value, unit = "") {
  for (const [factor, prefix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (value >= 0.9995 * factor) return `${Number((value / factor).toPrecision(3))} ${prefix}${unit}`;
  return `${Number(value.toPrecision(3))} ${unit}`.trim();
}

function shown(metric, value) {
  if (value === undefined || value === null) return "–";
  switch (metric.kind) {
    case "share": return `${(100 * value).toFixed(2)}%`;
    case "difference": return `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(2)}`;
    case "count": return prefixed(value);
    case "bytes": return prefixed(value, "B");
    case "milliseconds": return `${value.toFixed(2)} ms`;
    case "seconds": return `${Math.round(value).toLocaleString("en")} s`;
    case "ratio": return `${value.toFixed(2)}x`;
  }
  return String(Number(value.toPrecision(4)));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const deviation = (values) => values.length < 2 ? 0
  : Math.sqrt(values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1));

// The run of a row and the command that repeats it.
const source = (row) => [row.run && `run ${row.run}`, row.rerun].filter(Boolean);

// -- row selection ----------------------------------------------------------------------------------------------------

const distinct = (key) => [...new Set(data.rows.map((row) => row[key]))];
const several = { dataset: distinct("dataset").length > 1, device: distinct("device").length > 1,
  scores: new Set(data.rows.map((row) => row.details?.scores && JSON.stringify(row.details.scores)).filter(Boolean)).size > 1 };

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

// One column or plot never mixes accuracies on different data sets, or latencies of different devices.
function inScope() {
  return data.rows.filter((row) => (!several.dataset || row.dataset === element("dataset").value)
    && (!several.device || row.device === element("device").value));
}

function matching() {
  const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
  return inScope().filter((row) => words.every((word) => row.text.includes(word)));
}

// Ties are sorted by the next columns, best first, as in the terminal.
function tie(a, b) {
  for (const key of data.columns) {
    const difference = (a.metrics[key] ?? 0) - (b.metrics[key] ?? 0);
    if (difference) return metrics.get(key).higher ? -difference : difference;
  }
  return 0;
}

function sorted(rows) {
  const value = (row) => state.sort in row.metrics ? row.metrics[state.sort]
    : state.sort === "name" ? row.name : row.params[state.sort];
  const known = rows.filter((row) => value(row) !== undefined), unknown = rows.filter((row) => value(row) === undefined);
  known.sort((a, b) => (state.up ? 1 : -1) * ((value(a) > value(b)) - (value(a) < value(b))) || tie(a, b));
  return [...known, ...unknown];
}

// -- table ------------------------------------------------------------------------------------------------------------

function header() {
  const columns = ["name", ...data.labels, ...data.columns];
  element("results").querySelector("thead tr").replaceChildren(...columns.map((key) => {
    const cell = document.createElement("th"), button = document.createElement("button");
    cell.scope = "col";
    cell.dataset.key = key;
    button.type = "button";
    button.textContent = metrics.get(key)?.title ?? key.replaceAll("_", " ");
    button.addEventListener("click", () => {
      state.up = state.sort === key ? !state.up : !metrics.get(key)?.higher;
      state.sort = key;
      table();
    });
    cell.append(button);
    return cell;
  }), ...["run", "rerun command"].map((text) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    if (text !== "run") cell.className = "rerun";
    return cell;
  }));
}

function cell(text, name = "", tag = "td") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

function best(rows, key) {
  const values = rows.map((row) => row.metrics[key]).filter((value) => value !== undefined);
  if (values.length < 2 || metrics.get(key).higher === null) return undefined;
  return metrics.get(key).higher ? Math.max(...values) : Math.min(...values);
}

function tableRow(row, bests) {
  const line = document.createElement("tr"), name = cell("", "", "th"), button = document.createElement("button");
  line.id = `row-${row.index}`;
  line.classList.toggle("chosen", state.chosen === row.index);
  name.scope = "row";
  button.type = "button";
  button.textContent = row.name;
  button.setAttribute("aria-pressed", String(state.chosen === row.index));
  button.addEventListener("click", () => choose(state.chosen === row.index ? null : row.index));
  name.append(button);
  line.append(name, ...data.labels.map((label) => cell(String(row.params[label] ?? "–"), "text")));
  for (const key of data.columns) {
    const winner = bests.get(key), wins = winner !== undefined && row.metrics[key] === winner;
    const made = cell(shown(metrics.get(key), row.metrics[key]), wins ? "best" : "");
    const before = row.metrics[key.replace("pruned_", "dense_")];
    if (key.startsWith("pruned_") && before !== undefined && row.metrics[key] !== undefined) {
      const small = document.createElement("small"), metric = metrics.get(key);
      small.textContent = `of ${shown(metric, before)}`;
      made.append(small);
    }
    line.append(made);
  }
  const run = document.createElement("td"), rerun = document.createElement("td");
  for (const [target, text] of [[run, row.run ?? "–"], [rerun, row.rerun ?? "–"]]) {
    const code = document.createElement("code");
    code.textContent = text;
    target.className = target === run ? "text" : "text rerun";
    target.append(code);
  }
  line.append(run, rerun);
  return line;
}

function table() {
  const all = sorted(matching()), rows = all.slice(0, state.limit);
  const bests = new Map(data.columns.map((key) => [key, best(all, key)]));
  const focused = document.activeElement.closest("tbody tr")?.id;
  element("results").querySelector("tbody").replaceChildren(...rows.map((row) => tableRow(row, bests)));
  if (focused) element(focused)?.querySelector("button").focus({ preventScroll: true });
  for (const head of element("results").querySelectorAll("thead th[data-key]"))
    if (head.dataset.key === state.sort) head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  const elsewhere = data.rows.length - inScope().length;
  element("count").textContent = `${all.length} of ${inScope().length}`
    + (elsewhere ? `, and ${elsewhere} on other data or devices` : "");
  element("more").hidden = all.length <= rows.length;
  element("more").textContent = `Show ${Math.min(ROWS_AT_ONCE, all.length - rows.length)} more of ${all.length}`;
}

function choose(index, scroll = false) {
  state.chosen = index;
  const position = sorted(matching()).findIndex((row) => row.index === index);
  if (position >= state.limit) state.limit = position + 1;
  table();
  details();
  const line = element(`row-${index}`);
  if (scroll && line) {
    line.scrollIntoView({ block: "center", behavior: "smooth" });
    line.querySelector("button").focus({ preventScroll: true });
  }
}

// -- plots ------------------------------------------------------------------------------------------------------------

// A colour of the current style sheet: light, dark or print.
const of = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(id, traces, layout, says) {
  const narrow = element(id).clientWidth < 560;
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line"), automargin: true };
  const whole = {
    template: {}, font: { family: "system-ui, sans-serif", size: narrow ? 10 : 12, color: of("--text") },
    margin: { l: narrow ? 48 : 64, r: narrow ? 6 : 16, t: 12, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { bgcolor: of("--band"), font: { color: of("--text") }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: of("--soft"), activecolor: of("--text") },
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  };
  if (layout.height) element(id).style.height = `${layout.height}px`;
  element(id).setAttribute("aria-label", says);
  return Plotly.react(id, traces, whole, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
}

function axisOf(metric) {
  const format = { share: ".1%", difference: "+.1%" }[metric.kind];
  const unit = { bytes: ", bytes", milliseconds: ", ms", seconds: ", s" }[metric.kind] ?? "";
  return { title: { text: metric.title + unit }, ...(format ? { tickformat: format } : {}) };
}

// Rows that differ only in their seeds form one point.
function groups(rows) {
  if (!element("group").checked) return rows.map((row) => [row]);
  const found = new Map();
  for (const row of rows) {
    found.set(row.identity, [...(found.get(row.identity) ?? []), row]);
  }
  return [...found.values()];
}

function pareto() {
  const x = metrics.get(element("x-axis").value), y = metrics.get(element("y-axis").value);
  const rows = matching().filter((row) => x.key in row.metrics && y.key in row.metrics);
  const points = groups(rows).map((own) => {
    const of = (key) => own.map((row) => row.metrics[key]);
    return { own, method: own[0].params.method ?? "?", x: mean(of(x.key)), y: mean(of(y.key)),
      dx: deviation(of(x.key)), dy: deviation(of(y.key)) };
  });
  const kind = points.length > MARKS_IN_SVG ? "scattergl" : "scatter";
  const bars = (values) => ({ type: "data", array: values, visible: values.some(Boolean), thickness: 1, width: 3 });
  // Wrap long commands: they would be wider than a phone's screen.
  const pieces = new RegExp(`.{1,${element("pareto").clientWidth < 560 ? 32 : 80}}`, "gu");
  const facts = ({ own }) => [plain(own[0].name) + (own.length > 1 ? ` (${own.length} runs)` : ""),
    ...data.labels.map((label) => own[0].params[label] === undefined || (own.length > 1 && label === "seed") ? null
      : plain(`${label.replaceAll("_", " ")} ${own[0].params[label]}`)),
    ...data.columns.map((key) => `${metrics.get(key).title} ${shown(metrics.get(key),
      own.every((row) => key in row.metrics) ? mean(own.map((row) => row.metrics[key])) : undefined)}`),
    ...own.slice(0, RUNS_IN_HOVER).flatMap(source).flatMap((text) => text.match(pieces)).map(plain),
    own.length > RUNS_IN_HOVER ? "..." : null].filter(Boolean).join("<br>");
  const traces = methods.map((method) => points.filter((point) => point.method === method)).filter((own) => own.length)
    .map((own) => ({
      type: kind, mode: "markers", name: plain(own[0].method), x: own.map((point) => point.x), y: own.map((point) => point.y),
      error_x: bars(own.map((point) => point.dx)), error_y: bars(own.map((point) => point.dy)),
      marker: { size: 11, color: colour(own[0].method), line: { width: 1, color: of("--text") },
        symbol: SYMBOLS[methods.indexOf(own[0].method) % SYMBOLS.length] },
      customdata: own.map((point) => point.own[0].index), text: own.map(facts), hovertemplate: "%{text}<extra></extra>",
    }));
  const front = frontOf(points, x.higher, y.higher);
  traces.unshift({ type: "scatter", mode: "lines", name: "Pareto front", x: front.map((point) => point.x),
    y: front.map((point) => point.y), line: { color: "#8a8a8a", width: 1.5, dash: "dot" }, hoverinfo: "skip" });
  const dense = denseOf(rows, x.key, y.key);
  if (dense.length) traces.push({ type: "scatter", mode: "markers", name: "dense", x: dense.map((point) => point.x),
    y: dense.map((point) => point.y), marker: { size: 12, color: "#7a8594", symbol: "diamond-open", line: { width: 2 } },
    text: dense.map((point) => `dense<br>${x.title} ${shown(x, point.x)}<br>${y.title} ${shown(y, point.y)}`),
    hovertemplate: "%{text}<extra></extra>" });
  const top = sortedBy(points, y)[0];
  const says = points.length ? `${points.length} network${points.length === 1 ? "" : "s"} by ${x.title} and ${y.title}; `
    + `Pareto front: ${front.length}; best ${y.title}: ${top.own[0].name} with ${shown(y, top.y)} at ${shown(x, top.x)}. `
    + "The table has all values." : "No network has both metrics.";
  const ups = [...points, ...dense].flatMap((point) => [point.y - (point.dy ?? 0), point.y + (point.dy ?? 0)]);
  draw("pareto", traces, { xaxis: { ...axisOf(x), rangemode: "tozero" },
    yaxis: { ...axisOf(y), ...(y.kind === "share" && ups.length ? span(ups) : {}) } }, says);
}

const sortedBy = (points, metric) => [...points].sort((a, b) => metric.higher ? b.y - a.y : a.y - b.y);

// One point per dense network. Latencies vary between rows, so take the median.
function denseOf(rows, x, y) {
  const keys = [x, y].map((key) => key.replace("pruned_", "dense_"));
  if (!x.startsWith("pruned_") || !(y.startsWith("pruned_"))) return [];
  const found = new Map();
  for (const row of rows) {
    const [across, up] = keys.map((key) => row.metrics[key]);
    const identity = `${row.metrics.dense_top1} ${row.metrics.dense_params}`;
    if (across !== undefined && up !== undefined) found.set(identity, [...(found.get(identity) ?? []), [across, up]]);
  }
  return [...found.values()].slice(0, 50).map((own) => ({ x: median(own.map((pair) => pair[0])), y: median(own.map((pair) => pair[1])) }));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function frontOf(points, moreIsBetterAcross, moreIsBetterUp) {
  const order = [...points].sort((a, b) => (moreIsBetterAcross ? b.x - a.x : a.x - b.x) || (moreIsBetterUp ? b.y - a.y : a.y - b.y));
  const front = [];
  for (const point of order)
    if (!front.length || (moreIsBetterUp ? point.y > front.at(-1).y : point.y < front.at(-1).y)) front.push(point);
  return front;
}

function withDetails() {
  const chosen = data.rows[state.chosen];
  if (chosen?.details && matching().includes(chosen)) return [chosen];
  return sorted(matching()).filter((row) => row.details).slice(0, CURVES_AT_ONCE);
}

function details() {
  const rows = withDetails();
  element("details").hidden = rows.length === 0;
  if (!rows.length) return;
  const chosen = data.rows[state.chosen];
  const lacking = chosen && !rows.includes(chosen) ? [`This page has no plots for ${chosen.name}; the plots below show other networks.`,
    document.createElement("br")] : [];
  element("of-runs").replaceChildren(...lacking, ...rows.flatMap((row) => {
    const run = document.createElement("code");
    run.textContent = source(row).join("; ");
    return [`${row.name}: `, run, document.createElement("br")];
  }));
  keptChannels(rows);
  scores(rows);
  learningCurves(rows);
  const kept = rows.find((row) => String(row.index) === element("confusion-of").value) ?? rows[0];
  fill(element("confusion-of"), rows.map((row) => [String(row.index), row.name]), String(kept.index));
  confusion();
}

// Colours by method, as above, if the methods are distinct.
function shades(rows) {
  const own = rows.map((row) => row.params.method ?? "?");
  return new Set(own).size === own.length ? own.map(colour) : rows.map((_, number) => PALETTE[number % PALETTE.length]);
}

// Axis range within 0 to 1 and at least two percentage points wide: Plotly's automatic range can be too narrow.
function span(shares) {
  const low = Math.min(...shares), high = Math.max(...shares), space = Math.max(0.01, 0.08 * (high - low));
  return { range: [Math.max(-0.002, low - space), Math.min(1.002, high + space)] };
}

function keptChannels(rows) {
  const channels = Object.assign({}, ...rows.map((row) => row.details.channels));
  const layers = Object.keys(channels);
  const share = (row, layer) => (row.details.kept[layer] ?? channels[layer]) / channels[layer];
  const unsure = (row, layer) => row.details.unsure[layer] ?? { kept: [], removed: [] };
  const doubts = ({ kept, removed }) => (kept.length || removed.length
    ? `<br>kept, uncertain: ${kept.join(", ") || "none"}<br>removed, uncertain: ${removed.join(", ") || "none"}` : "");
  const traces = rows.map((row, number) => ({ type: "bar", orientation: "h", name: plain(row.name), y: layers,
    x: layers.map((layer) => share(row, layer)), marker: { color: shades(rows)[number], opacity: 0.75 },
    error_x: { type: "data", symmetric: false, thickness: 1.5, width: 2, color: of("--text"),
      visible: layers.some((layer) => doubts(unsure(row, layer))),
      array: layers.map((layer) => unsure(row, layer).removed.length / channels[layer]),
      arrayminus: layers.map((layer) => unsure(row, layer).kept.length / channels[layer]) },
    customdata: layers.map((layer) =>
      [row.details.kept[layer] ?? channels[layer], channels[layer], doubts(unsure(row, layer))]),
    hovertemplate: "%{y}: %{customdata[0]} of %{customdata[1]} channels%{customdata[2]}<extra>%{fullData.name}</extra>",
  }));
  const least = rows.map((row) => {
    const layer = layers.reduce((least, other) => share(row, other) < share(row, least) ? other : least, layers[0]);
    return `${row.name} keeps the smallest share in ${layer}: ${(100 * share(row, layer)).toFixed(0)}%`;
  });
  draw("kept-channels", traces, { barmode: "group", height: 140 + layers.length * Math.max(18, 9 * rows.length),
    yaxis: { autorange: "reversed", tickfont: { size: 10 } },
    xaxis: { title: { text: "share of channels kept" }, tickformat: ".0%", range: [0, 1.04], dtick: 0.25 } },
  `Share of channels kept in ${layers.length} layers. ${least.join("; ")}.`);
}

// Scores of one run: the first of these rows that has any.
function scores(rows) {
  const row = rows.find((one) => one.details.scores);
  element("scores-section").hidden = !row;
  if (!row) return;
  const { title, layers, centres, counts } = row.details.scores;
  element("scores-of").textContent = several.scores ? ` (run of ${row.name})` : "";
  const share = counts.map((row) => row.map((count) => count / row.reduce((a, b) => a + b, 0) || null));
  draw("scores", [{ type: "heatmap", y: layers, x: centres, z: share, customdata: counts, showscale: false, xgap: 1, ygap: 3,
    colorscale: [[0, of("--least")], [1, of("--most")]],
    hovertemplate: "%{y}: %{customdata} channels near %{x:.2f}<extra></extra>" }],
  { height: 120 + 22 * layers.length, yaxis: { autorange: "reversed", tickfont: { size: 10 }, showgrid: false },
    xaxis: { title: { text: title }, zeroline: true } },
  `Histograms of the knockoff scores of the channels in ${layers.length} layers.`);
}

function learningCurves(rows) {
  const curves = [...rows.map((row, number) => [row.name, row.details.history, shades(rows)[number]])];
  if (rows[0].details.dense_history?.length) curves.unshift(["dense", rows[0].details.dense_history, "#7a8594"]);
  const said = [];
  const traces = curves.filter(([, history]) => history?.length).map(([name, history, color]) => {
    const title = plain(name), validated = history.every((record) => record.validation_top1 !== undefined && record.validation_top1 !== null);
    const key = validated ? "validation_top1" : "top1", kind = validated ? "validation" : "training";
    said.push(`${name} ends at ${(100 * history.at(-1)[key]).toFixed(2)}% on the ${kind} split`);
    return { type: "scatter", mode: "lines+markers", name: title, x: history.map((record) => record.epoch),
      y: history.map((record) => record[key]), line: { color, width: 2 }, marker: { size: 5 },
      hovertemplate: `epoch %{x}: ${kind} top-1 %{y:.2%}<extra>${title}</extra>` };
  });
  const longest = Math.max(1, ...curves.map(([, history]) => history?.length ?? 0));
  draw("learning-curves", traces, { height: 420, xaxis: { title: { text: "epoch" }, tick0: 0,
    dtick: Math.max(1, Math.round(longest / 10)), range: [0.5, longest + 0.5] },
    yaxis: { title: { text: "top-1" }, tickformat: ".0%", ...span(traces.flatMap((trace) => trace.y)) } }, `Accuracy by epoch: ${said.join("; ") || "no network was trained"}.`);
}

function confusion() {
  const row = data.rows[Number(element("confusion-of").value)], { confusion: counts, classes } = row.details;
  const total = counts.map((line) => line.reduce((a, b) => a + b, 0) || 1);
  const worst = { count: 0 };
  counts.forEach((line, truth) => line.forEach((count, said) => {
    if (truth !== said && count > worst.count) Object.assign(worst, { count, truth, said });
  }));
  draw("confusion", [{ type: "heatmap", z: counts.map((line, truth) => line.map((count) => count / total[truth])),
    x: classes.map(plain), y: classes.map(plain), customdata: counts, showscale: false, xgap: 1, ygap: 1, zmin: 0, zmax: 1,
    colorscale: [[0, of("--least")], [1, of("--most")]],
    ...(classes.length <= 12 ? { text: counts, texttemplate: "%{text}" } : {}),
    hovertemplate: "%{y} classified as %{x}: %{customdata}<extra></extra>" }],
  { xaxis: { title: { text: "predicted" }, type: "category", showgrid: false },
    yaxis: { title: { text: "true" }, type: "category", autorange: "reversed", showgrid: false } },
  `Confusion matrix of ${row.name}, ${classes.length} classes. ` + (worst.count
    ? `Most frequent error: ${classes[worst.truth]} classified as ${classes[worst.said]} (count: ${worst.count}).`
    : "No image is misclassified."));
}

// -- events -----------------------------------------------------------------------------------------------------------

function everything() {
  table();
  pareto();
  details();
}

data.rows.forEach((row, index) => {
  row.index = index;
  row.text = [row.name, row.run, ...Object.values(row.params)].join(" ").toLowerCase();
});
const label = (key) => ({ dataset: (value) => {
  const row = data.rows.find((one) => one.dataset === value);
  return `${row.params.dataset ?? "unknown"} (${value.slice(0, 8) || "no hash"})`;
}, device: (value) => value || "an unknown device" }[key]);
for (const key of ["dataset", "device"]) {
  fill(element(key), distinct(key).map((value) => [value, label(key)(value)]));
  element(key).parentElement.hidden = !several[key];
  element(key).addEventListener("change", everything);
}
element("scope").hidden = !several.dataset && !several.device;
fill(element("x-axis"), data.across.map((key) => [key, metrics.get(key).title]), data.across[0]);
fill(element("y-axis"), data.up.map((key) => [key, metrics.get(key).title]), data.up[0]);
element("over-seeds").hidden = groups(data.rows).length === data.rows.length;
for (const id of ["x-axis", "y-axis", "group"]) element(id).addEventListener("change", pareto);
element("confusion-of").addEventListener("change", confusion);
element("filter").addEventListener("input", (event) => {
  state.words = event.target.value;
  state.limit = ROWS_AT_ONCE;
  everything();
});
element("more").addEventListener("click", () => { state.limit += ROWS_AT_ONCE; table(); });
header();
everything();
element("pareto").on("plotly_click", (event) => {
  const index = event.points[0].customdata;
  if (index !== undefined) choose(index, true);
});
dark.addEventListener("change", everything);
// Print in light colours even if the screen is dark.
const plots = () => document.querySelectorAll(".plot.js-plotly-plot");
for (const event of ["beforeprint", "afterprint"])
  window.addEventListener(event, () => {
    document.documentElement.classList.toggle("printing", event === "beforeprint");
    state.limit = event === "beforeprint" ? Infinity : ROWS_AT_ONCE;
    everything();
    plots().forEach((plot) => Plotly.Plots.resize(plot));
  });
