/** The same sentences in several precisions, searched side by side. */

import { Codec } from "./codecs.js";

const TIMED_MS = 20; // a search takes less than a browser's clock can tell, so it is repeated

/**
 * Return the precisions that a bundle's vectors can be shown in, from the longest to the shortest.
 * Those of one bit per dim, out of a graph, have nothing longer behind them.
 * @param {import("./model.js").Model} model
 * @returns {Codec[]}
 */
export function precisionsOf({ codec, spec, putsOutFloats }) {
  if (codec.isBits && !putsOutFloats) return [codec];
  const other = (precision) => new Codec(precision, spec.dim, spec.bit_order);
  const isShort = !codec.isBits && codec.precision !== "float32";
  return [other("float32"), isShort ? codec : other("int8-symmetric"), codec.isBits ? codec : other("ubinary")];
}

/** Return the float vector of a text's token ids, or what its code stands for. */
export async function vectorOf(model, ids) {
  const vector = await model.run(ids);
  return model.putsOutFloats ? vector : model.codec.decode(vector);
}

/**
 * Embed sentences, once, and store them in each precision.
 * @param {import("./model.js").Model} model
 * @param {string[]} sentences
 * @param {(done: number) => Promise<void>} progress is awaited before each sentence
 * @returns {Promise<{columns: {codec: Codec, codes: TypedArray}[], truncated: number}>}
 */
export async function indexOf(model, sentences, progress) {
  const columns = precisionsOf(model).map((codec) => {
    return { codec, codes: new codec.Values(sentences.length * codec.width) };
  });
  let truncated = 0;
  for (const [row, sentence] of sentences.entries()) {
    await progress(row);
    const tokens = model.tokenize(sentence, "document");
    const vector = await vectorOf(model, tokens.ids);
    for (const { codec, codes } of columns) codes.set(codec.encode(vector), row * codec.width);
    truncated += tokens.truncated;
  }
  return { columns, truncated };
}

/**
 * Search one column.
 * @returns {{found: {row: number, similarity: number}[], ms: number}} ms: of one search, the mean of
 *   as many as fit into 20 ms
 */
export function searchColumn({ codec, codes }, vector, top) {
  const query = codec.encode(vector), start = performance.now();
  let found, runs = 0, passed = 0;
  while (passed < TIMED_MS) {
    found = codec.search(query, codes, top);
    runs += 1;
    passed = performance.now() - start;
  }
  return { found, ms: passed / runs };
}
