// The answers of the Python package, from ONNX Runtime in Node, and clear errors.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import ort from "onnxruntime-node";
import * as web from "onnxruntime-web/wasm";

import { Cascade, CascadeError } from "../dist/index.js";
import { serve } from "./server.js";

const folder = new URL("./fixture/", import.meta.url);
const read = (name) => readFile(new URL(name, folder));
const load = async (name, options = {}) =>
  Cascade.load({ model: await read(`${name}/cascade.onnx`), tokenizer: await read(`${name}/tokenizer.json`), ort, ...options });

web.env.wasm.numThreads = 1;
const bundles = ["texts", "pairs", "several", "int8", "zero", "zero-pairs"].map((name) => [name, ort, ""]);
bundles.push(...["zero", "zero-pairs"].map((name) => [name, web, " in WebAssembly, as in browsers"]));

for (const [name, runtime, where] of bundles) {
  test(`${name}: answers are those of the Python package${where}`, async () => {
    const cascade = await load(name, { ort: runtime });
    const { texts, answers } = JSON.parse(await read(`${name}/answers.json`));
    for (const [tau, expected] of Object.entries(answers)) {
      const thresholds = cascade.thresholds.map(() => Number(tau));
      const found = await cascade.classify(texts, { thresholds });
      found.forEach(({ score, probabilities, ...answer }, row) => {
        const { probabilities: other, ...rest } = expected[row];
        assert.deepEqual(answer, rest);
        probabilities.forEach((value, label) => assert.ok(Math.abs(value - other[label]) < 1e-5));
        assert.equal(score, Math.max(...probabilities));
      });
    }
    assert.ok(new Set(answers["0.8"].map(({ exit }) => exit)).size > 1);
    await cascade.release();
  });
}

test("several labels per text: each text has those above their cut, possibly none", async () => {
  const cascade = await load("several");
  const { texts } = JSON.parse(await read("several/answers.json"));
  const sizes = new Set((await cascade.classify(texts)).map(({ labels }) => labels.length));
  assert.equal(cascade.task, "multi_label");
  assert.ok(sizes.has(0) && sizes.has(2));
});

test("a text that leaves at a member without layers ran none", async () => {
  const cascade = await load("zero");
  const { texts } = JSON.parse(await read("zero/answers.json"));
  assert.deepEqual(cascade.members[0], { name: "DAN", layers: 0 });
  const answers = await cascade.classify(texts);
  assert.deepEqual([...new Set(answers.map(({ exit }) => exit))].sort(), [0, 1, 2, 3]);
  assert.ok(answers.every(({ exit, layers }) => (exit === 0) === (layers === 0)));
  for (const [row, text] of texts.entries()) assert.deepEqual((await cascade.classify([text]))[0].exit, answers[row].exit);
});

test("what a cascade says about itself, and its default thresholds", async () => {
  const cascade = await load("texts");
  assert.deepEqual(cascade.labels, ["bad", "fine", "good"]);
  assert.deepEqual(cascade.members.map(({ name }) => name), ["tiny", "small", "big"]);
  assert.deepEqual(cascade.thresholds, [0.8, 0.8]);
  const { texts } = JSON.parse(await read("texts/answers.json"));
  assert.deepEqual(await cascade.classify(texts), await cascade.classify(texts, { thresholds: 0.8 }));
});

test("calls at the same time are answered one after another, and no texts give no answers", async () => {
  let running = 0;
  const InferenceSession = {
    async create(...given) {
      const session = await ort.InferenceSession.create(...given);
      const run = async (feeds) => {
        assert.equal(running++, 0, "another run is not over");
        await new Promise((resolve) => setTimeout(resolve, 5));
        const found = await session.run(feeds);
        running--;
        return found;
      };
      return { run, release: () => session.release() };
    },
  };
  const cascade = await load("texts", { ort: { ...ort, InferenceSession } });
  const { texts } = JSON.parse(await read("texts/answers.json"));
  const alone = await cascade.classify(texts);
  const calls = [cascade.classify(texts), cascade.classify(texts.slice(0, 1)), cascade.classify([])];
  const released = cascade.release(); // after the calls before
  const [whole, one, none] = await Promise.all(calls);
  await Promise.all([released, cascade.release()]);
  assert.deepEqual(whole, alone);
  assert.deepEqual([one[0].label, one[0].exit, none], [alone[0].label, alone[0].exit, []]);
  await assert.rejects(cascade.classify(texts), /this cascade is released; load it again/);
});

