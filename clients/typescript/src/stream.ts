/** A reply as it comes. */

import { NotAppliedError } from "./errors.js";
import { documents, type Body } from "./events.js";
import { appliedOf, rawProof, requireApplied, type Applied } from "./proof.js";
import { mustBeApplied } from "./spec.js";
import type { SteeringField } from "./wire.js";

/** The chunks of a reply, once, by `for await`; when it is complete, `steering` is what was applied. */
export class ReplyStream<Chunk> implements AsyncIterable<Chunk> {
  readonly #body: Body & { cancel(): void };
  readonly #steering: SteeringField | null;
  #last: Record<string, unknown> | null = null;
  #ended = false;

  /** @internal */
  constructor(body: Body & { cancel(): void }, steering: SteeringField | null) {
    this.#body = body;
    this.#steering = steering;
  }

  /**
   * Leaving the loop early stops the reply; the server aborts it.
   *
   * @throws NotAppliedError at the end: edits were asked for, and the last proof does not show them.
   */
  async *[Symbol.asyncIterator](): AsyncGenerator<Chunk, void, undefined> {
    for await (const document of documents(this.#body, () => this.#end())) {
      const raw = rawProof(document);
      if (raw !== null) this.#last = raw;
      yield (raw === null ? document : { ...document, steering: appliedOf(document) }) as Chunk;
    }
  }

  /**
   * What was applied; known when the stream is complete.
   *
   * @throws NotAppliedError the stream is not complete, or carried no proof.
   */
  get steering(): Applied {
    if (!this.#ended) {
      throw new NotAppliedError("the stream is not complete; read it to the end, its last chunk carries the proof");
    }
    return appliedOf(this.#proof);
  }

  /** Stops the reply; the server aborts it. */
  close(): void {
    this.#body.cancel();
  }

  get #proof() {
    return { steering: this.#last, _request_id: this.#body.request_id };
  }

  #end(): void {
    if (mustBeApplied(this.#steering)) requireApplied(this.#proof);
    this.#ended = true;
  }
}
