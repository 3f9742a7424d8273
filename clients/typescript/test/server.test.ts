/** The client, and the stock `openai` SDK beside it, against the real server at TRIMTAB_URL (`make test-typescript` starts one). */

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { expect, test } from "vitest";
// @ts-expect-error: a script without types
import { wire } from "../scripts/wire.mjs";
import { InvalidSteeringError, Steering, Trimtab, UnknownBundleError, latent, requireApplied, vector } from "../src/index.js";

const URL_ = process.env["TRIMTAB_URL"];
if (!URL_) throw new Error("set TRIMTAB_URL to a server that holds the tests' bundle `calm`, or run `make test-typescript`");
const client = new Trimtab(URL_, { maxRetries: 0 });
const stock = new OpenAI({ baseURL: `${URL_}/v1`, apiKey: "none", maxRetries: 0 });

const ADD = new Steering({ edits: [latent("calm", 7).add(120).during("completion")] });
const HI = {
  model: process.env["TRIMTAB_MODEL"] ?? "smollm2-135m-instruct",
  messages: [{ role: "user" as const, content: "Write one sentence about the sea." }],
  temperature: 0,
  max_tokens: 8,
};
const WHOLE = { ignore_eos: true };

test("a steered reply is typed and proven", async () => {
  const reply = await client.chat.completions.create({ ...HI, ...WHOLE, steering: ADD });
  expect(reply.steering).toMatchObject({ status: "applied", bundles: ["calm"], prompt_tokens: 0, completion_tokens: 8 });
  expect(reply.steering.hook_points["blocks.14.resid_post"]?.max_relative_norm).toBeGreaterThan(0);
  expect(reply.steering.plan).toBe((await client.steering.validate(ADD)).plan);
  const plain = await client.chat.completions.create({ ...HI, ...WHOLE });
  expect(plain.steering.status).toBe("not_requested");
  expect(plain.choices[0]?.message.content).not.toBe(reply.choices[0]?.message.content);
});

test("a stream says the same as the reply in one piece, and ends with its proof", async () => {
  const reply = await client.chat.completions.create({ ...HI, ...WHOLE, steering: ADD });
  const stream = await client.chat.completions.create({ ...HI, ...WHOLE, steering: ADD, stream: true });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
  expect(text).toBe(reply.choices[0]?.message.content);
  expect(stream.steering).toMatchObject({ status: "applied", completion_tokens: 8, plan: reply.steering.plan });
});

test("text completions are steered, by a vector and by a bundle's own edits", async () => {
  const ask = { model: HI.model, prompt: "The sea is", max_tokens: 4, temperature: 0, ...WHOLE };
  const mean = new Steering({ edits: [vector("calm", "mean").add(0.5, { unit: "resid_norm" })] });
  for (const steering of [mean, new Steering({ bundle: "calm", strength: 0.5 })]) {
    const reply = await client.completions.create({ ...ask, steering });
    expect(requireApplied(reply).completion_tokens).toBe(4);
    expect(reply.choices[0]?.text).not.toBe("");
  }
});

test("the stock openai SDK steers by `.openai()`, and its replies are proven, in one piece and streamed", async () => {
  const ours = await client.chat.completions.create({ ...HI, ...WHOLE, steering: ADD });
  const reply = await stock.chat.completions.create({ ...HI, ...WHOLE, ...ADD.openai() });
  expect(reply.choices[0]?.message.content).toBe(ours.choices[0]?.message.content);
  expect(requireApplied(reply)).toMatchObject({ completion_tokens: 8, plan: ours.steering.plan });
  const stream = await stock.chat.completions.create({ ...HI, ...WHOLE, ...ADD.openai(), stream: true });
  let last: unknown;
  for await (const chunk of stream) if ("steering" in chunk) last = chunk;
  expect(requireApplied(last)).toMatchObject({ completion_tokens: 8, plan: ours.steering.plan });
});

test("what is wrong is refused with every field that is", async () => {
  const wrong = new Steering({ edits: [latent("calm", 1).ablate(), latent("calm", 2).ablate()] });
  const refused = await client.chat.completions.create({ ...HI, steering: wrong }).catch((e) => e);
  expect(refused.code).toMatch(/^(invalid_steering|unknown_bundle)$/);
  expect(refused.request_id).toMatch(/./);
  const field: any = { bundle: "calm", strength: 101, wrong: 1 };
  const invalid = await client.chat.completions.create({ ...HI, steering: field }).catch((e) => e);
  expect(invalid).toBeInstanceOf(InvalidSteeringError);
  expect(invalid.violations.map((violation: any) => violation.field).sort()).toEqual(["steering.strength", "steering.wrong"]);
  await expect(client.steering.bundle("no-such")).rejects.toBeInstanceOf(UnknownBundleError);
});

test("bundles are listed and shown, and what the server was started with stays", async () => {
  const bundle = (await client.steering.bundles()).find(({ name }) => name === "calm");
  expect(bundle).toMatchObject({ n_latents: 3, n_vectors: 1, hook_point: "blocks.14.resid_post" });
  expect((await client.steering.latents("calm")).map((found) => found.latent)).toContain(7);
  expect((await client.steering.pin("calm")).pinned).toBe(true);
  await expect(client.steering.unload("calm")).rejects.toMatchObject({ code: "conflict" });
});

test("arms of one prompt are compared, each with its proof", async () => {
  const found = await client.compare({ control: null, add: ADD }, { ...HI, seed: 5 });
  expect(found.seed).toBe(5);
  expect(Object.keys(found.arms)).toEqual(["control", "add"]);
  expect(found.arms["control"]?.steering.status).toBe("not_requested");
  expect(found.arms["add"]?.steering.status).toBe("applied");
  expect(found.arms["add"]?.text).not.toBe(found.arms["control"]?.text);
});

test("what latents read in a text, token by token", async () => {
  const found = await client.steering.inspect("calm", { prompt: "The sea is calm.", top_count: 2, steering: new Steering({ bundle: "calm" }) });
  expect(found.tokens.map((token) => token.text).join("")).toBe("The sea is calm.");
  expect(found.steering.status).toBe("applied");
});

test("the generated types are those of the server's schema", async () => {
  const schema = await (await fetch(`${URL_}/v1/steering/schema`)).json();
  expect(await wire(schema)).toBe(readFileSync(new URL("../src/wire.ts", import.meta.url), "utf8"));
});

test("the README's example runs, and prints its proof", () => {
  const folder = new URL("..", import.meta.url);
  const code = /```ts\n(.*?)```/s.exec(readFileSync(new URL("README.md", folder), "utf8"))![1]!.replace("http://127.0.0.1:8000", URL_);
  const printed = execFileSync(process.execPath, ["--input-type=module", "-e", code], { cwd: folder, encoding: "utf8" });
  expect(printed).toContain("status: 'applied'");
});
