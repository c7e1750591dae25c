// The demo page in Chromium, with the toy cascade: download, answers, exits, errors. Skipped without Chromium.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

import { chromiumPath } from "./chromium.js";
import { serve } from "./server.js";

const skip = chromiumPath ? false : "no Chromium; install it or set CHROMIUM";
const here = (name) => fileURLToPath(new URL(name, import.meta.url));

let server;
let browser;
let root;

before(async () => {
  if (skip) return;
  const fixture = here("fixture/texts");
  execFileSync(process.execPath, [here("../demo/build.js"), `${fixture}/cascade.onnx`, `${fixture}/tokenizer.json`]);
  server = await serve(here("../demo/dist/"));
  root = server.root;
  browser = await chromium.launch({ executablePath: chromiumPath, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  server?.close();
});

async function open(context) {
  const page = await browser.newPage();
  context.after(() => page.close());
  const problems = [];
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("request", (request) => request.url().startsWith(root) || problems.push(`asked for ${request.url()}`));
  return { page, problems };
}

test("the page answers as the Python package, and shows who answered", { skip }, async (context) => {
  const { page, problems } = await open(context);
  await page.goto(root);
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Ready"));
  assert.equal(await page.locator("#tau").textContent(), "0.80");
  const { texts, answers } = JSON.parse(await readFile(here("fixture/texts/answers.json"), "utf8"));
  const some = texts.map((text, row) => [text, answers["0.8"][row]]).filter(([text]) => text);
  await page.locator("#texts").fill(some.map(([text]) => text).join("\n"));
  await page.locator("#classify").click();
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("layer speed-up"));
  const rows = await page.locator("#answers tr").evaluateAll((found) => found.map((row) => [...row.cells].map((cell) => cell.textContent)));
  const names = ["tiny", "small", "big"];
  assert.deepEqual(
    rows,
    some.map(([text, { label, probabilities, exit, layers }]) => {
      return [text, label, Math.max(...probabilities).toFixed(3), names[exit], String(layers)];
    }),
  );
  await page.locator("#threshold").fill("0");
  await page.locator("#classify").click();
  await page.waitForFunction(() => document.querySelectorAll("#answers tr[data-exit]:not([data-exit='0'])").length === 0);
  assert.deepEqual(problems, []);
});

test("an isolated page runs on several threads", { skip }, async (context) => {
  const isolated = { "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp" };
  const other = await serve(here("../demo/dist/"), isolated);
  context.after(other.close);
  const { page } = await open(context);
  await page.goto(other.root);
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Ready"));
  const threads = await page.evaluate(() => navigator.hardwareConcurrency);
  assert.match(await page.locator("#status").textContent(), new RegExp(`, ${threads} thread`));
  await page.locator("#classify").click();
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("layer speed-up"));
  assert.equal(await page.locator("#answers tr").count(), 5);
});

test("a model that is missing is named", { skip }, async (context) => {
  const { page } = await open(context);
  await page.route("**/cascade.onnx", (route) => route.fulfill({ status: 404 }));
  await page.goto(root);
  await page.waitForFunction(() => /cascade.onnx answered 404/.test(document.getElementById("status").textContent));
  assert.ok(await page.locator("#classify").isDisabled());
});
