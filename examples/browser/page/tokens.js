/** Text to token ids, by tokenizer.json. */

import { BundleError } from "./bundle.js";
import { Tokenizer } from "./vendor/tokenizers.js";

/**
 * Return the function from a text to its token ids, cut at the maximum length as the runtime cuts:
 * the text's own tokens, so that the special ones around them stay.
 * @param {object} stored what tokenizer.json holds
 * @param {number} length tokens at most, specials included, as artifact.json says
 * @returns {(text: string) => {ids: number[], truncated: boolean}}
 * @throws {BundleError} when it cuts elsewhere, or pads
 */
export function tokenizerOf(stored, length) {
  if (stored.truncation?.max_length !== length || stored.padding) {
    throw new BundleError(`tokenizer.json does not cut at ${length} tokens, or pads; build the bundle again.`);
  }
  const tokenizer = new Tokenizer(stored, {});
  const { before, after } = specialsOf(tokenizer);
  const room = length - before.length - after.length;
  return (text) => {
    const own = idsOf(tokenizer, text, false);
    return { ids: [...before, ...own.slice(0, room), ...after], truncated: own.length > room };
  };
}

/** Find out what is put around a text. */
function specialsOf(tokenizer) {
  const own = idsOf(tokenizer, "a", false), all = idsOf(tokenizer, "a", true);
  const start = all.findIndex((_, i) => own.every((id, j) => all[i + j] === id));
  return { before: all.slice(0, start), after: all.slice(start + own.length) };
}

function idsOf(tokenizer, text, specials) {
  return tokenizer.encode(text, { add_special_tokens: specials }).ids;
}
