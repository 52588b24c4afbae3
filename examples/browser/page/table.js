/** Depth 0: a vector is the sum of its tokens' rows in a table, divided by its length. */

import { BundleError } from "./bundle.js";

const { fround } = Math;
const EPSILON = fround(1e-12); // a shorter vector is not made longer
const BLOCK = 32; // dims that share a scale and an offset in int4

/**
 * Return the function from token ids to a normalised vector.
 * @param {Uint8Array} file table.safetensors: a length, a JSON header and the arrays
 * @returns {(ids: number[]) => Float32Array}
 */
export function tableOf(file) {
  const arrays = arraysOf(file);
  const [name, add] = Object.entries(ADDERS).find(([each]) => each in arrays) ?? [];
  if (!name) throw new BundleError("table.safetensors holds no table of token vectors.");
  const [rows, width] = arrays[name].shape;
  const dim = name === "packed" ? width * BLOCK : width;
  return (ids) => {
    const wrong = ids.find((id) => id >= rows);
    if (wrong !== undefined) throw new BundleError(`Token ${wrong} lies beyond the ${rows} rows of the table.`);
    const sum = new Float32Array(dim);
    for (const id of ids) add(arrays, id, sum);
    const length = fround(Math.sqrt(sum.reduce((total, value) => total + value * value, 0)));
    return sum.map((value) => value / Math.max(length, EPSILON));
  };
}

/** By an array that only this precision has: add a token's row to a sum. */
const ADDERS = {
  rows({ rows }, id, sum) {
    for (let i = 0; i < sum.length; i++) sum[i] += rows.at(id * sum.length + i);
  },
  codes({ codes, scale }, id, sum) {
    const step = scale.at(id);
    for (let i = 0; i < sum.length; i++) sum[i] += fround(codes.at(id * sum.length + i) * step);
  },
  packed({ packed, scale, offset }, id, sum) {
    for (let i = 0; i < sum.length; i++) {
      const block = (id * sum.length + i - (i % BLOCK)) / BLOCK, half = BLOCK / 2;
      const byte = packed.at(block * half + (i % half));
      const code = i % BLOCK < half ? byte & 15 : byte >> 4; // code i of a block below code i + 16
      sum[i] += fround(fround(code * scale.at(block)) + offset.at(block));
    }
  },
};

const READERS = {
  F32: (view) => (i) => view.getFloat32(4 * i, true),
  F16: (view) => (i) => halfFloat(view.getUint16(2 * i, true)),
  I8: (view) => (i) => view.getInt8(i),
  U8: (view) => (i) => view.getUint8(i),
};

function arraysOf(file) {
  const size = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + size)));
  const start = file.byteOffset + 8 + size;
  return Object.fromEntries(Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
    return [name, { shape, at: READERS[dtype](new DataView(file.buffer, start + from, to - from)) }];
  }));
}

function halfFloat(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
