"use strict";
// Charts, filters and tables of the page. Figures come from the JSON in the page, charts from plotly.
const $ = (id) => document.getElementById(id);
let DATA, C; // the figures, and their columns by cell: from data.py
const AXES = {
  p50: ["p50 latency, ms", "p50_ms"], p95: ["p95 latency, ms", "p95_ms"], p99: ["p99 latency, ms"],
  text: ["p50 with tokenization, ms"], ratio: ["p50 over that of the reference"],
  size: ["size of the files, MB", "size_mb"], peak: ["peak memory, MB", "memory_mb"],
  bytes: ["bytes per vector", "vector_bytes"],
};
const ROLES = {
  within_budget: "within the budget", best: "best", balanced: "balanced", smallest: "smallest",
};
const PAPER = { scatter: 690, parts: 690, "tasks-none": 335, "tasks-full": 335, row: 222 }; // px on A4
const print = matchMedia("print");
let printing = false; // from before the browser lays out its pages
const paper = () => printing || print.matches;
let chosen = 0; // row of the cell that "One cell" shows

// -- what is chosen ------------------------------------------------------------------------------
const unique = (values) => [...new Set(values)];
const target = () => DATA.targets.find((each) => each.name === $("target").value);
const rows = () => C.id.map((_, i) => i).filter((i) => C.target[i] === target().name);
const reference = () => rows().find((i) => C.id[i] === target().reference);
const ticked = (id) => [...$(id).querySelectorAll("input:checked")].map((each) => each.value);
const words = (align) => (align === "full" ? "aligned" : "plain");

function shown() {
  const weights = ticked("weights"), vectors = ticked("vectors"), engines = ticked("engine");
  const aligns = ticked("align"), ahead = ticked("frontier").length > 0;
  return rows().filter((i) => weights.includes(C.weights[i]) && vectors.includes(C.vectors[i])
    && engines.includes(C.engine[i]) && aligns.includes(C.align[i]) && (!ahead || C.frontier[i]));
}

function options(select, values, label = (value) => value) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => new Option(label(value), value)));
  if (values.includes(before)) select.value = before;
}

function boxes(id, values, decorate, on = true) {
  $(id).replaceChildren(...values.map((value) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.value = value;
    box.checked = on;
    label.append(box, ...decorate(value));
    return label;
  }));
}

// -- text ----------------------------------------------------------------------------------------
const esc = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const ms = (value) => (value === null ? "–" : value.toPrecision(3));
const between = (low, high, form) => (low === null || low === undefined ? "" : ` (${form(low)} to ${form(high)})`);
const one = (value) => fixed(value, 1);

function figures(i) {
  const kept = retention("mean", i);
  const quality = ["mean", ...DATA.mains].map((name) => [
    name, fixed(C.points[name][i], 2) + between(C.low[name][i], C.high[name][i], one)]);
  const rest = DATA.metrics.slice(1 + DATA.mains.length).filter((name) => C.points[name][i] !== null);
  const query = C.query.mean[i] === null ? []
    : [["as query encoder of the full index", `${fixed(C.query.mean[i], 2)} (${DATA.queries.join(", ")})`]];
  return [
    ...quality,
    ["retention", kept === null ? "–" : `${one(kept)}%`],
    ["loss", fixed(C.loss[i], 2) + between(C.loss_low[i], C.loss_high[i], one)],
    ...rest.map((name) => [name, fixed(C.points[name][i], 2)]),
    ...query,
    ["p50 ms", ms(C.p50[i]) + between(C.p50_low[i], C.p50_high[i], ms)],
    ["p95, p99 ms", `${ms(C.p95[i])}, ${ms(C.p99[i])}`],
    ...(C.text[i] === null ? [] : [["p50 with tokenization", `${ms(C.text[i])} ms`]]),
    ["p50 over the reference's", fixed(C.ratio[i], 3)],
    ["load, first run", `${ms(C.load[i])} ms, ${ms(C.first[i])} ms`],
    ["size", `${one(C.size[i])} MB`],
    ["peak memory", `${fixed(C.peak[i], 0)} MB; after 1,000 requests ${fixed(C.used[i], 0)} MB`],
    ["bytes per vector", String(C.bytes[i])],
    ["runs on", `${C.engine[i]}, ${C.device[i]}`],
    ["flags", C.flags[i] || "none"],
    ["on the frontier", C.frontier[i] ? "yes" : "no"],
  ];
}

