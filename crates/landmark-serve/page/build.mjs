// Makes dist/, which the binary embeds: document, script, style sheet and icon, and the hash of what they were made of, which a test of the crate compares.
import { createHash } from "node:crypto";
import { copyFileSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

rmSync("dist", { recursive: true, force: true });
await build({
  entryPoints: ["src/page.tsx", "src/page.css"],
  outdir: "dist",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  // light-dark() and nesting are left to browsers, which have them.
  supported: { "nesting": true },
  legalComments: "eof",
});
for (const name of ["index.html", "icon.svg"]) copyFileSync("src/" + name, "dist/" + name);
const hash = createHash("sha256");
const paths = [...readdirSync("src").map((name) => "src/" + name), "build.mjs", "package-lock.json"].sort();
for (const path of paths) hash.update(path + "\n").update(readFileSync(path));
writeFileSync("dist/sources.sha256", hash.digest("hex") + "\n");
