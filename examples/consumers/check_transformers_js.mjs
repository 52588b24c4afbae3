// Usage: node check_transformers_js.mjs FOLDER
// Texts that are cut are left out of the verdict: transformers.js drops their end token.
import { folderOf, judge, packageOf, texts } from "./golden.mjs";

const folder = folderOf("FOLDER");
const { env, pipeline } = await packageOf("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = "/";
const extract = await pipeline("feature-extraction", folder);
const rows = texts(folder);
const encode = async (some, pooling) =>
  (await extract(some.map((row) => row.input), { pooling, normalize: true })).tolist();

const whole = rows.filter((row) => !row.truncated);
for (const pooling of ["cls", "mean"]) {
  judge(`transformers.js ${env.version}, pooling ${pooling}`, whole, await encode(whole, pooling));
}
const cut = rows.filter((row) => row.truncated);
if (cut.length) {
  const ids = extract.tokenizer(cut[0].input, { truncation: true }).input_ids.tolist()[0].map(Number);
  const ends = [ids.at(-1), cut[0].ids.at(-1)];
  console.log(`${cut.length} texts that are cut end in token ${ends[0]} where the model has ${ends[1]}`);
}