const hover = (i) => `<b>${esc(C.id[i])}</b><br>`
  + figures(i).map(([name, value]) => `${esc(name)}: ${esc(value)}`).join("<br>");

// -- tables --------------------------------------------------------------------------------------
function table(head, body, sortable = false) {
  const made = document.createElement("table");
  const top = made.createTHead().insertRow();
  for (const name of head) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    top.append(cell);
  }
  const rest = made.createTBody();
  for (const values of body) {
    const row = rest.insertRow();
    values.forEach((value, column) => {
      const cell = document.createElement(column ? "td" : "th");
      if (!column) cell.scope = "row";
      cell.textContent = value;
      row.append(cell);
    });
  }
  if (sortable) sorting(made);
  return made;
}

function sorting(made) {
  const heads = [...made.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
        const numbers = column > 0 && !Number.isNaN(x) && !Number.isNaN(y);
        return (up ? 1 : -1) * (numbers ? x - y : value(a).localeCompare(value(b), "en", { numeric: true }));
      };
      made.tBodies[0].append(...[...made.tBodies[0].rows].sort(compare));
    });
    head.replaceChildren(button);
  });
}

function copying(block) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const code = block.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch { // a page opened from a file may have no clipboard: select the text instead
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.prepend(button);
}

// -- charts --------------------------------------------------------------------------------------
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (weights) => DATA.colours[weights] || ink("--ink");
const narrow = () => innerWidth < 640 && !paper();

function draw(id, traces, layout) {
  const axis = { gridcolor: ink("--grid"), zerolinecolor: ink("--grid"), linecolor: ink("--line"), automargin: true };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink("--ink"), size: 12 },
    margin: { l: 50, r: 10, t: layout.title ? 36 : 18, b: 45 }, showlegend: false,
    hoverlabel: { align: "left", bgcolor: ink("--panel"), bordercolor: ink("--line"), font: { color: ink("--ink"), size: 11 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: ink("--faint"), activecolor: ink("--ink") },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
  };
  const all = { ...base, ...layout };
  all.width = paper() ? PAPER[id] || PAPER.row : $(id).clientWidth;
  for (const key of ["xaxis", "yaxis"]) all[key] = { ...axis, ...layout[key] };
  // No button but these: one of plotly's own would hand the figures to a service.
  const buttons = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];
  const config = { responsive: true, displaylogo: false, modeBarButtons: [buttons] };
  return Plotly.react(id, traces, all, config);
}

function best(list, x, y) { // those that none beats in both, fastest first
  const line = [];
  for (const i of [...list].sort((a, b) => x[a] - x[b] || y[b] - y[a])) {
    if (!line.length || y[i] > y[line[line.length - 1]]) line.push(i);
  }
  return line;
}

function spans(list, x, y, low, high) {
  const side = (bound, value) => list.map((i) => (bound && bound[i] !== null ? Math.abs(value[i] - bound[i]) : 0));
  const bars = (a, b, value) => ({
    type: "data", symmetric: false, array: side(b, value), arrayminus: side(a, value),
    color: ink("--faint"), thickness: 0.8, width: 0,
  });
  const timed = $("x").value === "p50";
  return { error_x: bars(timed ? C.p50_low : null, timed ? C.p50_high : null, x), error_y: bars(low, high, y) };
}

