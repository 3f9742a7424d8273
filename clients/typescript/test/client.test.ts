/** What the cases of all languages do not say: streams in odd pieces, aborts, time limits, and misuse from plain JavaScript. */

import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { createServer } from "node:net";
import { expect, test } from "vitest";
import { CallError, InvalidSteeringError, Steering, Trimtab, latent, requireApplied } from "../src/index.js";
import { chatReply, events, json, serving } from "./scripted.js";

const HI = { model: "m", messages: [{ role: "user", content: "Hi" }] };
const CALM = new Steering({ bundle: "calm" });
const APPLIED = { status: "applied", plan: "sha256:01", bundles: ["calm"], completion_tokens: 2, hook_points: {} };

test("the body says what was asked, with the key and nothing of the client's own", async () => {
  let seen: any;
  const url = await serving((request, response, body) => {
    seen = { url: request.url, key: request.headers.authorization, body: JSON.parse(body) };
    json(chatReply(APPLIED))(request, response, body);
  });
  const client = new Trimtab(`${url}/v1/`, { apiKey: "tt-1" });
  const reply = await client.chat.completions.create({ ...HI, steering: CALM, top_k: 1 });
  expect(seen).toEqual({ url: "/v1/chat/completions", key: "Bearer tt-1", body: { ...HI, top_k: 1, steering: { bundle: "calm" } } });
  expect(reply.choices[0]?.message.content).toBe("Paris.");
  expect(reply._request_id).toBe("req-7");
  expect(requireApplied(reply)).toEqual(reply.steering);
});

test("a steering field that is a plain object is held to its proof too", async () => {
  const client = new Trimtab(await serving(json(chatReply(null))));
  const reply = client.chat.completions.create({ ...HI, steering: { bundle: "calm" } });
  await expect(reply).rejects.toMatchObject({ code: "steering_not_applied" });
});

test("an unsteered reply of a foreign server can be read, but not its proof", async () => {
  const reply = await new Trimtab(await serving(json(chatReply(null)))).chat.completions.create(HI);
  expect(() => reply.steering).toThrow("no Trimtab server");
});

test("a stream is read whatever the pieces it comes in", async () => {
  const chunk = (content: string, steering?: object) => JSON.stringify({ choices: [{ index: 0, delta: { content } }], steering });
  const bytes = Buffer.from(`: hello\r\ndata: ${chunk("Größe")}\r\n\r\ndata: ${chunk(" 🙂", APPLIED)}\n\ndata:[DONE]\n\n`);
  const url = await serving(async (_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8" });
    for (const byte of bytes) {
      response.write(Buffer.of(byte));
      await new Promise(setImmediate);
    }
    response.end();
  });
  const stream = await new Trimtab(url).chat.completions.create({ ...HI, steering: CALM, stream: true });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content;
  expect(text).toBe("Größe 🙂");
  expect(stream.steering.completion_tokens).toBe(2);
});

test("an unsteered stream that ends early is an error too", async () => {
  const client = new Trimtab(await serving(events('{"choices": []}')));
  const stream = await client.completions.create({ model: "m", prompt: "Hi", stream: true });
  await expect(drained(stream)).rejects.toMatchObject({ code: "connection", message: expect.stringContaining("ended early") });
});

test.each(["break", "abort", "close"])("the server sees the end of a stream that is left by %s", async (how) => {
  let left!: Promise<unknown>;
  const url = await serving((_, response) => {
    left = once(response, "close");
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write('data: {"choices": []}\n\n');
  });
  const controller = new AbortController();
  const stream = await new Trimtab(url).chat.completions.create({ ...HI, stream: true }, { signal: controller.signal });
  const read = async () => {
    for await (const _ of stream) {
      if (how === "break") break;
      if (how === "close") stream.close();
      else controller.abort();
    }
  };
  if (how === "break") await read();
  else await expect(read()).rejects.toMatchObject({ name: "AbortError" });
  await left;
});

