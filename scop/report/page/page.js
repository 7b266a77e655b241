"use strict";
// Shows the data that scop/report/page/content.py embeds: Tabulator draws the table, Plotly the plots. Titles, formats,
// colours and values come from Python; this script selects what matches the filter.

const element = (id) => document.getElementById(id);
const create = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const code = (text) => create("code", { textContent: text ?? "–" });
const button = (text) => create("button", { type: "button", textContent: text });
const data = JSON.parse(element("data").textContent);
const MARKS_IN_SVG = 1500; // more points are drawn with WebGL

function fill(id, options, chosen) {
  element(id).replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

// -- table ------------------------------------------------------------------------------------------------------------

const metrics = data.columns.filter((column) => column.kind === "metric");
let best = {}; // column -> best value of the rows shown

const formatters = {
  name(cell) {
    const made = button(cell.getValue());
    made.addEventListener("click", () => choose(cell.getRow()));
    return made;
  },
  label: (cell) => document.createTextNode(cell.getValue() ?? "–"),
  metric(cell) {
    const [text, ofDense] = cell.getData().texts[cell.getField()] ?? ["–", ""];
    const wins = cell.getValue() !== undefined && cell.getValue() === best[cell.getField()];
    const made = create("div");
    made.append(create(wins ? "strong" : "span", { textContent: text }), create("small", { textContent: ofDense }));
    return made;
  },
  code: (cell) => code(cell.getValue()),
};

function heading(cell) {
  return cell.getColumn().getDefinition().headerSort === false ? cell.getValue() : button(cell.getValue());
}

const table = new Tabulator("#table", {
  data: data.rows,
  index: "index",
  columns: data.columns.map(({ kind, options }) => ({ ...options, formatter: formatters[kind], cssClass: kind })),
  columnDefaults: { sorterParams: { alignEmptyValues: "bottom" }, titleFormatter: heading },
  // The rows come best first and sorting is stable, so ties stay in this order.
  initialSort: metrics.slice(0, 1).map(({ options }) => ({
    column: options.field,
    dir: options.headerSortStartingDir,
  })),
  autoResize: false, // it also redraws whenever the table becomes visible, and the focus is lost
  layout: "fitDataFill",
  maxHeight: "75vh",
  nestedFieldSeparator: false,
  placeholder: "No result matches the filter.",
  printAsHtml: true,
  printRowRange: "active",
  printStyled: false,
  rowFormatter: press,
});
const shown = () => table.getRows("active").map((row) => row.getData()); // the objects of data.rows

// A column or plot never mixes accuracies on different data sets, or latencies of different devices.
function inScope(row) {
  return Object.keys(data.scopes).every((key) => row[key] === element(key).value);
}

function filter() {
  const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  table.setFilter((row) => inScope(row) && words.every((word) => row.words.includes(word)));
  markBest();
  const scope = data.rows.filter(inScope).length;
  const others = data.rows.length - scope;
  element("count").textContent = `${shown().length} of ${scope}` +
    (others ? `, and ${others} on other data or devices` : "");
  drawAll();
}

function markBest() {
  const before = best;
  best = {};
  for (const { best: least, options: { field } } of metrics.filter((column) => column.best)) {
    const values = shown().map((row) => row[field]).filter((value) => value !== undefined);
    if (values.length > 1) best[field] = Math[least](...values);
  }
  const changed = (row) =>
    metrics.some(({ options: { field } }) => (row[field] === best[field]) !== (row[field] === before[field]));
  for (const row of table.getRows()) if (changed(row.getData())) row.reformat();
}

const buttonOf = (row) => row.getCell("name").getElement().querySelector("button");

function press(row) {
  if (row.isSelected) buttonOf(row)?.setAttribute("aria-pressed", String(row.isSelected()));
}

function choose(row, keep = false) {
  const select = keep || !row.isSelected();
  table.deselectRow();
  if (select) row.select();
  drawNetworks();
}

async function goTo(index) {
  const row = table.getRow(index);
  choose(row, true);
  await table.scrollToRow(row, "center", false);
  element("table").scrollIntoView({ block: "center", behavior: "smooth" });
  buttonOf(row).focus({ preventScroll: true });
}

// -- plots ------------------------------------------------------------------------------------------------------------

// Replace var(--NAME) by the colour of the current style sheet: light, dark or print.
function themed(figure) {
  const style = getComputedStyle(document.documentElement);
  const text = JSON.stringify(figure).replaceAll(/var\((--\w+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  return JSON.parse(text);
}

const narrow = (id) => element(id).clientWidth < 560;

function draw(id, traces, label, changes = {}) {
  const layout = { ...data.layouts[id], ...changes };
  for (const axis of ["xaxis", "yaxis"]) layout[axis] = { ...data.layouts[id][axis], ...changes[axis] };
  if (narrow(id)) {
    layout.font = { ...layout.font, size: 10 };
    layout.margin = { ...layout.margin, l: 48, r: 6 };
  }
  element(id).style.height = `${layout.height}px`;
  element(id).setAttribute("aria-label", label);
  const config = { ...data.config, displayModeBar: narrow(id) ? false : "hover" };
  Plotly.react(id, themed(traces), themed(layout), config);
}

// As share_limits in scop/report/figures/axes.py, for the values shown.
function shareLimits(values) {
  const { low, high, margin, relative_margin: relative } = data.shareLimits;
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const space = Math.max(margin, relative * (most - least));
  return values.length ? { range: [Math.max(low, least - space), Math.min(high, most + space)] } : {};
}

// As pareto_front in scop/report/figures/points.py, for the points shown.
function frontOf(points, x, y) {
  const value = (point, axis) => point.values[axis.key][0] * (axis.higher ? -1 : 1);
  const front = [];
  for (const point of points.toSorted((a, b) => value(a, x) - value(b, x) || value(a, y) - value(b, y))) {
    if (!front.length || value(point, y) < value(front.at(-1), y)) front.push(point);
  }
  return front;
}

function drawAccuracy() {
  const [x, y] = [["x-axis", data.costs], ["y-axis", data.accuracies]]
    .map(([id, options]) => options.find(({ key }) => key === element(id).value));
  const visible = new Set(shown().map((row) => row.index));
  const indexOf = (point) => point.results.find((index) => visible.has(index));
  const drawable = (point) => x.key in point.values && y.key in point.values && indexOf(point) !== undefined;
  const points = ((element("group").checked && data.grouped) || data.single).filter(drawable);
  const dense = data.dense.filter(drawable);
  const front = frontOf(points, x, y);
  const at = (own, { key }, part = 0) => own.map((point) => point.values[key][part]);
  const bars = (array) => ({ array, visible: array.some(Boolean), thickness: 1, width: 3 });
  // Wrap long commands: they would be wider than a phone's screen. Plotly interprets text as markup.
  const pieces = new RegExp(`.{1,${narrow("pareto") ? 32 : 80}}`, "gu");
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const markers = (template, own, lines) => ({
    ...template,
    type: own.length > MARKS_IN_SVG ? "scattergl" : "scatter",
    x: at(own, x),
    y: at(own, y),
    error_x: bars(at(own, x, 1)),
    error_y: bars(at(own, y, 1)),
    text: own.map((point) => lines(point).flatMap((line) => line.match(pieces)).map(plain).join("<br>")),
    customdata: own.map(indexOf),
  });
  const traces = [{ ...data.front, x: at(front, x), y: at(front, y) }];
  for (const [method, template] of Object.entries(data.methods)) {
    const own = points.filter((point) => point.method === method);
    if (own.length) traces.push(markers(template, own, (point) => point.lines));
  }
  const ofDense = (point) => ["dense", ...[x, y].map(({ key, label }) => `${label} ${point.values[key][2]}`)];
  if (dense.length) traces.push({ ...markers(data.denseMarkers, dense, ofDense), customdata: undefined });
  const ends = [...points, ...dense].flatMap((
    { values: { [y.key]: [mean, spread] } },
  ) => [mean - spread, mean + spread]);
  draw("pareto", traces, accuracyLabel(points, front, x, y), {
    xaxis: { ...x.axis, rangemode: "tozero" },
    yaxis: { ...y.axis, ...(y.share ? shareLimits(ends) : {}) },
  });
}

function accuracyLabel(points, front, x, y) {
  if (!points.length) return "No network has both metrics.";
  const [top] = points.toSorted((a, b) => (a.values[y.key][0] - b.values[y.key][0]) * (y.higher ? -1 : 1));
  return `${points.length} network${points.length === 1 ? "" : "s"} by ${x.label} and ${y.label}; ` +
    `Pareto front: ${front.length}; best ${y.label}: ${top.name} with ${top.values[y.key][2]} at ` +
    `${top.values[x.key][2]}. The table has all values.`;
}

// Plots of the selected network, or of the first ones in the table.
function drawNetworks() {
  const rows = shown();
  const chosen = table.getSelectedData()[0];
  const alone = chosen?.plots && rows.includes(chosen);
  const own = alone ? [chosen] : rows.filter((row) => row.plots).slice(0, data.together);
  element("details").hidden = own.length === 0;
  if (!own.length) return;
  const note = `This page has no plots for ${chosen?.name}; the plots below show other networks.`;
  element("of-runs").replaceChildren(
    ...(chosen && !alone ? [note, create("br")] : []),
    ...own.flatMap(({ plots, source }) => [`${plots.name}: `, code(source), create("br")]),
  );
  const networks = own.map((row) => row.plots);
  drawKept(networks);
  drawScores(networks.find((network) => network.scores));
  drawCurves(networks);
  const options = networks.map((network) => [String(network.index), network.name]);
  fill("confusion-of", options, element("confusion-of").value);
  drawConfusion();
}

function drawKept(networks) {
  const layers = new Set(networks.flatMap(({ kept }) => kept.y)).size;
  const label = `Share of channels kept in ${layers} layers. ${networks.map(({ says }) => says.kept).join("; ")}.`;
  const height = 140 + layers * Math.max(18, 9 * networks.length);
  draw("kept-channels", networks.map(({ kept }) => kept), label, { height });
}

// Scores of one run: the first of the networks shown that has any.
function drawScores(network) {
  element("scores-section").hidden = !network;
  if (!network) return;
  const { trace, axis } = network.scores;
  element("scores-of").textContent = data.severalScores ? ` (run of ${network.name})` : "";
  const label = `Histograms of the knockoff scores of the channels in ${trace.y.length} layers.`;
  draw("scores", [trace], label, { height: 120 + 22 * trace.y.length, xaxis: axis });
}

function drawCurves(networks) {
  const traces = [networks[0].denseCurve, ...networks.map(({ curve }) => curve)].filter(Boolean);
  const longest = Math.max(1, ...traces.map(({ x }) => x.length));
  const said = networks.map(({ says }) => says.curves).filter(Boolean).join("; ") || "no network was trained";
  draw("learning-curves", traces, `Accuracy by epoch: ${said}.`, {
    xaxis: { tick0: 0, dtick: Math.max(1, Math.round(longest / 10)), range: [0.5, longest + 0.5] },
    yaxis: shareLimits(traces.flatMap(({ y }) => y)),
  });
}

function drawConfusion() {
  const { plots } = data.rows.find((row) => row.index === Number(element("confusion-of").value));
  draw("confusion", [plots.confusion], `Confusion matrix of ${plots.name}, ${plots.says.confusion}`);
}

function drawAll() {
  drawAccuracy();
  drawNetworks();
}

// -- events -----------------------------------------------------------------------------------------------------------

table.on("tableBuilt", () => {
  for (const [key, options] of Object.entries(data.scopes)) {
    fill(key, options);
    element(key).parentElement.hidden = options.length < 2;
    element(key).addEventListener("change", filter);
  }
  element("scope").hidden = Object.values(data.scopes).every((options) => options.length < 2);
  for (const [id, options] of [["x-axis", data.costs], ["y-axis", data.accuracies]]) {
    fill(id, options.map(({ key, label }) => [key, label]));
  }
  for (const id of ["x-axis", "y-axis", "group"]) element(id).addEventListener("change", drawAccuracy);
  element("over-seeds").hidden = !data.grouped;
  element("confusion-of").addEventListener("change", drawConfusion);
  element("filter").addEventListener("input", filter);
  for (const event of ["rowSelected", "rowDeselected"]) table.on(event, press);
  filter();
  element("pareto").on("plotly_click", ({ points: [{ customdata }] }) => customdata !== undefined && goTo(customdata));
  addEventListener("resize", () => table.redraw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // Print in light colours even if the screen is dark. Tabulator prints all rows that match the filter.
  for (const event of ["beforeprint", "afterprint"]) {
    addEventListener(event, () => {
      document.documentElement.classList.toggle("printing", event === "beforeprint");
      drawAll();
      document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot));
    });
  }
});