function limits(metric) {
  const budget = target().budget, [, key] = AXES[$("x").value], found = [];
  const dash = { color: ink("--warn"), width: 1.5, dash: "dash" };
  const words = { showarrow: false, font: { color: ink("--warn"), size: 11 } };
  if (key && budget[key] !== undefined) {
    found.push([{ type: "line", x0: budget[key], x1: budget[key], y0: 0, y1: 1, yref: "paper", line: dash },
      { ...words, x: Math.log10(budget[key]), y: 1, yref: "paper", yanchor: "bottom", text: `at most ${budget[key]}` }]);
  }
  if (budget.min_quality !== undefined && (budget.metric || "mean") === metric) {
    found.push([{ type: "line", y0: budget.min_quality, y1: budget.min_quality, x0: 0, x1: 1, xref: "paper", line: dash },
      { ...words, y: budget.min_quality, x: 1, xref: "paper", xanchor: "right", yanchor: "bottom", text: `at least ${budget.min_quality}` }]);
  }
  return { shapes: found.map(([shape]) => shape), annotations: found.map(([, note]) => note) };
}

function ticks(values) { // 1, 2 and 5 of every power of ten, written out; fewer where they would crowd
  const some = values.filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...some))), high = Math.ceil(Math.log10(Math.max(...some)));
  const leads = narrow() && high - low > 1 ? [1] : [1, 2, 5], found = [];
  for (let power = low; some.length && power <= high; power += 1) found.push(...leads.map((lead) => Number(`${lead}e${power}`)));
  const seen = found.filter((value) => value >= Math.min(...some) && value <= Math.max(...some));
  return seen.length < 2 ? {} : { tickvals: found, ticktext: found.map(String) };
}

function scatter() {
  const metric = $("y").value, x = C[$("x").value], y = C.points[metric];
  const list = shown().filter((i) => x[i] !== null && y[i] !== null); // some figures are of some cells only
  const at = (of, some) => some.map((i) => of[i]);
  const traces = [];
  for (const [ahead, size] of [[0, 5], [1, 12]]) {
    const some = list.filter((i) => C.frontier[i] === ahead);
    traces.push({
      type: "scatter", mode: "markers", x: at(x, some), y: at(y, some), customdata: some,
      text: some.map(hover), hovertemplate: "%{text}<extra></extra>",
      marker: {
        size, color: some.map((i) => (C.align[i] === "full" ? ink("--paper") : colour(C.weights[i]))),
        symbol: some.map((i) => DATA.marks[C.vectors[i]][0]),
        line: { width: ahead ? 2.5 : 1, color: some.map((i) => colour(C.weights[i])) },
      },
      ...(ahead ? spans(some, x, y, C.low[metric], C.high[metric]) : {}),
    });
  }
  const line = best(list.filter((i) => C.frontier[i]), x, y);
  traces.unshift({ type: "scatter", mode: "lines", x: at(x, line), y: at(y, line), hoverinfo: "skip", line: { color: ink("--faint"), width: 1 } });
  const names = Object.values(target().picks), rings = list.filter((i) => names.includes(C.id[i]) || i === chosen);
  traces.push({
    type: "scatter", mode: "markers", x: at(x, rings), y: at(y, rings), hoverinfo: "skip",
    marker: { symbol: "circle-open", size: 20, color: ink("--ink"), line: { width: rings.map((i) => (i === chosen ? 3 : 1.5)) } },
  });
  const lines = limits(metric);
  const home = list.filter((i) => i === reference()).map((i) => ({
    x: Math.log10(x[i]), y: y[i], text: "reference", showarrow: false, xanchor: "right", yanchor: "bottom", xshift: 8, yshift: 2,
    font: { color: ink("--ink"), size: 11 },
  }));
  draw("scatter", traces, {
    xaxis: { title: { text: AXES[$("x").value][0] }, type: "log", ...ticks(at(x, list)) },
    yaxis: { title: { text: narrow() ? "" : `${metric}, points` } }, hovermode: "closest",
    shapes: lines.shapes, annotations: [...lines.annotations, ...home],
  });
  $("scatter").setAttribute("aria-label", `Scatter of ${list.length} cells, ${AXES[$("x").value][0]} across and ${metric} up`);
  $("shown").textContent = `${list.length} of ${rows().length} cells are shown; ${target().latency}.`;
  if ($("all").open) everything(shown());
}