test("a call ends when its signal says so, also while it waits to ask again, with the signal's reason", async () => {
  let requests = 0;
  const url = await serving((request, response, body) => {
    requests++;
    json({ error: { message: "later" } }, 503, { "retry-after": "30" })(request, response, body);
  });
  const reason = new Error("enough");
  const controller = new AbortController();
  setTimeout(() => controller.abort(reason), 50);
  await expect(new Trimtab(url).chat.completions.create(HI, { signal: controller.signal })).rejects.toBe(reason);
  await expect(new Trimtab(url).chat.completions.create(HI, { signal: controller.signal })).rejects.toBe(reason);
  expect(requests).toBe(1);
});

test("a reply that takes too long is a time-out, and was asked for again", async () => {
  let requests = 0;
  const url = await serving(() => void requests++);
  const client = new Trimtab(url, { timeout: 50, maxRetries: 1 });
  await expect(client.chat.completions.create(HI)).rejects.toMatchObject({ code: "timeout" });
  expect(requests).toBe(2);
});

test("a fetch of one's own is called as a function, as a browser's must be", async () => {
  const own = async function (this: unknown) {
    expect(this).toBeUndefined();
    return new Response('{"data": []}');
  };
  expect(await new Trimtab("http://fake", { fetch: own }).steering.bundles()).toEqual([]);
});

test("where nobody listens, the error says so", async () => {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as { port: number };
  server.close();
  const thrown = await new Trimtab(`http://127.0.0.1:${port}`, { maxRetries: 0 }).steering.bundles().catch((e) => e);
  expect(thrown).toBeInstanceOf(CallError);
  expect(thrown).toMatchObject({ code: "connection", message: expect.stringContaining("is the server running?") });
});

test("a stream that was asked for and did not come is an error, not an empty reply", async () => {
  const client = new Trimtab(await serving(json(chatReply(APPLIED))));
  const stream = client.chat.completions.create({ ...HI, stream: true });
  await expect(stream).rejects.toMatchObject({ code: "unreadable" });
});

test("answers of something else than a Trimtab server are errors", async () => {
  const client = new Trimtab(await serving(json({ hello: "world" })));
  await expect(client.steering.bundles()).rejects.toThrow("Trimtab server");
  await expect(client.steering.validate(CALM)).rejects.toThrow("Trimtab server");
});

test("an arm that is no arm is refused, and not run unsteered", async () => {
  const arm: any = { bundle: "calm" };
  await expect(new Trimtab("http://127.0.0.1:1").compare({ arm }, HI)).rejects.toBeInstanceOf(InvalidSteeringError);
});

test("an arm without proof is an error that names it", async () => {
  const piece = (name: string, chunk: object) => JSON.stringify({ arm: 0, name, seed: 5, chunk });
  const said = { choices: [{ index: 0, delta: { content: "Hm." }, finish_reason: "stop" }], steering: { status: "not_requested" } };
  const client = new Trimtab(await serving(events(piece("control", said), piece("calm", said), "[DONE]")));
  await expect(client.compare({ control: null, calm: CALM }, HI)).rejects.toThrow('arm "calm": the reply was not steered');
  const whole = await client.compare({ control: null, calm: CALM.at(0) }, HI);
  expect(whole).toMatchObject({ seed: 5, arms: { control: { text: "Hm.", finish_reason: "stop" } } });
});

test("edits are values: a method gives a new one", () => {
  const clamp = latent("calm", 1).clamp(0);
  expect(clamp.during("completion").toJSON()).not.toEqual(clamp.toJSON());
  expect(clamp.during("completion").during("all").toJSON()).toEqual(clamp.toJSON());
  expect(clamp.at(2).at(1).toJSON()).toEqual(clamp.toJSON());
  expect(() => clamp.at(Infinity)).toThrow(InvalidSteeringError);
});

test("the package is imported and required under its own name", () => {
  const run = (...code: string[]) => execFileSync(process.execPath, code, { encoding: "utf8", cwd: new URL("..", import.meta.url) });
  const print = "console.log(JSON.stringify(new Steering({ bundle: 'calm' })))";
  const found = '{"bundle":"calm"}\n';
  expect(run("--input-type=module", "-e", `import { Steering } from "trimtab"; ${print}`)).toBe(found);
  expect(run("--input-type=commonjs", "-e", `const { Steering } = require("trimtab"); ${print}`)).toBe(found);
});

async function drained(stream: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of stream);
}
