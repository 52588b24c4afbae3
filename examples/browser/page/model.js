/** Text to vector, by the files of a bundle. */

import { BundleError, jsonOf, openBundle } from "./bundle.js";
import { Codec } from "./codecs.js";
import { requireLimit } from "./golden.js";
import { tableOf } from "./table.js";
import { tokenizerOf } from "./tokens.js";

const FORMAT = 4; // of artifact.json
const CODEC_VERSION = 1;
const RANGES = "ranges.json";

/**
 * A bundle that is ready to run.
 * @typedef {object} Model
 * @property {object} spec what artifact.json holds
 * @property {object} golden what golden.json holds
 * @property {Codec} codec of the vectors that the bundle promises
 * @property {boolean} putsOutFloats whether `run` gives vectors that are not coded yet
 * @property {string} engine what runs it
 * @property {(text: string, prompt: ?string) => {ids: number[], truncated: boolean}} tokenize
 * @property {(ids: number[]) => Promise<TypedArray>} run
 * @property {() => Promise<void>} close frees its memory
 */

/**
 * @param {ArrayBuffer} content of a bundle
 * @returns {Promise<Model>}
 * @throws {BundleError} when it is damaged, or not for browsers
 */
export async function loadModel(content) {
  const files = await openBundle(content);
  const spec = jsonOf(files, "artifact.json");
  if (spec.format !== FORMAT) {
    throw new BundleError(`This page reads artifact.json of format ${FORMAT}, not ${spec.format}.`);
  }
  if (spec.codec !== CODEC_VERSION) {
    throw new BundleError(`This page reads codes of version ${CODEC_VERSION}, not ${spec.codec}.`);
  }
  const golden = jsonOf(files, "golden.json");
  requireLimit(golden, spec);
  const ranges = files.has(RANGES) ? jsonOf(files, RANGES) : null;
  const codec = new Codec(spec.vectors, spec.dim, spec.bit_order, ranges);
  const tokenize = tokenizerOf(jsonOf(files, "tokenizer.json"), spec.max_length);
  const prefix = (prompt) => spec.prompts[prompt] ?? spec.prompts[spec.default_prompt] ?? "";
  return {
    spec, golden, codec,
    tokenize: (text, prompt) => tokenize(prefix(prompt) + text),
    ...(await engineOf(spec.engine, files)),
  };
}

async function engineOf(name, files) {
  if (name === "static") {
    const vectorOf = tableOf(files.get("table.safetensors"));
    return { engine: "JavaScript", putsOutFloats: true, run: async (ids) => vectorOf(ids), close: async () => {} };
  }
  if (name === "onnx") return graphOf(files.get("model.onnx"));
  throw new BundleError(`A browser cannot run the engine ${name}; build the bundle for onnx or static.`);
}

/** Run a graph by onnxruntime-web, which is loaded only for this: in WebAssembly, by one thread. */
async function graphOf(file) {
  // The key of ONNX's external data, by which a graph would have other files read.
  if (new TextDecoder("latin1").decode(file).includes("location")) {
    throw new BundleError("The graph names other files, which a bundle has none of; build it again.");
  }
  const ort = await import("./vendor/onnxruntime.js").catch(() => {
    throw new BundleError("onnxruntime-web is not there; run prepare.py again with a bundle that needs it.");
  });
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("vendor/onnxruntime.wasm", document.baseURI).href };
  const session = await ort.InferenceSession.create(file, {
    executionProviders: ["wasm"], enableMemPattern: false, logSeverityLevel: 3,
  });
  const [output] = session.outputNames;
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  return {
    engine: `onnxruntime-web ${ort.env.versions.web}`,
    putsOutFloats: false,
    async run(ids) {
      const mask = new Array(ids.length).fill(1);
      const outputs = await session.run({ input_ids: tensor(ids), attention_mask: tensor(mask) });
      return outputs[output].data;
    },
    close: () => session.release(),
  };
}
