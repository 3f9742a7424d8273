/** The cases that every Trimtab client passes, whatever its language: `clients/cases.json`. */

import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { CallError, InvalidSteeringError, Steering, Trimtab, TrimtabError, latent, vector, type Edit } from "../src/index.js";
import { chatReply, events, json, serving } from "./scripted.js";

const CASES = JSON.parse(readFileSync(new URL("../../cases.json", import.meta.url), "utf8"));
const HI = { model: "m", messages: [{ role: "user", content: "Capital of France?" }] };

describe("a spec", () => {
  test.each<any>(CASES.specs)("$name", (spec) => {
    if (spec.invalid) {
      expect(caught(() => built(spec))).toMatchObject({ code: "invalid_steering", param: spec.invalid });
      expect(caught(() => built(spec))).toBeInstanceOf(InvalidSteeringError);
    } else {
      expect(JSON.parse(JSON.stringify(built(spec)))).toEqual(spec.json);
      expect(built(spec).openai()).toEqual({ steering: spec.json });
    }
  });
});

describe("a proof", () => {
  test.each<any>(CASES.proofs)("$name", async (proof) => {
    const client = new Trimtab(await serving(json(chatReply(proof.steering))));
    const reply = client.chat.completions.create({ ...HI, steering: asked(proof) });
    if (proof.error) await expect(reply).rejects.toMatchObject({ code: proof.error, request_id: "req-7" });
    else expect((await reply).steering).toMatchObject(proof.ok);
  });
});

describe("an error", () => {
  test.each<any>(CASES.errors)("$name", async ({ status, error, code, param, violations }) => {
    const client = new Trimtab(await serving(json({ error }, status)), { maxRetries: 0 });
    const thrown = await client.chat.completions.create({ ...HI, steering: new Steering({ bundle: "calm" }) }).catch((e) => e);
    expect(thrown).toBeInstanceOf(TrimtabError);
    expect(thrown).toMatchObject({ param, status, request_id: "req-7", code: code ?? error.code });
    expect(thrown instanceof CallError).toBe(code === null);
    if (code !== null) expect(thrown.violations.map((violation: any) => violation.field)).toEqual(violations);
  });
});

describe("a stream", () => {
  test.each<any>(CASES.streams)("$name", async (stream) => {
    const sent = stream.events.map((event: any) => {
      if (event.error) return JSON.stringify(event);
      const choices = [{ index: 0, delta: { content: event.delta }, finish_reason: event.finish ?? null }];
      return JSON.stringify({ id: "1", object: "chat.completion.chunk", choices, steering: event.steering });
    });
    const client = new Trimtab(await serving(events(...sent, ...(stream.cut ? [] : ["[DONE]"]))));
    const reply = await client.chat.completions.create({ ...HI, steering: asked(stream), stream: true });
    let text = "";
    const read = async () => {
      for await (const chunk of reply) text += chunk.choices[0]?.delta.content ?? "";
    };
    if (stream.error) {
      await expect(read()).rejects.toMatchObject({ code: stream.error, request_id: "req-7" });
      expect(() => reply.steering).toThrow("not complete");
    } else {
      await read();
      expect(text).toBe(stream.text);
      expect(reply.steering).toMatchObject(stream.ok);
    }
  });
});

describe("retries", () => {
  test.each<any>(CASES.retries)("$name", async (retries) => {
    let requests = 0;
    const url = await serving((request, response, body) => {
      const [status, headers] = retries.answers[requests++];
      if (status === "broken") {
        response.writeHead(200, { "content-type": "text/event-stream" });
        response.write('data: {"id": "1", "choices": []}\n\n', () => response.destroy());
      } else {
        const document = status === 200 ? chatReply({ status: "not_requested" }) : { error: { message: "no" } };
        json(document, status, headers)(request, response, body);
      }
    });
    const client = new Trimtab(url, { maxRetries: 2 });
    const ask = async () => {
      if (!retries.stream) return void (await client.chat.completions.create(HI));
      for await (const _ of await client.chat.completions.create({ ...HI, stream: true }));
    };
    if (retries.ok) await ask();
    else await expect(ask()).rejects.toBeInstanceOf(CallError);
    expect(requests).toBe(retries.requests);
  });
});

function built(spec: any): Steering {
  return new Steering({ ...spec.steering, ...(spec.edits && { edits: spec.edits.map(edit) }) });
}

function edit(spec: any): Edit {
  let found: any = spec.latent ? latent(...(spec.latent as [string, number])) : vector(...(spec.vector as [string, string]));
  for (const [name, ...given] of spec.calls) {
    const method = name.replace(/_(.)/g, (_: string, letter: string) => letter.toUpperCase());
    const named = given.at(-1)?.["="];
    found = named === undefined ? found[method](...given) : found[method](...given.slice(0, -1), named);
  }
  return found;
}

function asked(spec: any): Steering | null {
  return spec.asked === null ? null : new Steering(spec.asked);
}

function caught(act: () => unknown): unknown {
  try {
    return act();
  } catch (error) {
    return error;
  }
}
