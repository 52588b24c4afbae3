/**
 * The stored forms of a vector: its codes, what they stand for, and how alike two of them are.
 *
 * All are computed in float32, as the runtime does; Math.fround rounds to it.
 */

const { fround } = Math;
const SYMMETRIC = 127;

/**
 * By precision: the array that codes are in, and between which values and levels they translate. A
 * level of a packed precision takes `bits` of a byte.
 */
const FORMS = {
  float32: { Values: Float32Array, bits: 32, level: (x) => x, value: (level) => level },
  int8: {
    Values: Int8Array, bits: 8, top: 255,
    level: (x, i, ranges) => ranges.level(x, i) - 128,
    value: (level, i, ranges) => ranges.middle(level + 128, i),
  },
  "int8-symmetric": {
    Values: Int8Array, bits: 8,
    level: (x) => halfToEven(fround(x * SYMMETRIC)),
    value: (level) => level / SYMMETRIC,
  },
  int4: {
    Values: Uint8Array, bits: 4, top: 15,
    level: (x, i, ranges) => ranges.level(x, i),
    value: (level, i, ranges) => ranges.middle(level, i),
  },
  ubinary: { Values: Uint8Array, bits: 1, level: (x) => (x > 0 ? 1 : 0), value: (level) => 2 * level - 1 },
  binary: { Values: Int8Array, bits: 1, level: (x) => (x > 0 ? 1 : 0), value: (level) => 2 * level - 1 },
};

/** Bits that are set in each byte. */
const POPCOUNT = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll("0", "").length);

/** The frozen range of each dim, in equal levels from 0 to `top`. */
class Ranges {
  constructor({ low, high }, top) {
    this.top = top;
    this.low = Float32Array.from(low);
    this.step = Float32Array.from(high, (value, i) => fround(fround(value) - this.low[i]) / top);
    this.step.forEach((step, i) => { if (step === 0) this.step[i] = 1; });
  }

  level(value, dim) {
    const level = Math.floor(fround(fround(value - this.low[dim]) / this.step[dim]));
    return Math.min(Math.max(level, 0), this.top);
  }

  middle(level, dim) {
    return this.low[dim] + fround((level + 0.5) * this.step[dim]);
  }
}

/** One precision of vectors of one number of dims. */
export class Codec {
  /**
   * @param {string} precision as artifact.json names it
   * @param {number} dim
   * @param {string} bitOrder "big": the first dim of a byte is in its highest bits; or "little"
   * @param {?{low: number[], high: number[]}} ranges what ranges.json holds; of int8 and int4
   */
  constructor(precision, dim, bitOrder, ranges) {
    const { Values, bits, top } = FORMS[precision];
    const perByte = Math.max(1, 8 / bits);
    const place = (i) => (bitOrder === "big" ? perByte - 1 - (i % perByte) : i % perByte);
    Object.assign(this, { precision, dim, perByte, Values, isBits: bits === 1, mask: 2 ** bits - 1 });
    this.width = Math.ceil(dim / perByte); // values of a stored vector
    this.bytes = this.width * Values.BYTES_PER_ELEMENT;
    this.shifts = Uint8Array.from({ length: dim }, (_, i) => place(i) * bits);
    this.offset = precision === "binary" ? 128 : 0; // of bytes that are stored as signed ones
    if (top) this.ranges = new Ranges(ranges, top);
  }

  /**
   * Return the code of a vector.
   * @param {Float32Array} vector of length 1
   * @returns {TypedArray} of `width` values
   */
  encode(vector) {
    const level = (x, i) => FORMS[this.precision].level(x, i, this.ranges);
    if (this.perByte === 1) return this.Values.from(vector, level);
    const bytes = new Uint8Array(this.width);
    vector.forEach((x, i) => { bytes[Math.floor(i / this.perByte)] |= level(x, i) << this.shifts[i]; });
    return this.Values.from(bytes, (byte) => byte - this.offset);
  }

  /**
   * Return what a code stands for, not normalised: the middle of each level, or signs.
   * @param {ArrayLike<number>} code
   * @param {Float32Array} into `dim` values, to be overwritten and returned
   */
  decode(code, into = new Float32Array(this.dim)) {
    const { value } = FORMS[this.precision], { perByte, shifts, mask, offset, ranges } = this;
    for (let i = 0; i < this.dim; i++) {
      const level = perByte === 1 ? code[i] : ((code[Math.floor(i / perByte)] + offset) >> shifts[i]) & mask;
      into[i] = value(level, i, ranges);
    }
    return into;
  }

  /**
   * Return the nearest of many stored vectors, the most alike first, ties by row.
   * @param {TypedArray} query a code
   * @param {TypedArray} codes one after the other
   * @param {number} top how many to return at most
   * @returns {{row: number, similarity: number}[]} cosines of what the codes stand for
   */
  search(query, codes, top) {
    const alike = this.isBits ? this.byBits(query) : this.byCosine(query);
    const found = Array.from({ length: codes.length / this.width }, (_, row) => {
      return { row, similarity: alike(codes.subarray(row * this.width, (row + 1) * this.width)) };
    });
    return found.sort((a, b) => b.similarity - a.similarity || a.row - b.row).slice(0, top);
  }

  /** Bits need not be decoded: the cosine of signs is 1 - 2 * Hamming distance / dim. */
  byBits(query) {
    return (code) => {
      let distance = 0;
      for (let i = 0; i < this.width; i++) distance += POPCOUNT[(query[i] ^ code[i]) & 255];
      return 1 - (2 * distance) / this.dim;
    };
  }

  byCosine(query) {
    const wanted = this.decode(query), found = new Float32Array(this.dim);
    return (code) => cosine(wanted, this.precision === "float32" ? code : this.decode(code, found));
  }
}

/** Return the cosine of two vectors; 1 where both are zero, as those of a text without tokens are. */
function cosine(a, b) {
  let dot = 0, first = 0, second = 0;
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    first += a[i] * a[i];
    second += b[i] * b[i];
  }
  if (first === 0 && second === 0) return 1;
  return dot / (Math.sqrt(first * second) || 1);
}

function halfToEven(value) {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
