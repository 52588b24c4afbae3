/** The page: opens a bundle, checks it, embeds the sentences and answers what is asked. */

import { BundleError } from "./bundle.js";
import { checkGolden } from "./golden.js";
import { loadModel } from "./model.js";
import { indexOf, searchColumn, vectorOf } from "./search.js";

const $ = (id) => document.getElementById(id);
const TOP = 8;
const BREATH_MS = 100; // between two pauses for the browser to draw and listen
const state = { model: null, sentences: [], columns: [] };

// -- what is said ---------------------------------------------------------------------------------
const element = (name, text = "", className = "") => {
  return Object.assign(document.createElement(name), { textContent: text, className });
};
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
/** Browsers round what their clock says to 0.1 ms. */
const duration = (ms) => {
  if (ms === 0) return "under 0.1 ms";
  if (ms < 1000) return `${ms < 100 ? ms.toPrecision(2) : Math.round(ms)} ms`;
  return `${(ms / 1000).toFixed(1)} s`;
};
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Say how things stand: "busy", "ready" or "trouble". */
function show(phase, sentence) {
  document.documentElement.dataset.state = phase;
  $("trouble").hidden = phase !== "trouble";
  $("trouble").textContent = phase === "trouble" ? sentence : "";
  $("status").textContent = phase === "trouble" ? "" : sentence;
}

let asked = Promise.resolve(); // what is asked meanwhile waits for it

/** Do something after all that was asked before, and say in a sentence what went wrong. */
function attempt(work) {
  asked = asked.then(work).catch((error) => {
    show("trouble", error instanceof BundleError ? error.message : `This failed: ${error.message}`);
  });
}

/** Return a function that says how far the work is, and lets the browser draw it, from time to time. */
function breather(say) {
  let last = -BREATH_MS;
  return async (done) => {
    if (performance.now() - last < BREATH_MS) return;
    say(done);
    await new Promise((resume) => setTimeout(resume));
    last = performance.now();
  };
}

// -- a bundle -------------------------------------------------------------------------------------
function openModel() {
  if (!state.model) throw new BundleError("No bundle is open; choose one below.");
  return state.model;
}

async function openBundleNamed(name) {
  show("busy", `Loading ${name} …`);
  const response = await fetch(`bundles/${encodeURIComponent(name)}`);
  if (!response.ok) throw new BundleError(`The server has no bundle ${name}; run prepare.py with it.`);
  await openContent(name, await response.arrayBuffer());
}

async function openContent(name, content) {
  show("busy", `Checking ${name} …`);
  await state.model?.close();
  Object.assign(state, { model: null, columns: [] });
  for (const id of ["facts", "golden", "results", "note", "indexed"]) $(id).replaceChildren();
  const start = performance.now();
  state.model = await loadModel(content);
  showFacts(name, content.byteLength, performance.now() - start);
  showGolden(await checkGolden(state.model));
  await embedSentences();
}

function showFacts(name, bytes, ms) {
  const { spec, engine } = state.model;
  const facts = {
    Bundle: `${name}, ${megabytes(bytes)}`,
    Model: `${counted(spec.layers, "layer")}, ${spec.dim} dims, ${spec.weights} weights, ${spec.vectors} vectors`,
    "Runs on": `${engine}, one thread; ready after ${duration(ms)}`,
    Space: spec.space_id,
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([term, fact]) => {
    return [element("dt", term), element("dd", fact)];
  }));
}

function showGolden(report) {
  const isCode = state.model.codec.precision !== "float32";
  const sameCodes = isCode ? `, ${(100 * report.sameCodes).toFixed(2)}% of the codes equal` : "";
  $("golden").className = report.holds ? "good" : "bad";
  $("golden").textContent = `${report.holds ? "✓ Agrees" : "✗ Does not agree"} with the golden texts: `
    + `${report.sameIds} of ${report.texts} become the same token ids, and ${report.withinLimit} of `
    + `${report.vectors} vectors are reproduced (min cosine ${report.cosine.toFixed(6)}${sameCodes}; limit: `
    + `${report.tolerance.metric} ${report.tolerance.limit}).`;
}

// -- the sentences --------------------------------------------------------------------------------
async function embedSentences() {
  const model = openModel(), start = performance.now();
  const sentences = $("sentences").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const count = counted(sentences.length, "sentence");
  show("busy", `Embedding ${count} …`);
  const progress = breather((done) => { $("indexed").textContent = `${done} of ${count} done …`; });
  const { columns, truncated } = await indexOf(model, sentences, progress);
  Object.assign(state, { sentences, columns });
  const cut = truncated ? `, ${truncated} of them cut at ${model.spec.max_length} tokens` : "";
  $("indexed").textContent = `Embedded ${count} in ${duration(performance.now() - start)}${cut}.`;
  await search();
}

async function search() {
  const model = openModel(), { columns, sentences } = state, start = performance.now();
  const { ids } = model.tokenize($("query").value.trim(), "query");
  const vector = await vectorOf(model, ids), embedding = performance.now() - start;
  const answers = columns.map((column) => ({ ...column, ...searchColumn(column, vector, TOP) }));
  $("results").replaceChildren(...answers.map((answer) => cardOf(answer, answers[0])));
  $("note").textContent = noteOn(model);
  const nearest = answers[0]?.found[0];
  const found = nearest ? `the nearest is “${sentences[nearest.row]}”` : "there is no sentence to compare with";
  show("ready", `Embedded ${counted(ids.length, "token")} in ${duration(embedding)}; ${found}.`);
}

function cardOf({ codec, found, ms }, first) {
  const card = element("section"), list = element("ol"), rows = new Set(first.found.map(({ row }) => row));
  const shared = found.filter(({ row }) => rows.has(row)).length;
  card.append(
    element("h3", codec.precision),
    element("p", `${counted(codec.bytes, "byte")} per vector`),
    element("p", `${duration(ms)} for ${counted(state.sentences.length, "sentence")}`),
    element("p", codec === first.codec ? "\u00a0" : `${shared} of ${found.length} as by ${first.codec.precision}`),
    list,
  );
  list.append(...found.map(({ row, similarity }) => {
    const item = element("li");
    item.append(element("span", similarity.toFixed(3), "similarity"), element("span", state.sentences[row]));
    return item;
  }));
  return card;
}

/** Say what the columns are made of, where that is not the float vector. */
function noteOn({ codec, putsOutFloats }) {
  if (putsOutFloats || codec.precision === "float32") return "";
  if (codec.isBits) return "This bundle's graph puts out one bit per dim; there is no longer vector to show.";
  return `This bundle's graph puts out ${codec.precision} codes: float32 is what these stand for, bits are its signs.`;
}

// -- the start ------------------------------------------------------------------------------------
async function start() {
  const [sentences, bundles] = await Promise.all([
    fetch("sentences.txt").then((response) => response.text()),
    fetch("bundles.json").then((response) => response.json()),
  ]);
  $("sentences").value = sentences.trim();
  $("bundle").replaceChildren(...bundles.map((name) => new Option(name, name)));
  const named = new URLSearchParams(location.search).get("bundle");
  $("bundle").value = named ?? bundles[0];
  if (!$("bundle").value) throw new BundleError(`This site has no bundle ${named}; choose one below.`);
  await openBundleNamed($("bundle").value);
}

$("bundle").addEventListener("change", () => attempt(() => openBundleNamed($("bundle").value)));
$("file").addEventListener("change", ({ target: { files: [file] } }) => {
  if (file) attempt(async () => openContent(file.name, await file.arrayBuffer()));
});
$("own").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(embedSentences);
});
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(search);
});
attempt(start);
