/** Text to token ids, by tokenizer.json. */

import { Tokenizer } from "./vendor/tokenizers.js";

/**
 * Return the function from a text to its token ids, cut at the maximum length as the runtime cuts:
 * the text's own tokens, so that the special ones around them stay.
 * @param {object} stored what tokenizer.json holds
 * @returns {(text: string) => {ids: number[], truncated: boolean}}
 */
export function tokenizerOf(stored) {
  const tokenizer = new Tokenizer(stored, {});
  const { before, after } = specialsOf(tokenizer);
  const room = stored.truncation.max_length - before.length - after.length;
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
