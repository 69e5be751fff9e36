#!/usr/bin/env node
// The official `openai` Node package against a running Ingle, unchanged: every call goes through its public API.
//
//   node test_openai.mjs http://127.0.0.1:8080 [--api-key KEY] [--overload]
//
// --api-key   the server's key; a wrong one must then throw AuthenticationError
// --overload  the server runs one sequence and queues few: a burst must throw RateLimitError
//
// Exits with 1 if a check fails. `tests/clients/run` starts a server and calls this.

import assert from "node:assert/strict";
import { parseArgs } from "node:util";
import OpenAI from "openai";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { "api-key": { type: "string" }, overload: { type: "boolean", default: false } },
});
if (positionals.length !== 1) {
  console.error("usage: test_openai.mjs BASE_URL [--api-key KEY] [--overload]");
  process.exit(2);
}
const key = values["api-key"];
const make = (options = {}) =>
  new OpenAI({ baseURL: `${positionals[0].replace(/\/$/, "")}/v1`, apiKey: key ?? "none", maxRetries: 0, ...options });

const client = make();
const card = (await client.models.list()).data[0];
const model = card.id;
const messages = [{ role: "user", content: "Name three colours. 🙂 日本" }];
const chat = (options = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, max_completion_tokens: 16, ...options });