function everything(list) {
  const head = ["cell", "mean", ...DATA.mains, "retention %", "p50 ms", "p95 ms", "MB", "peak MB", "B/vector", "flags"];
  const body = list.map((i) => [
    C.id[i], ...["mean", ...DATA.mains].map((name) => fixed(C.points[name][i], 2)), one(retention("mean", i)),
    ms(C.p50[i]), ms(C.p95[i]), one(C.size[i]), fixed(C.peak[i], 0), String(C.bytes[i]), C.flags[i]]);
  $("all-table").replaceChildren(table(head, body, true));
}

function retention(metric, i, points = C.points, whole = C.points) {
  const home = C.id.findIndex((id, j) => C.target[j] === C.target[i]
    && id === DATA.targets.find((each) => each.name === C.target[i]).reference);
  const [value, of] = [points[metric][i], whole[metric][home]];
  return value === null || !of ? null : (100 * value) / of;
}

const alike = () => rows().filter((i) => C.weights[i] === $("map-weights").value
  && C.vectors[i] === $("map-vectors").value && (C.layers[i] === 0 || C.engine[i] === $("map-engine").value));

function maps() {
  const share = $("map-figure").value === "retention", metric = $("map-metric").value;
  const kinds = [["none", "plain"], ["full", "aligned"], ["query", "queries on the full index"]];
  const value = (kind, i) => {
    const points = kind === "query" ? C.query : C.points;
    if (!points[metric]) return null;
    return share ? retention(metric, i, points, points) : points[metric][i];
  };
  const list = alike(), layers = unique(list.map((i) => C.layers[i])).sort((a, b) => a - b);
  const dims = unique(list.map((i) => C.dim[i])).sort((a, b) => a - b);
  const body = [], grids = {};
  for (const [kind] of kinds) {
    grids[kind] = layers.map((n) => dims.map((d) => {
      const found = list.filter((i) => C.layers[i] === n && C.dim[i] === d && (kind === "query" || C.align[i] === kind));
      const values = found.map((i) => value(kind, i)).filter((each) => each !== null);
      return values.length ? Math.max(...values) : null;
    }));
  }
  // The mean of queries is of fewer tasks than that of cells: the two are not compared.
  const apart = metric === "mean" && DATA.queries.length !== DATA.mains.length;
  for (const [kind, name] of kinds) {
    const grid = grids[kind], some = grid.flat().some((each) => each !== null);
    $(`map-${kind}`).parentElement.hidden = !some;
    if (!some) continue;
    const like = kinds.filter(([each]) => !apart || (each === "query") === (kind === "query"));
    const span = share ? [40, 100] : ends(like.flatMap(([each]) => grids[each].flat()));
    heat(`map-${kind}`, dims.map(String), layers.map(String), grid, name, span);
    layers.forEach((n, row) => {
      if (grid[row].some((each) => each !== null)) body.push([`${name}, ${n} layers`, ...grid[row].map(one)]);
    });
  }
  $("map-table").replaceChildren(table(["cells", ...dims.map((d) => `${d} dims`)], body));
}

function ends(figures) { // of a scale; that of one value has it in its middle
  const values = figures.filter((value) => value !== null);
  const low = Math.min(...values), high = Math.max(...values);
  return low < high ? [low, high] : [low - 1, high + 1];
}

