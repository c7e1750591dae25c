// Where Chromium is, for tests and benchmarks; undefined without one.

import { existsSync } from "node:fs";

export const chromiumPath = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/google-chrome"].find(existsSync);
