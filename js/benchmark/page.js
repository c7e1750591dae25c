// Times transformers.js with the last member, the cascade, and the cascade with all members on every text, in turn.

import { Cascade } from "cascade-rt";
import { env, pipeline } from "@huggingface/transformers";
import * as ort from "onnxruntime-web/wasm";

const { texts, thresholds, rounds } = await (await fetch("settings.json")).json();
ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", location).href };
ort.env.wasm.numThreads = 1;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "models/";
env.backends.onnx.wasm.wasmPaths = new URL("transformers/", location).href;
env.backends.onnx.wasm.numThreads = 1;

const timed = async (task) => {
  const started = performance.now();
  const result = await task();
  return [result, performance.now() - started];
};

const load = {
  "cascade-rt": () => Cascade.load({ model: "cascade.onnx", tokenizer: "tokenizer.json", ort }),
  "transformers.js": () => pipeline("text-classification", "big", { device: "wasm", dtype: "q8" }),
};
const start = {};
const loaded = {};
for (const [name, task] of Object.entries(load)) [loaded[name], start[name]] = await timed(task);
const cascade = loaded["cascade-rt"];
const alone = cascade.thresholds.map(() => 1);
const last = cascade.members.length - 1;

const ask = {
  "transformers.js, big member": async (text) => (await loaded["transformers.js"](text))[0].label,
  "cascade-rt, cascade": async (text) => (await cascade.classify([text], { thresholds }))[0].label,
  "cascade-rt, all members": async (text) => (await cascade.classify([text], { thresholds: alone }))[0].label,
};
const milliseconds = Object.fromEntries(Object.keys(ask).map((name) => [name, []]));
const labels = {};
for (let round = 0; round <= rounds; round++) {
  for (const [name, task] of Object.entries(ask)) {
    const [found, total] = await timed(async () => {
      const answers = [];
      for (const text of texts) answers.push(await task(text));
      return answers;
    });
    labels[name] = found;
    if (round) milliseconds[name].push(total / texts.length); // the first round warms up
  }
}
const predictions = await cascade.classify(texts, { thresholds });
const exits = cascade.members.map((_, index) => predictions.filter(({ exit }) => exit === index).length);
const layers = predictions.reduce((sum, prediction) => sum + prediction.layers, 0) / texts.length;
window.report = { start, milliseconds, labels, exits, speedup: cascade.members[last].layers / layers };