function heat(id, x, y, z, title, span, marks = null) {
  const hint = marks ? "%{y}, %{x}: %{z:.1f}%{text}<extra></extra>" : "%{y} layers, %{x} dims: %{z:.1f}<extra></extra>";
  const [low, high] = span;
  const points = z.flatMap((row, r) => row.flatMap((value, c) => (value === null ? [] : [[c, r, value]])));
  const figure = ([c, r, value]) => value.toFixed(marks ? 0 : 1) + (marks ? marks[r][c] : "");
  draw(id, [{
    type: "heatmap", x, y, z, text: marks, colorscale: "Cividis", showscale: !marks, xgap: 1, ygap: 1,
    hovertemplate: hint, hoverongaps: false, zmin: low, zmax: high,
    colorbar: { thickness: 8, outlinewidth: 0, xpad: 4, tickfont: { size: 10 } },
  }, { // white on the dark half of the scale and black on the bright one: each is read best there
    type: "scatter", mode: "text", x: points.map(([c]) => x[c]), y: points.map(([, r]) => y[r]),
    text: points.map(figure), hoverinfo: "skip",
    textfont: { size: 11, color: points.map(([, , value]) => (value < low + 0.47 * (high - low) ? "#ffffff" : "#000000")) },
  }], {
    title: { text: title, font: { size: 13 } },
    xaxis: { type: "category", title: { text: marks ? "" : "dims" }, showgrid: false, range: [-0.5, x.length - 0.5] },
    yaxis: {
      type: "category", title: { text: marks ? "" : "layers" }, showgrid: false,
      range: marks ? [y.length - 0.5, -0.5] : [-0.5, y.length - 0.5],
    },
  });
}

function collapse() {
  const short = (name) => (name.length > 26 ? `${name.slice(0, 25)}…` : name);
  const tasks = DATA.mains.map((name) => short(name.slice(0, name.lastIndexOf("/"))));
  const x = (unique(tasks).length === tasks.length ? tasks : DATA.mains).map(esc), body = [];
  for (const align of ["none", "full"]) {
    const list = alike().filter((i) => C.align[i] === align).sort((a, b) => C.layers[b] - C.layers[a] || C.dim[b] - C.dim[a]);
    const z = list.map((i) => DATA.mains.map((name) => retention(name, i)));
    const marks = list.map((i) => DATA.mains.map((name) => (C.collapsed[i].includes(name) ? " ×" : "")));
    $(`tasks-${align}`).parentElement.hidden = !list.length;
    $(`tasks-${align}`).style.height = `${8 + 1.2 * list.length}rem`;
    if (list.length) heat(`tasks-${align}`, x, list.map((i) => `${C.layers[i]}x${C.dim[i]}`), z, words(align), [0, 100], marks);
    body.push(...list.map((i, row) => [C.id[i], ...z[row].map((each, k) => one(each) + marks[row][k]), C.flags[i]]));
  }
  $("tasks-table").replaceChildren(table(["cell", ...DATA.mains, "flags"], body));
}

function parts() {
  const list = target().sizes.map((id) => rows().find((i) => C.id[i] === id));
  const x = [list.map((i) => C.weights[i]), list.map((i) => String(C.layers[i]))];
  draw("parts", DATA.parts.map(([name, fill], part) => ({
    type: "bar", name, x, y: list.map((i) => C.parts[i][part]), marker: { color: fill },
    hovertemplate: `%{x}: ${name} %{y:.2f} MB<extra></extra>`,
  })), {
    barmode: "stack", showlegend: true, legend: { orientation: "h", y: 1.14, traceorder: "normal" }, yaxis: { title: { text: "MB" } },
    xaxis: { type: "multicategory", showgrid: false },
  });
  const body = list.map((i) => [`${C.weights[i]}, ${C.layers[i]} layers, ${C.dim[i]} dims`, ...C.parts[i].map((each) => fixed(each, 2))]);
  $("parts-table").replaceChildren(table(["files", ...DATA.parts.map(([name]) => `${name}, MB`)], body));
}

// -- one cell ------------------------------------------------------------------------------------
function choose(i) {
  chosen = i;
  $("cell").value = String(i);
  const picked = Object.entries(target().picks).filter(([, id]) => id === C.id[i]).map(([role]) => ROLES[role]);
  $("cell-figures").replaceChildren(table(["figure of", picked.length ? `${C.id[i]} (${picked.join(", ")})` : C.id[i]], figures(i)));
  $("bundle").textContent = C.bundle[i];
  $("build").textContent = C.build[i];
}

