/** The check that a bundle carries: texts, their token ids, and the vectors that they must give. */

import { cosine } from "./codecs.js";

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
  const a = codec.decode(found), b = codec.decode(expected);
  return {
    cosine: cosine(a, b),
    same: found.filter((value, i) => value === Math.fround(expected[i])).length / expected.length,
    largest: Math.max(...a.map((value, i) => Math.abs(value - b[i]))),
  };
}

/** Of bits, the cosine says which share is equal. */
function isWithin({ cosine, largest }, { metric, limit }) {
  if (metric === "min_cosine") return cosine >= limit;
  if (metric === "min_equal_bits") return (1 + cosine) / 2 >= limit;
  return metric === "max_difference" && largest <= limit;
}

function same(a, b) {
  return a.length === b.length && a.every((value, i) => value === b[i]);
}
