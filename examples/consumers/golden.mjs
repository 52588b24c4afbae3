// What an exported folder must give: its golden.json, and how a program's vectors are judged.
import { existsSync, readFileSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";

const MIN_COSINE = 0.999;

function stop(sentence) {
  console.error(sentence);
  process.exit(2);
}

/** Return the exported folder that the command line names; without one, exit with 2. */
export function folderOf(usage) {
  const folder = process.argv[2];
  if (!folder) stop(`usage: node ${basename(process.argv[1])} ${usage}`);
  if (!existsSync(`${folder}/golden.json`)) stop(`${folder} has no golden.json; name an exported folder`);
  return resolve(folder);
}

/** Return a package of npm; where it is missing, name the command that installs it and exit with 2. */
export async function packageOf(name) {
  return import(name).catch((error) => {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    stop(`${name} is not installed; run: npm install --prefix ${dirname(process.argv[1])} ${name}`);
  });
}

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
