/** The client: the `openai` SDK's calls with `steering`, and what else a Trimtab server answers. */

import { ComparisonStream, comparisonBody, sides, type Arms, type CompareParams, type Comparison } from "./comparison.js";
import { CallError, isRecord } from "./errors.js";
import { requireApplied } from "./proof.js";
import {
  proven,
  type ChatCompletion,
  type ChatCompletionChunk,
  type ChatParams,
  type Completion,
  type CompletionChunk,
  type CompletionParams,
} from "./replies.js";
import { fieldOf, mustBeApplied } from "./spec.js";
import { SteeringRoutes } from "./steering.js";
import { ReplyStream } from "./stream.js";
import { Transport, type CallOptions, type ClientOptions } from "./transport.js";

/** A Trimtab server. */
export class Trimtab {
  readonly chat: { readonly completions: ChatCompletions };
  readonly completions: Completions;
  readonly steering: SteeringRoutes;
  readonly #transport: Transport;

  /** `baseURL` is the server's root, `http://127.0.0.1:8000`, with or without `/v1`. */
  constructor(baseURL: string, options: ClientOptions = {}) {
    this.#transport = new Transport(baseURL, options);
    this.chat = { completions: new ChatCompletions(this.#transport) };
    this.completions = new Completions(this.#transport);
    this.steering = new SteeringRoutes(this.#transport);
  }

  /**
   * One prompt with one seed under several steerings, run side by side.
   *
   * @throws TrimtabError what was asked for is wrong or was not done, with the arm at fault.
   */
  async compare(arms: Arms, params: CompareParams, options?: CallOptions): Promise<Comparison> {
    const stream = await this.compareStream(arms, params, options);
    for await (const _ of stream);
    return stream.comparison;
  }

  /** `compare`, as it comes. */
  async compareStream(arms: Arms, params: CompareParams, options?: CallOptions): Promise<ComparisonStream> {
    const asked = sides(arms);
    const body = comparisonBody(asked, params);
    return new ComparisonStream(await this.#transport.stream({ method: "POST", path: "/steering/compare", body }, options), asked);
  }
}

/** Chat replies. */
export class ChatCompletions {
  readonly #transport: Transport;

  /** @internal */
  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /**
   * A chat reply, steered; `params` are OpenAI's own. A steered reply without proof is an error, unless open.
   *
   * @throws TrimtabError what was asked for is wrong or was not done; see `errors.ts`.
   */
  create(params: ChatParams & { stream: true }, options?: CallOptions): Promise<ReplyStream<ChatCompletionChunk>>;
  create(params: ChatParams & { stream?: false | null }, options?: CallOptions): Promise<ChatCompletion>;
  create(params: ChatParams, options?: CallOptions): Promise<ReplyStream<ChatCompletionChunk> | ChatCompletion>;
  create(params: ChatParams, options?: CallOptions): Promise<ReplyStream<ChatCompletionChunk> | ChatCompletion> {
    return send(this.#transport, "/chat/completions", params, options);
  }
}

/** Text replies. */
export class Completions {
  readonly #transport: Transport;

  /** @internal */
  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** A text reply, steered; otherwise as `chat.completions.create`. */
  create(params: CompletionParams & { stream: true }, options?: CallOptions): Promise<ReplyStream<CompletionChunk>>;
  create(params: CompletionParams & { stream?: false | null }, options?: CallOptions): Promise<Completion>;
  create(params: CompletionParams, options?: CallOptions): Promise<ReplyStream<CompletionChunk> | Completion>;
  create(params: CompletionParams, options?: CallOptions): Promise<ReplyStream<CompletionChunk> | Completion> {
    return send(this.#transport, "/completions", params, options);
  }
}

async function send<Whole, Chunk>(
  transport: Transport,
  path: string,
  params: ChatParams | CompletionParams,
  options: CallOptions | undefined,
): Promise<ReplyStream<Chunk> | Whole> {
  const steering = fieldOf(params.steering);
  const { steering: _, ...rest } = params;
  const body = steering === null ? rest : { ...rest, steering };
  if (params.stream) return new ReplyStream<Chunk>(await transport.stream({ method: "POST", path, body }, options), steering);
  const { document, request_id } = await transport.ask({ method: "POST", path, body }, options);
  if (!isRecord(document)) throw new CallError("the server's answer is no reply", { code: "unreadable", request_id });
  const reply = proven<Whole>(document, request_id);
  if (mustBeApplied(steering)) requireApplied(reply);
  return reply;
}
