// Times in the browser and in Node:
// node benchmark/run.js CASCADE.onnx TOKENIZER.json BIG TEXTS.tsv OUTPUT.json [--tau T] [--rounds N]
//
// BIG is a folder as transformers.js reads it: config.json, tokenizer.json, tokenizer_config.json, and
// onnx/model_quantized.onnx. TEXTS.tsv has a text and its label on each line. Needs Chromium, and
// `npm install --no-save @huggingface/transformers@4.3.2`.

import { build } from "esbuild";
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { existsSync } from "node:fs";
import { cpus } from "node:os";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import ort from "onnxruntime-node";
import { chromium } from "playwright-core";

import { Cascade } from "../dist/index.js";
import { chromiumPath } from "../test/chromium.js";
import { serve } from "../test/server.js";

const options = { tau: { type: "string" }, rounds: { type: "string", default: "5" } };
const { values, positionals } = parseArgs({ options, allowPositionals: true });
const [model, tokenizer, big, texts, output] = positionals;
if (!output) {
  console.error("expected CASCADE.onnx TOKENIZER.json BIG TEXTS.tsv OUTPUT.json");
  process.exit(2);
}

const at = (name) => fileURLToPath(new URL(name, import.meta.url));
const target = at("dist/");
await rm(target, { recursive: true, force: true });
await mkdir(`${target}models`, { recursive: true });
await build({
  entryPoints: [at("page.js")],
  outdir: target,
  bundle: true,
  format: "esm",
  alias: { "cascade-rt": at("../dist/index.js") },
  logLevel: "warning",
});
await writeFile(`${target}index.html`, '<!doctype html><title>times</title><script type="module" src="page.js"></script>');
await cp(model, `${target}cascade.onnx`);
await cp(tokenizer, `${target}tokenizer.json`);
await cp(big, `${target}models/big`, { recursive: true });
const wasm = "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm";
await cp(at(`../node_modules/${wasm}`), `${target}ort-wasm-simd-threaded.wasm`);
const own = at("../node_modules/@huggingface/transformers/node_modules/onnxruntime-web/dist");
await cp(existsSync(own) ? own : at("../node_modules/onnxruntime-web/dist"), `${target}transformers`, { recursive: true });
const examples = (await readFile(texts, "utf8")).split("\n").filter(Boolean);
const gold = examples.map((line) => line.split("\t")[1]);
const settings = {
  texts: examples.map((line) => line.split("\t")[0]),
  thresholds: values.tau && Number(values.tau),
  rounds: Number(values.rounds),
};
await writeFile(`${target}settings.json`, JSON.stringify(settings));

const server = await serve(target);
const browser = await chromium.launch({ executablePath: chromiumPath, args: ["--no-sandbox"] });
const chromiumVersion = browser.version();
const page = await browser.newPage();
page.on("pageerror", (error) => console.error(error.message));
await page.goto(server.root);
await page.waitForFunction(() => window.report, null, { timeout: 600_000 });
const { labels, ...report } = await page.evaluate(() => window.report);
await browser.close();
server.close();
report.milliseconds["cascade-rt, cascade, in Node"] = await inNode();
const version = async (name) => JSON.parse(await readFile(at(`../node_modules/${name}/package.json`), "utf8")).version;
report.machine = { processor: cpus()[0].model, cpus: cpus().length, browser: `Chromium ${chromiumVersion}`, node: process.version };
report.packages = {};
for (const name of ["onnxruntime-web", "onnxruntime-node", "@huggingface/transformers"]) report.packages[name] = await version(name);
report.threads = 1;
report.texts = settings.texts.length;
report.accuracy = Object.fromEntries(Object.entries(labels).map(([name, found]) => [name, share(found, gold)]));
const [theirs, ours, all] = Object.values(labels);
report.labels_equal = { cascade: share(theirs, ours), "all members": share(theirs, all) };
await writeFile(output, `${JSON.stringify(report, null, 2)}\n`);
for (const [name, found] of Object.entries(report.milliseconds)) {
  const sorted = [...found].sort((one, other) => one - other);
  const median = sorted[Math.floor(sorted.length / 2)];
  console.log(`${name}: ${median.toFixed(2)} ms a text (${sorted[0].toFixed(2)}-${sorted.at(-1).toFixed(2)})`);
}
console.log("start, ms:", report.start, "exits:", report.exits, "layer speed-up:", report.speedup, report.labels_equal, report.accuracy);

/** Time the cascade in this process, on one thread: milliseconds a text, for each round after the first. */
async function inNode() {
  const [modelBytes, tokenizerBytes] = await Promise.all([readFile(model), readFile(tokenizer)]);
  const sessionOptions = { intraOpNumThreads: 1 };
  const cascade = await Cascade.load({ model: modelBytes, tokenizer: tokenizerBytes, ort, sessionOptions });
  const found = [];
  for (let round = 0; round <= settings.rounds; round++) {
    const started = performance.now();
    for (const text of settings.texts) await cascade.classify([text], { thresholds: settings.thresholds });
    if (round) found.push((performance.now() - started) / settings.texts.length);
  }
  await cascade.release();
  return found;
}

function share(some, others) {
  return some.filter((label, row) => label === others[row]).length / some.length;
}