test("bad input gets one clear error", async () => {
  const cascade = await load("texts");
  const pairs = await load("pairs");
  const cases = [
    [cascade, ["fine", 7], {}, /text 1: found a value of type number, expected a text/],
    [cascade, [["a", "b"]], {}, /text 0: found an array of 2, expected a text/],
    [cascade, [null], {}, /text 0: found null, expected a text/],
    [cascade, "a film", {}, /texts: found string, expected an array of texts/],
    [cascade, ["a \ud800 b"], {}, /text 0: found half a surrogate pair, expected Unicode text/],
    [cascade, ["a ".repeat(2 ** 20)], {}, /text 0: found 2097152 characters, expected at most 1048576; shorten it/],
    [cascade, ["a"], { thresholds: 1.5 }, /thresholds: found 1.5, expected a number from 0 to 1, or 2/],
    [cascade, new Array(2), {}, /text 0: found undefined, expected a text/],
    [cascade, ["a"], { thresholds: NaN }, /thresholds: found NaN, expected a number from 0 to 1/],
    [cascade, ["a"], { thresholds: [0.5] }, /thresholds: found \[0.5\], expected/],
    [cascade, ["a"], { thresholds: [0.5, "1"] }, /thresholds: found \[0.5,"1"\], expected/],
    [pairs, ["a film"], {}, /text 0: found a single text, expected a pair of texts/],
  ];
  for (const [on, texts, options, message] of cases) {
    await assert.rejects(on.classify(texts, options), (error) => error instanceof CascadeError && message.test(error.message));
  }
});

/** Return a model whose metadata can be read, but not its operators. */
function broken(model) {
  const bytes = Uint8Array.from(model);
  const at = Buffer.from(bytes.buffer).indexOf("LayerNormalization");
  return bytes.fill(120, at, at + 5);
}

test("files that cannot be used get one clear error", async () => {
  const model = await read("texts/cascade.onnx");
  const tokenizer = await read("texts/tokenizer.json");
  const cases = [
    [await read("texts/tiny.onnx"), tokenizer, /found no cascade in its metadata; expected an ONNX file that cascade-rt pack/],
    [model.subarray(0, model.length - 100), tokenizer, /not a readable ONNX file|found no cascade/],
    [broken(model), tokenizer, /model: ONNX Runtime cannot load it \(/],
    [new TextEncoder().encode("<!doctype html>"), tokenizer, /not a readable ONNX file; expected/],
    [model, await read("right/tokenizer.json"), /tokenizer: not the one that the model was packed with; take tokenizer.json/],
  ];
  for (const [bytes, file, message] of cases) {
    await assert.rejects(Cascade.load({ model: bytes, tokenizer: file, ort }), message);
  }
});

test("without ONNX Runtime, and for addresses of files, an error says what to do", async () => {
  const model = await read("texts/cascade.onnx");
  const tokenizer = await read("texts/tokenizer.json");
  await assert.rejects(Cascade.load({ model, tokenizer }), /ort: found none, expected the module onnxruntime-node or/);
  const address = new URL("texts/cascade.onnx", folder);
  await assert.rejects(Cascade.load({ model: address, tokenizer, ort }), /model: found file:.*, expected bytes or a web/);
});

test("files are fetched, with their progress, and a missing one is named", async (context) => {
  const server = await serve(fileURLToPath(folder));
  context.after(server.close);
  const root = `${server.root}texts`;
  const seen = [];
  const cascade = await Cascade.load({
    model: `${root}/cascade.onnx`,
    tokenizer: new URL(`${root}/tokenizer.json`),
    ort,
    onProgress: (received, total) => seen.push([received, total]),
  });
  assert.equal((await cascade.classify(["the film is good"])).length, 1);
  const size = (await read("texts/cascade.onnx")).length;
  assert.deepEqual(seen.at(-1), [size, size]);
  assert.ok(seen.every(([received], at) => at === 0 || received > seen[at - 1][0]));
  const tokenizer = await read("texts/tokenizer.json");
  await assert.rejects(Cascade.load({ model: `${root}/none.onnx`, tokenizer, ort }), /model: http.*none.onnx answered 404/);
  server.close();
  await assert.rejects(Cascade.load({ model: "http://127.0.0.1:9/", tokenizer, ort }), (error) => {
    return error instanceof CascadeError && /model: cannot fetch http.* \(.+\)/.test(error.message);
  });
});
