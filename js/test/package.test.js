// The package as npm packs it: its files, and that it works in a project of its own.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readFile, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const run = promisify(execFile);
const root = fileURLToPath(new URL("..", import.meta.url));

test("the packed package has what a project needs, and nothing else", async () => {
  const project = await mkdtemp(join(tmpdir(), "cascade-rt-"));
  try {
    const { stdout } = await run("npm", ["pack", "--json", "--ignore-scripts", "--pack-destination", project], { cwd: root });
    const [{ filename, files }] = JSON.parse(stdout);
    const paths = files.map(({ path }) => path);
    const others = paths.filter((path) => !/^dist\/\w+\.(js|d\.ts)$/.test(path));
    assert.deepEqual(others.sort(), ["LICENSE", "README.md", "package.json"]);
    assert.ok(paths.includes("dist/index.js") && paths.includes("dist/index.d.ts"));

    const modules = join(project, "node_modules");
    await mkdir(join(modules, "cascade-rt"), { recursive: true });
    await run("tar", ["-xzf", join(project, filename), "-C", join(modules, "cascade-rt"), "--strip-components=1"]);
    const { dependencies, peerDependencies } = JSON.parse(await readFile(join(modules, "cascade-rt", "package.json")));
    for (const name of [...Object.keys({ ...dependencies, ...peerDependencies }), "onnxruntime-node"]) {
      await mkdir(dirname(join(modules, name)), { recursive: true });
      await symlink(join(root, "node_modules", name), join(modules, name));
    }
    const program = `
      import { readFile } from "node:fs/promises";
      import ort from "onnxruntime-node";
      import { Cascade } from "cascade-rt";
      const [folder] = process.argv.slice(1);
      const read = (name) => readFile(folder + name);
      const cascade = await Cascade.load({ model: await read("cascade.onnx"), tokenizer: await read("tokenizer.json"), ort });
      const { texts } = JSON.parse(await read("answers.json"));
      const found = await cascade.classify(texts, { thresholds: cascade.thresholds.map(() => 0.8) });
      console.log(JSON.stringify(found.map(({ label }) => label)));`;
    const fixture = fileURLToPath(new URL("./fixture/texts/", import.meta.url));
    const answer = await run("node", ["--input-type=module", "--eval", program, fixture], { cwd: project });
    const { answers } = JSON.parse(await readFile(join(fixture, "answers.json")));
    assert.deepEqual(JSON.parse(answer.stdout), answers["0.8"].map(({ label }) => label));
  } finally {
    await rm(project, { recursive: true });
  }
});