async function throws(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof kind, `${kind.name} expected, got ${error.constructor.name}: ${error.message}`);
    return error;
  }
  assert.fail(`${kind.name} expected, nothing thrown`);
}

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const checks = {
  async models() {
    const names = [];
    for await (const entry of client.models.list()) {
      assert.equal(entry.object, "model");
      assert.ok(entry.created > 0 && entry.owned_by);
      names.push(entry.id);
    }
    assert.ok(names.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async embeddings() {
    const listed = [];
    for await (const entry of client.models.list()) listed.push(entry);
    const embedder = listed.find((entry) => entry.task === "embed")?.id;
    if (embedder === undefined) return;
    const input = ["the cat sat on the mat", "a dog", "日本 🙂"];
    const answer = await client.embeddings.create({ model: embedder, input });
    const plain = await client.embeddings.create({ model: embedder, input, encoding_format: "float" });
    assert.deepEqual(answer.data.map((item) => item.index), [0, 1, 2]);
    assert.deepEqual(
      answer.data.map((item) => Array.from(item.embedding)),
      plain.data.map((item) => item.embedding.map(Math.fround)),
    );
    assert.equal(answer.usage.prompt_tokens, answer.usage.total_tokens);
    await throws(OpenAI.BadRequestError, () => client.embeddings.create({ model, input: "a" }));
  },

  async chat() {
    const { data: answer, request_id: requestId } = await chat().withResponse();
    const [choice] = answer.choices;
    assert.equal(answer.object, "chat.completion");
    assert.equal(choice.message.role, "assistant");
    assert.ok(choice.message.content);
    assert.equal(choice.message.refusal, null);
    assert.equal(choice.logprobs, null);
    assert.ok(["stop", "length"].includes(choice.finish_reason));
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(requestId);
    const five = await chat({ max_completion_tokens: 5, ignore_eos: true });
    assert.equal(five.usage.completion_tokens, 5);
    assert.equal(five.choices[0].finish_reason, "length");
  },

  async "stream equals the whole answer"() {
    const whole = await chat();
    const chunks = await collect(await chat({ stream: true, stream_options: { include_usage: true } }));
    assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
    const last = chunks.pop();
    assert.deepEqual(last.choices, []);
    assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
    assert.equal(chunks.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);
    assert.ok(chunks.slice(0, -1).every((chunk) => chunk.choices[0].finish_reason === null));
  },

  async "stream helper"() {
    const stream = client.chat.completions.stream({ model, messages, temperature: 0, max_completion_tokens: 16 });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    const final = await stream.finalChatCompletion();
    assert.equal(text, final.choices[0].message.content);
    assert.equal(text, (await chat()).choices[0].message.content);
  },

  async "several choices"() {
    const answer = await chat({ n: 2, temperature: 1, seed: 1 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    const chunks = await collect(await chat({ n: 2, temperature: 1, seed: 1, stream: true }));
    const ends = chunks.flatMap((chunk) => chunk.choices).filter((choice) => choice.finish_reason);
    assert.deepEqual(ends.map((choice) => choice.index).sort(), [0, 1]);
  },

  async logprobs() {
    const answer = await chat({ logprobs: true, top_logprobs: 2 });
    for (const entry of answer.choices[0].logprobs.content) {
      assert.ok(entry.logprob <= 0 && Array.isArray(entry.bytes));
      assert.equal(entry.top_logprobs.length, 2);
      assert.equal(entry.token, entry.top_logprobs[0].token);
    }
  },

  async completions() {
    const create = (options = {}) =>
      client.completions.create({ model, prompt: "Once upon a time", temperature: 0, max_tokens: 8, ...options });
    const one = await create();
    assert.equal(one.object, "text_completion");
    const two = await create({ prompt: ["Once upon a time", "Once upon a time"] });
    assert.deepEqual(two.choices.map((choice) => choice.index), [0, 1]);
    assert.equal(two.choices[1].text, one.choices[0].text);
    const chunks = await collect(await create({ stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), one.choices[0].text);
    assert.equal((await create({ prompt: [5, 6, 7] })).usage.prompt_tokens, 3);
  },

  async "bad requests"() {
    const error = await throws(OpenAI.BadRequestError, () => chat({ temperature: 9 }));
    assert.deepEqual([error.status, error.param, error.type], [400, "temperature", "invalid_request_error"]);
    assert.ok(error.requestID);
    await throws(OpenAI.BadRequestError, () => chat({ messages: [] }));
    await throws(OpenAI.BadRequestError, () => chat({ top_logprobs: 21, logprobs: true, stream: true }));
    const long = [{ role: "user", content: "x y ".repeat(card.max_model_len) }];
    for (const stream of [false, true]) {
      const overflow = await throws(OpenAI.BadRequestError, () => chat({ messages: long, stream }));
      assert.equal(overflow.code, "context_length_exceeded");
      assert.match(overflow.message, /maximum context length is \d+ tokens/);
    }
  },

  async "not found"() {
    const error = await throws(OpenAI.NotFoundError, () => chat({ model: "no-such-model" }));
    assert.equal(error.code, "model_not_found");
    await throws(OpenAI.NotFoundError, () => client.models.retrieve("no/such/model"));
  },

  async authentication() {
    if (!key) return "no key set";
    const error = await throws(OpenAI.AuthenticationError, () => make({ apiKey: "wrong" }).models.list());
    assert.equal(error.status, 401);
    assert.ok(error.headers.get("www-authenticate"));
  },

  async "abandoned streams"() {
    const stream = await chat({ stream: true, max_completion_tokens: 64, ignore_eos: true });
    for await (const _ of stream) break;
    assert.ok(stream.controller.signal.aborted);
    assert.ok((await chat()).choices[0].message.content);
  },

  async "rate limit"() {
    if (!values.overload) return "the server is not set up for it";
    const ask = () => client.chat.completions.create({ model, messages, max_tokens: 100, ignore_eos: true });
    const results = await Promise.allSettled(Array.from({ length: 64 }, ask));
    const errors = results.filter((result) => result.status === "rejected").map((result) => result.reason);
    const other = errors.find((error) => !(error instanceof OpenAI.RateLimitError));
    assert.ok(!other, other);
    assert.ok(errors.length > 0 && errors.length < results.length, `${errors.length} of ${results.length} refused`);
    assert.equal(errors[0].status, 429);
    assert.ok(Number(errors[0].headers.get("retry-after")) >= 1);
    assert.ok((await make({ maxRetries: 5 }).chat.completions.create({ model, messages, max_tokens: 2 })).choices);
  },
};

let failed = 0;
let skips = 0;
for (const [name, run] of Object.entries(checks)) {
  try {
    const skipped = await run();
    skips += skipped ? 1 : 0;
    console.log(skipped ? `skip ${name} (${skipped})` : `ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}\n${error.stack}`);
  }
}
const total = Object.keys(checks).length;
console.log(`openai for Node: ${total - failed - skips} checks passed, ${failed} failed, ${skips} skipped`);
process.exit(failed ? 1 : 0);