// -- start ---------------------------------------------------------------------------------------
function fill() { // what depends on the target
  const list = rows(), of = (name) => unique(list.map((i) => C[name][i]));
  const ordered = (known, name) => Object.keys(known).filter((each) => of(name).includes(each));
  const swatch = (name) => {
    const made = document.createElement("span");
    made.className = "swatch";
    made.style.background = `var(--${name}, ${DATA.colours[name] || "var(--ink)"})`;
    return made;
  };
  boxes("weights", ordered(DATA.colours, "weights"), (name) => [swatch(name), name]);
  boxes("vectors", ordered(DATA.marks, "vectors"), (name) => [`${DATA.marks[name][1]} ${name}`]);
  boxes("engine", of("engine"), (name) => [name]);
  boxes("align", of("align"), (name) => [words(name)]);
  boxes("frontier", ["frontier"], () => ["the frontier only"], false);
  $("engine-f").hidden = of("engine").length < 2;
  $("align-f").hidden = of("align").length < 2;
  options($("map-weights"), ordered(DATA.colours, "weights"));
  options($("map-vectors"), ordered(DATA.marks, "vectors"));
  const engines = unique(list.filter((i) => C.layers[i] > 0).map((i) => C.engine[i]));
  options($("map-engine"), engines.length ? engines : of("engine"));
  $("map-engine-l").hidden = engines.length < 2;
  $("map-weights").value = C.weights[reference()];
  $("map-vectors").value = C.vectors[reference()];
  options($("cell"), list.map(String), (i) => C.id[i]);
  const [first] = Object.values(target().picks);
  choose(list.find((i) => C.id[i] === first) ?? list[0]);
}

function drawAll() {
  scatter();
  maps();
  collapse();
  parts();
}

function listen() {
  $("target").addEventListener("change", () => { fill(); drawAll(); });
  document.querySelector("#plane .filters").addEventListener("change", (event) => { if (event.target.id !== "target") scatter(); });
  document.querySelector("#maps .filters").addEventListener("change", () => { maps(); collapse(); });
  document.querySelectorAll(".filters").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  $("cell").addEventListener("change", () => { choose(Number($("cell").value)); scatter(); });
  $("all").addEventListener("toggle", () => { if ($("all").open) everything(shown()); });
  $("scatter").on("plotly_click", (event) => {
    const i = event.points[0].customdata;
    if (i !== undefined) { choose(i); setTimeout(scatter); }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // In the colours and the width of paper, which a page cannot ask for.
  print.addEventListener("change", drawAll);
  for (const [event, now] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => { printing = now; drawAll(); });
  }
}

async function unpack(id) {
  const packed = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function start() {
  DATA = JSON.parse(await unpack("data"));
  C = DATA.cells;
  const library = document.createElement("script");
  library.textContent = await unpack("plotly");
  document.head.append(library);
  options($("target"), DATA.targets.map((each) => each.name));
  $("target-l").hidden = DATA.targets.length < 2;
  options($("x"), Object.keys(AXES).filter((key) => C[key].some((each) => each !== null)), (key) => AXES[key][0]);
  options($("y"), DATA.metrics.filter((name) => C.points[name]));
  options($("map-figure"), ["quality", "retention"]);
  options($("map-metric"), DATA.metrics.filter((name) => C.points[name]));
  document.querySelectorAll("table.sortable").forEach(sorting);
  document.querySelectorAll(".command").forEach(copying);
  fill();
  drawAll();
  listen();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  $("trouble").textContent = `The charts could not be drawn by this browser (${error.message}); the tables are complete.`;
  $("trouble").hidden = false;
  document.querySelectorAll(".live").forEach((each) => { each.hidden = true; });
});
