// What an exported folder must give: its golden.json, and how a program's vectors are judged.
import { readFileSync } from "node:fs";

const MIN_COSINE = 0.999;

/** Return the golden texts of an exported folder. */
export function texts(folder) {
  return JSON.parse(readFileSync(`${folder}/golden.json`, "utf8")).texts;
}

function cosine(a, b) {
  let [product, one, two] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    product += a[i] * b[i];
    one += a[i] * a[i];
    two += b[i] * b[i];
  }
  return a.length === b.length ? product / Math.sqrt(one * two) : NaN;
}

/** Print how near vectors are to the golden ones; exit with 1 where they are others. */
export function judge(program, rows, vectors) {
  const smallest = Math.min(...rows.map((row, i) => cosine(row.vector, vectors[i])));
  console.log(`${program}: ${rows.length} golden texts, smallest cosine ${smallest.toFixed(6)}`);
  if (!(smallest >= MIN_COSINE)) {
    console.error(`${program}: ${MIN_COSINE} is needed`);
    process.exitCode = 1;
  }
}
