/** The JSON documents of a stream of server-sent events, up to `[DONE]`. */

import { CallError, errorOf, isRecord } from "./errors.js";

/** The body of a reply that streams, and what is needed to end it well. */
export interface Body {
  readonly bytes: ReadableStream<Uint8Array>;
  readonly request_id: string | null;
  /** Aborts when the caller says so. */
  readonly signal: AbortSignal;
}

/**
 * Each event's document; at the end, before anything else is thrown, `ended`. Leaving the loop early cancels the body, and
 * the server aborts the request.
 *
 * @throws TrimtabError an event is an error document, or the stream ends without `[DONE]`: part of the reply is missing.
 */
export async function* documents(body: Body, ended: () => void): AsyncGenerator<Record<string, unknown>, void, undefined> {
  const { request_id } = body;
  let isComplete = false;
  for await (const data of events(body)) {
    if (isComplete) continue; // to the very end, so that the connection can be used again
    if (data === "[DONE]") {
      isComplete = true;
      continue;
    }
    let document: unknown;
    try {
      document = JSON.parse(data);
    } catch (cause) {
      throw new CallError("an event of the stream is not JSON", { code: "unreadable", request_id, cause });
    }
    if (!isRecord(document)) throw new CallError("an event of the stream is no object", { code: "unreadable", request_id });
    if (isRecord(document["error"])) throw errorOf(document, { status: null, request_id });
    yield document;
  }
  ended();
  if (isComplete) return;
  throw new CallError("the stream ended early: part of the reply is missing", { code: "connection", request_id });
}

/** The data of each event; comments and other fields are skipped. */
async function* events(body: Body): AsyncGenerator<string, void, undefined> {
  let data: string[] = [];
  for await (const line of lines(body)) {
    if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    } else if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

async function* lines({ bytes, request_id, signal }: Body): AsyncGenerator<string, void, undefined> {
  const reader = bytes.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((cause: unknown) => {
        signal.throwIfAborted();
        throw new CallError("the connection was lost in the middle of the reply", { code: "connection", request_id, cause });
      });
      if (done) return;
      const found = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = found.pop() ?? "";
      for (const line of found) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
  } finally {
    await reader.cancel().catch(() => undefined); // of a body that failed: its error is on its way already
  }
}
