/**
 * A server that answers from a script. Why a fake here: what a broken or foreign server answers cannot be had from the real
 * one. What the real server answers is tested in `server.test.ts`.
 */

import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { onTestFinished } from "vitest";

export type Answer = (request: IncomingMessage, response: ServerResponse, body: string) => void;

/** Its URL, until the test is over. */
export async function serving(answer: Answer): Promise<string> {
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const part of request) body += part;
    answer(request, response, body);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** Always this JSON. */
export function json(document: unknown, status = 200, headers: Record<string, string> = {}): Answer {
  return (_, response) => {
    response.writeHead(status, { "content-type": "application/json", "x-request-id": "req-7", ...headers });
    response.end(JSON.stringify(document));
  };
}

/** These events, then the end. */
export function events(...data: string[]): Answer {
  return (_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream", "x-request-id": "req-7" });
    response.end(data.map((item) => `data: ${item}\n\n`).join(""));
  };
}

/** A chat reply with this `steering` object; null leaves it out. */
export function chatReply(steering: unknown): object {
  const choices = [{ index: 0, finish_reason: "stop", message: { role: "assistant", content: "Paris." } }];
  const reply = { id: "chatcmpl-1", object: "chat.completion", created: 1, model: "m", choices };
  return steering === null ? reply : { ...reply, steering };
}
