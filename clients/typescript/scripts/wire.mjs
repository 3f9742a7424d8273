// The TypeScript of the server's JSON Schema: `GET /v1/steering/schema` on stdin, `src/wire.ts` on stdout (`make typescript-wire`).
import { pathToFileURL } from "node:url";
import { text } from "node:stream/consumers";
import { compile } from "json-schema-to-typescript";

const BANNER = "// Generated from the server's JSON Schema of the `steering` field; `make typescript-wire` makes it again.";

/** @param {object} schema */
export async function wire(schema) {
  return compile(untitled(schema, true), "SteeringField", { bannerComment: BANNER, additionalProperties: false });
}

/** Without titles, which would each become a type of its own; the root's is the name that it shall have. */
function untitled(schema, isRoot = false) {
  if (Array.isArray(schema)) return schema.map((item) => untitled(item));
  if (schema === null || typeof schema !== "object") return schema;
  const kept = Object.entries(schema).filter(([name, value]) => name !== "title" || typeof value !== "string");
  const found = Object.fromEntries(kept.map(([name, value]) => [name, untitled(value)]));
  return isRoot ? { ...found, title: "SteeringField" } : found;
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  process.stdout.write(await wire(JSON.parse(await text(process.stdin))));
}
