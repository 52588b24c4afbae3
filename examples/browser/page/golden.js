/** The check that a bundle carries: texts, their token ids, and the vectors that they must give. */

import { BundleError } from "./bundle.js";

const TIMES = 5; // the limit is so many times as far from 1 as the spread
const ROUNDED = 1e-9; // limits are stored with nine decimals

/**
 * Refuse a limit that is looser than what follows from the spread, by which any vector might pass.
 * @param {object} golden what golden.json holds
 * @param {object} spec what artifact.json holds
 * @throws {BundleError}
 */
export function requireLimit({ spread, tolerance }, spec) {
  const isBits = spec.vectors.endsWith("binary"), metric = isBits ? "min_equal_bits" : "min_cosine";
  const away = Math.max(TIMES * (1 - Math.min(spread.batch, spread.rounding ?? 1)), leastOf(spec, isBits));
  const least = Math.max(isBits ? 0.5 : 0.9, 1 - away) - ROUNDED;
  if (tolerance.metric === metric && least <= tolerance.limit && tolerance.limit <= 1) return;
  throw new BundleError("golden.json has a limit that its spread does not explain; build the bundle again.");
}

/** Return how far from 1 the limit is at least, by the precisions. */
function leastOf({ weights, vectors, dim }, isBits) {
  const isCoarse = weights.endsWith("weight-only");
  if (isBits) return Math.max(isCoarse ? 0.05 : 0.01, 1.5 / dim);
  if (isCoarse || vectors === "int4") return 0.005;
  return weights.startsWith("int") || vectors !== "float32" ? 0.0005 : 1e-6;
}

/**
 * Run the golden texts of a bundle, one by one.
 * @param {import("./model.js").Model} model
 * @returns {Promise<Report>}
 *
 * @typedef {object} Report
 * @property {number} texts how many there are
 * @property {number} sameIds how many became the golden token ids
 * @property {number} vectors how many have a golden vector
 * @property {number} withinLimit how many of those are reproduced
 * @property {number} cosine of the worst vector
 * @property {number} sameCodes share of equal values, 0..1; of floats, it says little
 * @property {{metric: string, limit: number}} tolerance
 * @property {boolean} holds whether all of them agree
 */
export async function checkGolden(model) {
  const { texts, tolerance } = model.golden;
  const withIds = texts.filter(({ text, prompt, ids }) => same(model.tokenize(text, prompt).ids, ids));
  const withVector = texts.filter((each) => each.vector);
  const differences = [];
  for (const { ids, vector } of withVector) {
    differences.push(difference(model.codec, await codeOf(model, ids), vector));
  }
  const within = differences.filter((each) => isWithin(each, tolerance));
  return {
    texts: texts.length,
    sameIds: withIds.length,
    vectors: withVector.length,
    withinLimit: within.length,
    cosine: Math.min(...differences.map((each) => each.cosine)),
    sameCodes: differences.reduce((sum, each) => sum + each.same, 0) / differences.length,
    tolerance,
    holds: withIds.length === texts.length && within.length === withVector.length,
  };
}

/** Return the code that the bundle promises of a text's token ids. */
async function codeOf(model, ids) {
  const vector = await model.run(ids);
  return model.putsOutFloats ? model.codec.encode(vector) : vector;
}

function difference(codec, found, expected) {
  return {
    cosine: cosine(codec.decode(found), codec.decode(expected)),
    same: found.filter((value, i) => value === Math.fround(expected[i])).length / expected.length,
  };
}

/** Return the cosine of vectors of one length; less where their lengths differ, as `verify` has it. */
function cosine(a, b) {
  let apart = 0, both = 0;
  for (let i = 0; i < a.length; i++) {
    apart += (a[i] - b[i]) ** 2;
    both += a[i] ** 2 + b[i] ** 2;
  }
  return both > 0 ? 1 - apart / both : 1;
}

/** Of bits, the cosine says which share is equal. */
function isWithin({ cosine }, { metric, limit }) {
  return metric === "min_equal_bits" ? (1 + cosine) / 2 >= limit : cosine >= limit;
}

function same(a, b) {
  return a.length === b.length && a.every((value, i) => value === b[i]);
}
