// Usage: node check_onnxruntime.mjs FOLDER [onnxruntime-node|onnxruntime-web]
// Runs model.onnx of `export --for onnx` on the golden token ids.
import { readFileSync } from "node:fs";
import { folderOf, judge, packageOf, texts } from "./golden.mjs";

const folder = folderOf("FOLDER [onnxruntime-node|onnxruntime-web]");
const library = process.argv[3] ?? "onnxruntime-node";
const imported = await packageOf(library);
const ort = imported.InferenceSession ? imported : imported.default;
if (library === "onnxruntime-web") ort.env.wasm.numThreads = 1;
const providers = { executionProviders: [library === "onnxruntime-web" ? "wasm" : "cpu"] };
const model = new Uint8Array(readFileSync(`${folder}/model.onnx`));
const session = await ort.InferenceSession.create(model, providers);

const rows = texts(folder);
const vectors = [];
for (const { ids } of rows) {
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values), [1, ids.length]);
  const feeds = { input_ids: tensor(ids.map(BigInt)), attention_mask: tensor(ids.map(() => 1n)) };
  const outputs = await session.run(feeds);
  vectors.push(Array.from(outputs.sentence_embedding.data));
}
judge(library, rows, vectors);
